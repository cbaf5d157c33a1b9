"""``cpumoe bench --format``: several formats in one run."""

import json
import statistics

import pytest
from bench_tools import measure, quicken, refuse, run, succeed, use_small_model

import cpumoe
from cpumoe.measure import benchmark
from cpumoe.measure.layer_weights import LayerWeights

# Two orders of two formats, as --format takes them and as rows name them.
PAIRS = [(text, text.split(",")) for text in ("int4,mxfp4", "mxfp4,int4")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch)


@pytest.fixture
def small_model(monkeypatch):
    return use_small_model(monkeypatch)


@pytest.mark.parametrize(("text", "formats"), [("all", [*cpumoe.WEIGHT_FORMATS]), *PAIRS])
def test_formats_are_compared_with_the_first(text, formats, small_model):
    document = measure("--format", text, "--experts", 7, "--tokens", "1,2")
    rows = document["rows"]
    expected = [(tokens, fmt) for tokens in (1, 2) for fmt in formats]
    assert [(row["tokens"], row["format"]) for row in rows] == expected
    assert document["settings"]["format"] == ",".join(formats)
    for index, row in enumerate(rows):
        first = rows[index - index % len(formats)]
        turns = zip(first["turns"], row["turns"], strict=True)
        ratios = [theirs["seconds"] / own["seconds"] for theirs, own in turns]
        assert row["speed_ratio"] == pytest.approx(statistics.median(ratios))
        assert row["touched_experts"] == first["touched_experts"]
        weights = LayerWeights.from_model(small_model, limit=7, format=row["format"])
        packed = weights.pack(cpumoe.ExpertsOptions()).nbytes
        assert row["weight_bytes"] == pytest.approx(row["touched_experts"] * packed / 7)


@pytest.mark.parametrize("fmt", cpumoe.WEIGHT_FORMATS)
def test_calls_are_compared_with_the_instruction_that_multiplies_their_format(fmt, small_model):
    arguments = ("--format", fmt, "--experts", 7, "--tokens", 1, "--precision", "int8")
    document = measure(*arguments)
    (peak,) = document["machine"]["dot_peaks"]
    assert (peak["isa"], peak["format"], peak["precision"]) == (cpumoe.isa(), fmt, "int8")
    assert document["rows"][0]["share_of_dot_peak"] is not None


def test_table_of_formats(small_model):
    first, second, *_ = cpumoe.WEIGHT_FORMATS
    text = succeed("--format", "all", "--experts", 7, "--tokens", 1)
    assert "7 experts, " in text
    assert all(f"\n{name} " in text for name in ("format", *cpumoe.WEIGHT_FORMATS))
    assert f"vs {first}\n" in text
    assert max(map(len, text.splitlines())) <= 88
    assert f"vs {second}\n" in succeed("--format", f"{second},{first}", "--tokens", 1)


def test_compare_formats(small_model, tmp_path):
    first, second, *_ = cpumoe.WEIGHT_FORMATS
    old, arguments = tmp_path / "old.json", ("--experts", 7, "--tokens", 1)
    succeed(*arguments, "--format", first, "--json", old)
    document = json.loads(old.read_text())
    del document["rows"][0]["format"]  # as in reports of one format only
    old.write_text(json.dumps(document))
    said = run(*arguments, "--format", "all", "--compare", old)
    table = said.stdout.split("Compared with the earlier run")[1]
    assert first in table
    assert second not in table
    assert "differ in format" not in said.stderr
    other = succeed(*arguments, "--format", second, "--compare", old)
    assert f"none of these rows. Its format: {first}" in other


def test_plot_of_formats(small_model, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.svg"
    succeed("--format", "all", "--experts", 7, "--tokens", "1,2", "--plot", path)
    said = path.read_text()
    names = [f"{cpumoe.isa()}, bf16, {fmt}" for fmt in cpumoe.WEIGHT_FORMATS]
    assert all(f"<!-- {name} -->" in said for name in names)


def test_too_little_memory_for_all_formats(small_model, monkeypatch):
    experts = [
        LayerWeights.from_model(small_model, format=fmt).experts[0].nbytes
        for fmt in cpumoe.WEIGHT_FORMATS
    ]
    formats = ", ".join(cpumoe.WEIGHT_FORMATS)
    enough = 7 * sum(experts) + 7 * max(experts)
    arguments = ("--format", "all", "--experts", 7, "--tokens", 1)
    monkeypatch.setattr(benchmark, "available_bytes", lambda: enough)
    succeed(*arguments)
    monkeypatch.setattr(benchmark, "available_bytes", lambda: enough - 1)
    said = refuse(*arguments)
    assert f"7 experts in {formats}, packed once, need 0.0 GB of memory" in said
    assert "(6 fit)" in said
    number = len(cpumoe.supported_isas())
    if number > 1:
        said = refuse(*arguments, "--isa", "all")
        assert f"packed {number} times" in said
