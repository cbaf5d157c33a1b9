import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoint_tools import SMALL, edit_config, edit_tensors, write_small
from cli_tools import TINY_DEMO, read, refuse, run, succeed, unsupported_isa
from moe_tools import BF16_PRECISIONS
from safetensors.torch import load_file

import cpumoe
from cpumoe import _core, models
from cpumoe.cli import console, demo
from cpumoe.measure import validation

pytestmark = pytest.mark.usefixtures("quick_commands")

COMMANDS = (
    *("info", "inspect", "synth", "validate", "bench", "bench-model"),
    *("generate", "eval", "chat", "serve", "sglang", "placement", "demo"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"cpumoe {command}" in succeed(command, "--help")
    assert command in succeed("--help")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_shows_no_type_for_flags(command):
    text = succeed(*command, "--help")
    assert "--help" in text
    assert "bool" not in text.lower()


def test_version():
    assert succeed("--version").startswith("cpumoe ")


def test_no_command_shows_help_and_an_unknown_one_is_a_usage_error():
    assert "Commands" in run().output
    assert run("nonsense").exit_code == 2
    assert run("synth", "somewhere").exit_code == 2  # without --model


def test_info():
    document = read("info")
    variants = {row["name"]: row for row in document["isa"]["variants"]}
    assert list(variants) == cpumoe.known_isas()
    assert document["isa"]["in_use"] == cpumoe.isa() == cpumoe.supported_isas()[-1]
    assert [name for name, row in variants.items() if row["supported"]] == cpumoe.supported_isas()
    assert [row["name"] for row in document["formats"]] == list(cpumoe.WEIGHT_FORMATS)
    assert document["versions"]["torch"] == torch.__version__
    assert document["cpu"]["cores"] >= document["cpu"]["default_threads"] >= 1
    assert document["read_bandwidth"]["bytes_per_second"] > 0
    steps = {row["step"]: row["passed"] for row in document["amx"]}
    assert list(steps) == ["cpuid", "osxsave", "xcr0", "palette", "permission", "trial"]
    if "amx-tile" in _core.cpu_features():
        assert all(steps.values()) or "CPUMOE_TEST_EMULATOR" in os.environ
    else:
        assert not all(steps.values())
    text = succeed("info")
    assert all(isa in text for isa in cpumoe.known_isas())
    assert all(row["question"] in text and row["found"] in text for row in document["amx"])


@pytest.mark.parametrize("isa", [*cpumoe.supported_isas()])
def test_info_shows_the_forced_variant(isa, monkeypatch):
    monkeypatch.setenv("CPUMOE_ISA", isa)
    assert read("info")["isa"]["in_use"] == isa
    assert "CPUMOE_ISA is set" in succeed("info")


def test_info_with_a_variant_that_the_cpu_lacks(monkeypatch):
    isa = unsupported_isa()
    monkeypatch.setenv("CPUMOE_ISA", isa)
    result = run("info", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["isa"]["in_use"] is None
    assert result.stderr.startswith(f"error: CPUMOE_ISA={isa}: ")
    assert cpumoe.missing_features(isa)[0] in result.stderr


def test_info_where_no_variant_runs(monkeypatch):
    """Imitates a build for one variant (CPUMOE_ISAS) on another machine."""

    def refuse(*arguments):
        raise ValueError("this CPU can run none of the installed variants (avx2: lacks fma)")

    monkeypatch.setattr(_core, "supported_isas", list)
    monkeypatch.setattr(_core, "usable_isas", refuse)
    monkeypatch.setattr(_core, "select_isa", refuse)
    result = run("info", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["read_bandwidth"] is None
    assert "this CPU can run none of the installed variants" in result.stderr
    assert "not measured" in run("info").stdout


@pytest.mark.parametrize(
    ("model", "format", "first"),
    [("deepseek-v4-flash", "mxfp4", 0), ("gpt-oss-20b", "mxfp4", 0), ("kimi-k2", "int4", 1)],
)
def test_inspect_folder(model, format, first, tmp_path):
    folder = write_small(tmp_path / "model", model)
    document = read("inspect", folder)
    assert document["supported"]
    assert document["format"] == format
    assert document["layers"] == [first, first + 1]
    assert (document["num_experts"], document["top_k"]) == (SMALL["experts"], SMALL["top_k"])
    assert document["shards"] == {"present": 1, "missing": []}
    weights = 3 * SMALL["hidden"] * SMALL["intermediate"]
    expected = weights * cpumoe.weight_format(format).bits_per_weight / 8
    # Biases, or tensors that repeat the shape.
    assert expected <= document["bytes"]["expert"] <= expected + 2 * 3 * 2 * SMALL["intermediate"]
    assert document["bytes"]["experts"] == 2 * document["bytes"]["layer"]
    assert format in succeed("inspect", folder)


def test_inspect_name():
    document = read("inspect", "v4-flash")
    assert document["name"] == "DeepSeek-V4-Flash"
    assert document["supported"]
    assert document["activation"]["limit"] == 10
    assert "g at most 10" in succeed("inspect", "v4-flash")


def test_inspect_says_why_a_model_is_not_supported(monkeypatch):
    spec = models.find_model("v4-flash")
    spec = dataclasses.replace(spec, weight_format="mxfp8", layout="other")
    monkeypatch.setattr(models, "find_model", lambda _name: spec)
    document = read("inspect", "v4-flash")
    assert not document["supported"]
    assert "weight format mxfp8 is not supported yet" in document["reasons"]
    assert document["bytes"]["expert"] == spec.expert_params * (8 + 8 / 32) / 8


def test_inspect_names_missing_and_damaged_shards(tmp_path):
    folder = write_small(tmp_path / "model", "kimi-k2", max_shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    shards[-1].unlink()
    shards[-2].write_bytes(shards[-2].read_bytes()[:-5])
    document = read("inspect", folder)
    assert not document["supported"]
    assert document["shards"]["missing"] == [shards[-1].name]
    assert any("truncated" in reason for reason in document["reasons"])
    assert "NO" in succeed("inspect", folder)
    assert f"{shards[-2].name}: truncated" in refuse("validate", folder, "--layer", 2)


def test_inspect_refuses_what_is_no_model(tmp_path):
    assert "no such folder, and unknown model 'nonsens'" in refuse("inspect", "nonsens")
    assert "did you mean gpt-oss-20b" in refuse("inspect", "gpt-oss-2b")
    assert "no config.json" in refuse("inspect", tmp_path)
    file = tmp_path / "file"
    file.touch()
    assert "got a file" in refuse("inspect", file)


def test_synth(tmp_path):
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    document = read("synth", tmp_path / "a", "--model", "gpt-oss-20b", *sizes)
    assert document["model"] == "gpt-oss-20b"
    assert document["bytes"] == (tmp_path / "a" / "model.safetensors").stat().st_size
    assert "cpumoe validate" in succeed("synth", tmp_path / "b", "--model", "kimi-k2", *sizes)
    assert "expected an empty folder" in refuse(
        "synth", tmp_path / "b", "--model", "kimi-k2", *sizes
    )
    succeed("synth", tmp_path / "b", "--model", "kimi-k2", *sizes, "--overwrite")
    assert read("inspect", tmp_path / "b")["hidden_size"] == SMALL["hidden"]


def test_synth_with_chosen_scales(tmp_path):
    sizes = ("--layers", 1, "--experts", 2, "--hidden", 64, "--intermediate", 128)
    k2 = ("--model", "kimi-k2", *sizes)
    for scales, group, shown in (("fp16", "64", 64), ("fp32", "row", "row"), ("bf16", "32", 32)):
        folder = tmp_path / scales
        succeed("synth", folder, *k2, "--scales", scales, "--group", group)
        with cpumoe.open_checkpoint(folder) as reader:
            matrix = reader.expert(1, 1).up
        assert str(matrix.scales.dtype).removeprefix("torch.").startswith(scales[0])
        assert matrix.group_size == (64 if shown == "row" else shown)
    assert (
        "int4: weights that share a scale: expected a multiple of 32 that divides a row of 128 "
        "weights, 32 * 2^n, or the row, got 96"
    ) in refuse("synth", tmp_path / "other", *k2, "--group", "96")
    assert not (tmp_path / "other").exists()


def test_synth_refusals(tmp_path):
    out = tmp_path / "out"
    assert "unknown model" in refuse("synth", out, "--model", "nonsense")
    assert "multiple of 2" in refuse("synth", out, "--model", "v4-flash", "--hidden", 41)
    assert "pattern" in refuse("synth", out, "--model", "v4-flash", "--pattern", "x")
    assert run("synth", out, "--model", "v4-flash", "--experts", 0).exit_code == 2
    assert not out.exists()


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "_TEXT_TOKENS", 12)
    document = read("demo", *TINY_DEMO)
    assert document["passed"]
    assert [(r["ran"], r["precision"]) for r in document["validation"]["isas"]] == [
        (isa, precision) for isa in cpumoe.supported_isas() for precision in BF16_PRECISIONS
    ]
    assert document["speed"]["isa"] == cpumoe.isa()
    for row in document["speed"]["throughput"]:
        assert row["tokens_per_second"] > 0
        assert row["weight_bytes"] == document["load"]["bytes"]
    assert list(tmp_path.glob("cpumoe-*")) == []  # its own; PyTorch leaves a folder too
    assert document["text"]["completion_tokens"] > 1


def test_demo_keeps_its_checkpoint_and_fails_if_validation_does(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_TEXT_TOKENS", 12)
    kept = tmp_path / "kept"
    output = succeed("demo", *TINY_DEMO, "--keep", kept)
    assert f"cpumoe validate {kept}" in output
    assert "Next, try" in output
    assert read("demo", *TINY_DEMO)["text"]["text"] in output
    assert read("validate", kept, "--tokens", "1")["passed"]
    assert "expected an empty folder" in refuse("demo", *TINY_DEMO, "--keep", kept)
    monkeypatch.setattr(cpumoe.Experts, "isa", "another")
    assert run("demo", *TINY_DEMO).exit_code == 1


def test_traceback_on_request(monkeypatch):
    result = run("inspect", "nonsense", "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    monkeypatch.setenv("CPUMOE_TRACEBACK", "1")
    assert "Traceback" in run("inspect", "nonsense").stderr


def test_bugs_keep_their_traceback(monkeypatch, v4):
    def broken(*_arguments, **_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(validation, "validate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("validate", v4)


def test_units():
    assert console.format_bytes(0) == "0 B"
    assert console.format_bytes(999) == "999 B"
    assert console.format_bytes(999_600) == "1.00 MB"
    assert console.format_bytes(13_369_344) == "13.4 MB"
    assert console.format_rate(147e9) == "147 GB/s"
    assert console.format_time(0.0123) == "12.3 ms"
    assert console.format_time(61) == "61.0 s"
    assert console.format_number(12345.6) == "12,346"
    assert console.format_percent(0.874) == "87 %"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_too_little_memory_is_one_line(v4, monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(validation, "validate", fail)
    assert refuse("validate", v4) == "error: not enough memory\n"


def test_a_reader_that_has_gone_is_no_error(v4):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        ended = subprocess.run(
            [sys.executable, "-m", "cpumoe", "inspect", v4, "--json"],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.stderr == ""
    assert ended.returncode == 1


@pytest.mark.parametrize("model", ["v4-flash", "kimi-k2", "gpt-oss-20b"])
@pytest.mark.parametrize("supported", [True, False])
def test_inspect_counts_decoder_layers_only(tmp_path, model, supported):
    write_small(tmp_path, model)
    if not supported:
        edit_config(tmp_path, model_type="other", quantization_config={"quant_method": "awq"})
    expected = read("inspect", tmp_path)
    assert expected["bytes"]["layer"] > 0
    layer, beyond = f"layers.{expected['layers'][0]}.", f"layers.{expected['num_hidden_layers']}."
    others = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if layer in name:
            others[f"mtp.{name.removeprefix('model.')}"] = tensor.clone()
            others[name.replace(layer, beyond)] = tensor.clone()
    edit_tensors(tmp_path, others)
    assert read("inspect", tmp_path) == expected


def test_inspect_shows_names_as_they_are(v4):
    edit_config(v4, model_type="[/x]", quantization_config={"quant_method": "[b]"})
    text = succeed("inspect", v4)
    assert "[/x]" in text
    assert "[b]" in text


@pytest.mark.parametrize("count", [4, 2**70])
def test_inspect_sees_experts_that_are_not_there(v4, count):
    edit_config(v4, n_routed_experts=count)
    document = read("inspect", v4)
    assert not document["supported"]
    assert f"layers.0.ffn.experts.{count - 1}.w1.weight: no such tensor" in document["reasons"][0]
    assert "NO" in succeed("inspect", v4)


def test_suggested_commands_are_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_TEXT_TOKENS", 2)
    out = tmp_path / "my [red] model"
    sizes = ("--layers", 1, "--experts", 2, "--hidden", 64, "--intermediate", 32)
    text = succeed("synth", out, "--model", "gpt-oss-20b", *sizes)
    assert f"cpumoe validate '{out}'" in text.replace("\n", "")
    kept = tmp_path / "a kept one"
    assert f"cpumoe validate '{kept}' --pattern" in succeed("demo", "--keep", kept, *TINY_DEMO)


def test_inspect_sees_layers_that_are_not_there(v4):
    layers = read("inspect", v4)["num_hidden_layers"]
    edit_config(v4, num_hidden_layers=layers + 1)
    document = read("inspect", v4)
    assert not document["supported"]
    (reason,) = document["reasons"]
    assert f"num_hidden_layers: expected at most {layers}, as the weights have" in reason
