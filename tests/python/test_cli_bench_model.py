"""``cpumoe bench-model``: the speed of a whole model."""

import json

import pytest
import tiny_models
from cli_tools import make_quick, refuse, run, succeed

from cpumoe.integrations.transformers import ExpertsOptions, LanguageModel, dense
from cpumoe.integrations.transformers.model_speed import dense_bytes
from cpumoe.measure.limits import MemoryReader

QUICK = ("--contexts", "5,9", "--new-tokens", 3, "--rounds", 2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    make_quick(monkeypatch.setattr)
    measure = MemoryReader.measure
    monkeypatch.setattr(MemoryReader, "measure", lambda self, seconds: measure(self, seconds=0))
    monkeypatch.setattr(dense, "_LEAST_BYTES", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_models.gpt_oss(tmp_path_factory.mktemp("gpt_oss"))
    tiny_models.byte_tokenizer(folder)
    return folder


def test_the_document(folder):
    document = json.loads(succeed("bench-model", folder, *QUICK, "--json", "-"))
    settings = document["settings"]
    assert settings["new_tokens"] == 3
    assert settings["attention_modules"] == tiny_models.LAYERS
    assert settings["dtype"] == "bfloat16"
    assert [row["context"] for row in document["rows"]] == [5, 9]
    for row in document["rows"]:
        assert len(row["rounds"]) == 2
        assert row["decode_tokens_per_second"] > 0
        needed = row["experts_bytes"] + row["dense_bytes"]
        rates = sorted(each["bytes_per_second"] / needed for each in row["rounds"])
        assert rates[0] <= row["floor_tokens_per_second"] <= rates[1]
        assert 0 < row["experts_share"] < 1
        assert 0 < row["dense_share"] < 1 - row["experts_share"]


@pytest.mark.parametrize("chosen", ["host", "fp8"])
def test_bytes_of_a_token(folder, chosen):
    document = json.loads(succeed("bench-model", folder, *QUICK, "--json", "-", "--dense", chosen))
    options = ExpertsOptions(dense=chosen, progress=False)
    model = LanguageModel.from_pretrained(folder, options=options)
    layers = [module.experts for module in model.model.modules() if hasattr(module, "spent")]
    a_token = sum(each.nbytes * tiny_models.TOP_K // each.num_experts for each in layers)
    for row in document["rows"]:
        assert row["experts_bytes"] == a_token
        assert row["dense_bytes"] == dense_bytes(model.model)
    assert document["settings"]["dense_layers"] == len(model.dense_layers.ours)
    embedding = model.model.get_input_embeddings()
    if chosen == "host":
        every = sum(parameter.nbytes for parameter in model.model.parameters())
        assert dense_bytes(model.model) == every - embedding.weight.nbytes
    if chosen == "fp8":
        host = LanguageModel.from_pretrained(folder, options=ExpertsOptions(dense="host"))
        assert dense_bytes(model.model) < 0.7 * dense_bytes(host.model)


def test_the_table_and_a_comparison(folder, tmp_path):
    old = tmp_path / "old.json"
    text = succeed("bench-model", folder, *QUICK, "--json", old)
    assert "memory allows" in text
    assert "cpumoe computes" in text
    result = run(
        *("bench-model", folder, "--contexts", "9,10", "--new-tokens", 2, "--rounds", 1),
        *("--compare", old),
    )
    assert result.exit_code == 0
    assert "Compared with the earlier run" in result.stdout
    assert "the runs differ in new_tokens: 3 then, 2 now" in result.stderr
    other = run("bench-model", folder, "--contexts", 7, "--new-tokens", 3, "--compare", old)
    assert "The earlier run has none of these contexts." in other.stdout


def test_what_is_refused(folder, tmp_path):
    long = refuse("bench-model", folder, "--contexts", "509", "--new-tokens", 3)
    assert "contexts: expected 1 to 508 tokens, because 4 follow" in long
    assert "--contexts" in refuse("bench-model", folder, "--contexts", "1,x")
    assert "cannot be combined" in refuse("bench-model", "--json", "-", "--compare", "x.json")
    assert "no such file" in refuse("bench-model", "--compare", tmp_path / "none.json")
    wrong = tmp_path / "wrong.json"
    for content in ("{", "[]", '{"version": 1, "rows": [{}]}', '{"version": 3, "rows": []}'):
        wrong.write_text(content)
        assert "--compare: " in refuse("bench-model", "--compare", wrong)
    missing = refuse("bench-model", "--json", tmp_path / "no" / "file.json")
    assert "does not exist" in missing
