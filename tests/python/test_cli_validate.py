import json
import math
import warnings

import pytest
import torch
from checkpoint_tools import write_small
from cli_tools import TINY_DEMO, read, refuse, run, succeed, unsupported_isa
from moe_tools import BF16_PRECISIONS

import cpumoe
from cpumoe.measure import validation
from cpumoe.models.synth import PATTERNS
from cpumoe.numerics.precision import PRECISIONS

pytestmark = pytest.mark.usefixtures("quick_commands")


@pytest.mark.parametrize("model", ["deepseek-v4-flash", "gpt-oss-20b", "kimi-k2"])
def test_validate(model, tmp_path):
    folder = write_small(tmp_path / "model", model)
    document = read("validate", folder, "--tokens", "1,3,33")
    assert document["passed"]
    assert [result["ran"] for result in document["isas"]] == cpumoe.supported_isas()
    for result in document["isas"]:
        assert result["inexact_exports"] == []
        assert [case["tokens"] for case in result["cases"]] == [1, 3, 33]
        for case in result["cases"]:
            assert 0 < case["worst_ratio"] <= 1
            assert case["bit_identical"]
            assert case["relative_l2"] < 5e-3


def test_validate_chooses_precisions(v4):
    def ran(*arguments):
        document = read("validate", v4, "--tokens", "3,40", "--isa", "generic", *arguments)
        assert document["passed"]
        return {result["precision"]: result["cases"] for result in document["isas"]}

    assert list(ran()) == ["bf16"]
    assert list(ran("--precision", "int8")) == ["int8"]
    assert list(ran("--precision", "int8, bf16")) == ["int8", "bf16"]
    both = ran("--precision", "all")
    assert list(both) == list(BF16_PRECISIONS)
    for few, many in zip(both["bf16"], both["int8"], strict=True):
        assert few["relative_l2"] < 5e-3 < many["relative_l2"] < 2e-2
        errors = [abs(case["worst"]["actual"] - case["worst"]["expected"]) for case in (few, many)]
        assert errors[0] < errors[1]
    assert list(ran("--precision", "auto,bf16")) == ["bf16"]
    text = succeed("validate", v4, "--tokens", "3", "--isa", "generic", "--precision", "all")
    assert "passed on generic bf16, generic int8" in text
    assert "--precision: expected one of all, auto, bf16, int8, got 'fp7'" in refuse(
        "validate", v4, "--precision", "int8,fp7"
    )


def test_validate_checks_fp32_hidden_states(v4):
    options = ("--tokens", "3,40", "--precision", "all", "--isa", "all", "--dtype", "float32")
    document = read("validate", v4, *options)
    assert document["passed"]
    assert document["dtype"] == "float32"
    assert [(result["isa"], result["precision"]) for result in document["isas"]] == [
        (isa, precision) for isa in cpumoe.supported_isas() for precision in PRECISIONS
    ]
    for result in document["isas"]:
        if result["precision"] == "auto":
            assert all(case["relative_l2"] < 1e-5 for case in result["cases"])
    assert "--dtype: expected one of bfloat16, float16, float32, got 'int4'" in refuse(
        "validate", v4, "--dtype", "int4"
    )


@pytest.mark.parametrize("model", ["gpt-oss-20b", "kimi-k2"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_validate_int8_patterns(model, pattern, tmp_path):
    folder = write_small(tmp_path / "model", model)
    options = ("--precision", "int8", "--pattern", pattern, "--tokens", "1,17")
    assert read("validate", folder, *options)["passed"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_validate_patterns(pattern, tmp_path):
    for model in ("v4-flash", "gpt-oss-20b", "kimi-k2"):
        folder = write_small(tmp_path / model, model)
        text = succeed(
            "validate", folder, "--tokens", "2", "--pattern", pattern, "--experts", 2, "--seed", 1
        )
        assert f"of pattern {pattern}" in text
        assert "passed on" in text


def test_validate_chooses_variants(v4, monkeypatch):
    best, general = cpumoe.supported_isas()[-1], cpumoe.supported_isas()[0]

    def ran(*arguments):
        document = read("validate", v4, "--tokens", "1", *arguments)
        return [result["ran"] for result in document["isas"]]

    assert ran("--isa", f"{best}, {general}") == list(dict.fromkeys([best, general]))
    monkeypatch.setenv("CPUMOE_ISA", general)
    assert ran() == [general]
    assert ran("--isa", "all") == cpumoe.supported_isas()
    monkeypatch.setenv("CPUMOE_ISA", "sse9")
    assert ran("--isa", best) == [best]


def test_validate_compares_a_sample_of_many_tokens(v4, monkeypatch):
    monkeypatch.setattr(validation, "MAX_REFERENCE_TOKENS", 4)
    case = read("validate", v4, "--tokens", "9")["isas"][0]["cases"][0]
    assert (case["tokens"], case["checked_tokens"]) == (9, 4)
    assert "4 of 9" in succeed("validate", v4, "--tokens", "9")


def test_validate_warns_of_too_many_threads(v4):
    threads = cpumoe.default_runtime().threads + 1
    result = run("validate", v4, "--tokens", "1", "--threads", threads)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: Runtime: {threads} threads")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        succeed("validate", v4, "--tokens", "1")  # the check's five threads cause no warning


def test_validate_refusals(v4, tmp_path, monkeypatch):
    assert "unknown" in refuse("validate", v4, "--isa", "avx9000")
    assert "avx9000" in refuse("validate", v4, "--isa", "generic,avx9000")
    assert "no routed experts" in refuse("validate", v4, "--layer", 7)
    assert "no routed experts" in refuse("validate", v4, "--layer", -1)
    assert "--tokens: expected positive" in refuse("validate", v4, "--tokens", "1,x")
    assert "--tokens: expected positive" in refuse("validate", v4, "--tokens", "0")
    assert "--pattern: expected one of checkpoint," in refuse("validate", v4, "--pattern", "x")
    assert "no such checkpoint folder" in refuse("validate", tmp_path / "nowhere")
    assert "seed: expected 0 to 2**63 - 1, got -1" in refuse("validate", v4, "--seed", -1)
    assert "up to 1048576 separated by commas" in refuse("validate", v4, "--tokens", 10**12)
    monkeypatch.setenv("CPUMOE_ISA", "avx9000")
    assert "CPUMOE_ISA=avx9000" in refuse("validate", v4)
    assert "CPUMOE_ISA=avx9000" in refuse("demo", *TINY_DEMO)


def test_validate_refuses_a_variant_that_the_cpu_lacks(v4, monkeypatch):
    isa = unsupported_isa()
    assert cpumoe.missing_features(isa)[0] in refuse("validate", v4, "--isa", isa)
    monkeypatch.setenv("CPUMOE_ISA", isa)
    assert f"CPUMOE_ISA={isa}" in refuse("validate", v4)


def fail_validation(v4, *arguments):
    result = run("validate", v4, "--tokens", "5", "--isa", "generic", *arguments)
    assert result.exit_code == 1
    return result.stdout


@pytest.mark.parametrize("wrong", [7.0, math.nan, math.inf])
def test_validate_finds_a_wrong_element(v4, monkeypatch, wrong):
    right = cpumoe.Experts.__call__

    def corrupted(self, *tensors):
        output = right(self, *tensors)
        output[3, 2] = wrong
        return output

    monkeypatch.setattr(cpumoe.Experts, "__call__", corrupted)
    document = json.loads(fail_validation(v4, "--json"))
    case = document["isas"][0]["cases"][0]
    assert not document["passed"]
    assert case["bit_identical"]
    assert (case["worst"]["token"], case["worst"]["column"]) == (3, 2)
    assert "output 3, 2 is" in fail_validation(v4)


def test_validate_finds_results_that_change(v4, monkeypatch):
    right = cpumoe.Experts.__call__

    def unsteady(self, *tensors):
        output = right(self, *tensors)
        if self.runtime.threads == 5:
            output[0, 0] = torch.nextafter(output[0, 0], output[0, 0] + 1)
        return output

    monkeypatch.setattr(cpumoe.Experts, "__call__", unsteady)
    assert "depends on the number of threads" in fail_validation(v4)


def test_validate_finds_inexact_exports(v4, monkeypatch):
    right = cpumoe.Experts.export

    def damaged(self, expert_id):
        expert = right(self, expert_id)
        if expert_id == 1:
            expert.down.scales[-1, -1] ^= 1
        return expert

    monkeypatch.setattr(cpumoe.Experts, "export", damaged)
    assert json.loads(fail_validation(v4, "--json"))["isas"][0]["inexact_exports"] == [1]
    assert "exports differ from the checkpoint for experts: 1" in fail_validation(v4)


def test_validate_finds_the_wrong_variant(v4, monkeypatch):
    monkeypatch.setattr(cpumoe.Experts, "isa", "another")
    assert "another ran instead" in fail_validation(v4)


def test_validate_says_that_a_model_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refuse("validate", "v4-flash") == (
        "error: v4-flash is a model, not a folder; make a checkpoint with: "
        "cpumoe synth OUT --model v4-flash\n"
    )
    assert "no such checkpoint folder" in refuse("validate", "nothing")


def test_tokens_given_twice_add_up(v4):
    document = read("validate", v4, "--tokens", "1,2", "--tokens", 3, "--isa", "generic")
    assert [case["tokens"] for case in document["isas"][0]["cases"]] == [1, 2, 3]
