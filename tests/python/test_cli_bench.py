"""``cpumoe bench`` with toy sizes: its output and its errors, not its results."""

import copy
import dataclasses
import json
import statistics

import pytest
import torch
from bench_tools import HIDDEN, INNER, measure, quicken, refuse, run, succeed, use_small_model
from checkpoint_tools import SMALL, write_small
from moe_tools import BF16_PRECISIONS

import cpumoe
from cpumoe import _core, models, reference
from cpumoe.cli import bench_compare
from cpumoe.formats import QuantizedMatrix
from cpumoe.measure import benchmark, limits, tuning
from cpumoe.measure.timing import Limit, Timing, Turn, Variant
from cpumoe.measure.tuning import Comparison, Crossover, Form
from cpumoe.models.synth import random_matrix

EXPERTS, TOP_K = 4, 2


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch)


@pytest.fixture(scope="module")
def v4(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("v4"), "v4-flash")


@pytest.fixture
def small_model(monkeypatch):
    return use_small_model(monkeypatch)


def test_checkpoint(v4):
    document = measure("--model", v4, "--tokens", "1,3", "--isa", "all", "--precision", "all")
    isas = cpumoe.supported_isas()
    rows = document["rows"]
    expected = [(isa, each, m) for isa in isas for each in BF16_PRECISIONS for m in (1, 3)]
    assert [(row["isa"], row["precision"], row["tokens"]) for row in rows] == expected
    settings = document["settings"]
    assert (settings["experts"], settings["top_k"]) == (SMALL["experts"], SMALL["top_k"])
    assert (settings["routing"], settings["format"]) == ("balanced", "mxfp4")
    assert {peak["isa"] for peak in document["machine"]["dot_peaks"]} == set(isas)
    assert document["machine"]["read_bandwidth"]["bytes_per_second"] > 0
    assert document["machine"]["versions"]["torch"] == torch.__version__


def test_rows_add_up(v4):
    document = measure("--model", v4, "--tokens", 5, "--routing", "concentrated", "--threads", 1)
    (row,) = document["rows"]
    machine = document["machine"]
    assert row["low"] <= row["seconds"] <= row["high"]
    assert row["rounds"] == len(row["turns"]) == 2
    medians = [turn["seconds"] for turn in row["turns"]]
    assert (min(medians), max(medians)) == (row["low"], row["high"])
    assert row["calls"] >= 2
    assert row["touched_experts"] == SMALL["top_k"]
    assert row["macs"] == 5 * 2 * 3 * SMALL["hidden"] * SMALL["intermediate"]
    assert row["tokens_per_second"] == pytest.approx(5 / row["seconds"])
    assert row["flops_per_second"] == pytest.approx(2 * row["macs"] / row["seconds"])
    read, (peak,) = machine["read_bandwidth"], machine["dot_peaks"]
    of_read, of_dots = [], []
    for turn in row["turns"]:
        assert len(turn["bytes_per_second"]) == len(turn["macs_per_second"]) == 2
        of_read.append(row["weight_bytes"] / max(turn["bytes_per_second"]) / turn["seconds"])
        of_dots.append(row["macs"] / max(turn["macs_per_second"]) / turn["seconds"])
    assert row["share_of_read_bandwidth"] == pytest.approx(statistics.median(of_read))
    assert row["share_of_dot_peak"] == pytest.approx(statistics.median(of_dots))
    for limit, rate in ((read, "bytes_per_second"), (peak, "macs_per_second")):
        values = [value for turn in row["turns"] for value in turn[rate]]
        assert (limit["least"], limit[rate]) == (min(values), max(values))
    both = row["share_of_read_bandwidth"], row["share_of_dot_peak"]
    assert row["share_of_bound"] == max(both)
    assert row["bound"] == ("memory" if both[0] >= both[1] else "arithmetic")
    assert machine["threads"] == 1
    assert row["relative_l2"] is None


def test_table(v4):
    text = succeed("--model", v4, "--tokens", "1,2", "--isa", "all", "--batch-invariant")
    only = "" if len(cpumoe.supported_isas()) > 1 else f"{cpumoe.isa()}, "
    assert f"3 mxfp4 experts, {only}bf16" in text
    assert "batch-invariant" in text
    assert all(isa in text for isa in cpumoe.supported_isas())
    alone = succeed("--model", v4, "--tokens", "1")
    assert f"3 mxfp4 experts, {cpumoe.isa()}, bf16" in alone


@pytest.mark.parametrize("fmt", cpumoe.WEIGHT_FORMATS)
def test_made_up_weights(fmt, small_model):
    document = measure("--model", "v4", "--format", fmt, "--experts", 7, "--tokens", 2)
    settings = document["settings"]
    assert (settings["format"], settings["experts"], settings["top_k"]) == (fmt, 7, 6)
    assert settings["hidden_size"] == HIDDEN


def test_made_up_weights_have_the_chosen_scales(small_model):
    options = ("--model", "v4", "--experts", 7, "--tokens", 2)
    chosen = (*options, "--format", "int4", "--scales", "fp16", "--group", "row")
    document, usual = measure(*chosen), measure(*options, "--format", "int4")
    settings = document["settings"]
    assert (settings["scales"], settings["group"]) == ("fp16", "row")
    assert (usual["settings"]["scales"], usual["settings"]["group"]) == (None, None)
    both = [each["rows"][0] for each in (document, usual)]
    wide, narrow = (row["weight_bytes"] / row["touched_experts"] for row in both)
    assert wide > 1.05 * narrow
    assert "7 int4 experts, scales fp16, group row, " in succeed(*chosen)
    assert {name for name, *_ in bench_compare.differences(usual, document)} >= {"scales", "group"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scales", "fp64"), "--scales: expected one of bf16, fp16, fp32, e8m0, got 'fp64'"),
        (("--group", "0"), "--group: expected row or a positive number of weights, got '0'"),
        (("--group", "many"), "--group: expected row or a positive number of weights"),
        (("--scales", "fp16"), "mxfp4: scales: expected float8_e8m0fnu or uint8, got float16"),
        (("--format", "int4", "--group", "48"), "int4: weights that share a scale: expected"),
        (("--format", "all", "--scales", "fp16"), "mxfp4: scales: expected float8_e8m0fnu"),
    ],
)
def test_scales_that_a_format_does_not_have_are_refused(arguments, message, small_model):
    assert message in refuse("--model", "v4", "--tokens", 1, *arguments)


def test_a_folder_has_scales(v4):
    message = "--scales and --group: {} is a folder, whose weights have scales; name a model"
    assert message.format(v4) in refuse("--model", v4, "--scales", "fp16")


def test_a_variant_without_a_peak(v4, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_dot_peak", lambda *_args, **_seconds: None)
    document = measure("--model", v4, "--tokens", 1)
    (row,) = document["rows"]
    assert (row["share_of_dot_peak"], row["bound"]) == (None, "memory")
    assert document["machine"]["dot_peaks"] == []
    assert row["turns"][0]["macs_per_second"] is None
    assert "unknown" in succeed("--model", v4, "--tokens", 1)


def test_compare(v4, tmp_path):
    old = tmp_path / "old.json"
    arguments = ("--model", v4, "--tokens", "1,2")
    assert f"wrote {old}" in succeed(*arguments, "--json", old).replace("\n", "")
    assert "new/old speed" in succeed(*arguments, "--compare", old)
    document = json.loads(old.read_text().replace('"precision"', '"compute"'))
    document["version"] = 1  # still compared
    document["rows"][0].update(seconds=1e3, low=1e3, high=1e3)
    document["rows"][1].update(seconds=1e-9, low=1e-9, high=1e-9)
    old.write_text(json.dumps(document))
    assert "name a file for --json" in refuse(*arguments, "--compare", old, "--json", "-")
    text = succeed(*arguments, "--compare", old)
    assert text.index("faster") < text.index("slower")
    assert "none of these rows" in succeed("--model", v4, "--tokens", 3, "--compare", old)
    other = run("--model", v4, "--tokens", 1, "--routing", "zipf", "--compare", old)
    assert "the runs differ in routing: balanced then, zipf now" in other.stderr


def test_a_changed_machine_is_named():
    machine = {
        "cpu": "a",
        "threads": 2,
        "read_bandwidth": {"bytes_per_second": 3e10},
        "dot_peaks": [{"isa": "x", "precision": "bf16", "macs_per_second": 1e11}],
    }
    old = {"settings": {"experts": 64, "seconds": 1}, "machine": machine}
    new = copy.deepcopy(old)
    new["settings"]["seconds"] = 2
    new["machine"]["dot_peaks"][0]["macs_per_second"] = 0.9e11
    assert bench_compare.differences(old, new) == []
    new["machine"]["read_bandwidth"]["bytes_per_second"] = 2e10
    new["machine"]["threads"] = 4
    assert bench_compare.differences(old, new) == [
        ("threads", 2, 4),
        ("memory read, GB/s", "30", "20"),
    ]


def test_tune(v4, tmp_path):
    arguments = ("--tune", "--model", v4, "--isa", "all")
    document = measure(*arguments)
    assert document["settings"]["experts"] == SMALL["experts"]
    crossovers = {row["isa"]: row for row in document["crossovers"]}
    assert list(crossovers) == cpumoe.supported_isas()
    for isa, found in crossovers.items():
        constants = _core.few_tokens(isa, "tests", "mxfp4")
        for name, count in (("compiled_in", constants.crossover), ("most", constants.most)):
            assert found[name] == (None if count == tuning.ANY_TOKENS else count)
        rows = found["rows"]
        counts = [row["tokens"] for row in rows]
        assert counts == [tokens for tokens in tuning.TOKENS if tokens <= constants.most]
        assert found["best"] in (0, *counts)
        for row in rows:
            assert (
                row["few_token"]["low"] <= row["few_token"]["seconds"] <= row["few_token"]["high"]
            )
            ratio = row["few_token"]["seconds"] / row["many_token"]["seconds"]
            assert row["ratio"] == pytest.approx(ratio)
    path = tmp_path / "tune.json"
    text = succeed(*arguments, "--json", path)
    assert all(f"{isa}: few-token" in text for isa in crossovers)
    assert text.count("best crossover: ") == len(crossovers)
    assert json.loads(path.read_text()).keys() == document.keys()
    assert "expected a file that cpumoe bench --json wrote" in refuse("--compare", path)


def test_write_back(v4, tmp_path):
    path = tmp_path / "write_back.json"
    arguments = ("--write-back", "--model", v4, "--isa", "all")
    text = succeed(*arguments, "--json", path)
    assert all(isa in text for isa in cpumoe.supported_isas())
    assert "memory copy" in text
    document = json.loads(path.read_text())
    assert document.keys() == measure(*arguments).keys()
    copy = document["machine"]["copy_bandwidth"]
    assert [row["isa"] for row in document["rows"]] == cpumoe.supported_isas()
    weights = 3 * SMALL["hidden"] * SMALL["intermediate"]
    for row in document["rows"]:
        # Codes and E8M0 scales are read; codes and bf16 scales are written.
        assert row["bytes"] == weights // 2 * 2 + weights // 32 * 3
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["low"] <= row["seconds"] <= row["high"]
        assert row["calls"] >= len(row["turns"]) == 2
        shares = [
            row["bytes"] / max(turn["copy_bytes_per_second"]) / turn["seconds"]
            for turn in row["turns"]
        ]
        assert row["share_of_copy_bandwidth"] == pytest.approx(statistics.median(shares))
        for turn in row["turns"]:
            values = turn["copy_bytes_per_second"]
            assert copy["least"] <= min(values) <= max(values) <= copy["bytes_per_second"]


@pytest.mark.parametrize("fmt", [name for name in cpumoe.WEIGHT_FORMATS if name != "mxfp4"])
def test_write_back_of_made_up_weights(fmt, small_model):
    row = measure("--write-back", "--experts", EXPERTS, "--format", fmt)["rows"][0]
    weights = random_matrix(cpumoe.weight_format(fmt), HIDDEN, INNER, "random", torch.Generator())
    assert row["bytes"] == 2 * 3 * weights.nbytes


def test_write_back_refusals(v4):
    assert "--tokens cannot be combined with --write-back" in refuse("--write-back", "--tokens", 1)
    assert "--write-back cannot be combined with --tune" in refuse("--write-back", "--tune")
    assert "--batch-invariant cannot be combined" in refuse("--write-back", "--batch-invariant")
    assert "--write-back expects one precision" in refuse(
        "--write-back", "--model", v4, "--precision", "all"
    )


def test_tune_refusals(v4, monkeypatch):
    assert "--tokens cannot be combined with --tune" in refuse("--tune", "--tokens", 1)
    for other in ("--tune", "--write-back"):
        said = refuse(other, "--format", "all")
        assert f"--format: {other} expects one format, got 'all'" in said
    assert "--routing cannot be combined with --tune" in refuse("--tune", "--routing", "zipf")
    assert "--tune expects bf16, got 'int8'" in refuse(
        "--tune", "--model", v4, "--precision", "all"
    )
    monkeypatch.setattr(benchmark, "available_bytes", lambda: 1000)
    assert "ask for fewer experts" in refuse("--tune", "--model", v4)


def comparison(tokens, few, many):
    return Comparison(tokens, Form(few, few, few), Form(many, 0.9 * many, 1.1 * many))


def test_the_best_crossover_loses_least():
    ratios = {0: [1.5, 2.0], 1: [0.5, 1.1], 3: [0.5, 1.01, 0.8, 1.2], 2: [0.9, 0.9]}
    for best, few in ratios.items():
        rows = [comparison(n, ms, 1.0) for n, ms in enumerate(few, 1)]
        assert Crossover("avx2", 2, 4, rows).best == best
    assert comparison(1, 0.8, 1.0).faster == "few-token"
    assert comparison(1, 0.95, 1.0).faster is None
    assert comparison(1, 1.2, 1.0).faster == "many-token"


def test_plot(v4, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--model", v4, "--tokens", "1,2", "--isa", "all", "--plot")
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"roofline{suffix}"
        succeed(*arguments, path)
        assert path.read_bytes().startswith(start)


def test_plot_without_matplotlib(v4, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    said = refuse("--model", v4, "--plot", tmp_path / "a.png")
    assert '--plot needs matplotlib, which is not installed: pip install "cpumoe[plot]"' in said


def write_arrays(folder, tokens):
    """Plain arrays of a small layer, with the result of the reference implementation."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    matrices = {}

    def write(name, tensor):
        tensor.contiguous().numpy().tofile(folder / name)

    for name, (n, k) in shapes.items():
        codes = torch.randint(0, 256, (EXPERTS, n, k // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(
            118, 121, (EXPERTS, n, k // 32), dtype=torch.uint8, generator=generator
        )
        matrices[name] = QuantizedMatrix(codes, scales)
        write(f"{name}.q", codes)
        write(f"{name}.s", scales)
    for count in tokens:
        x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
        ids = torch.rand(2, count, EXPERTS, generator=generator).topk(TOP_K).indices.int()
        weights = torch.rand(count, TOP_K, generator=generator)
        write(f"x_{count}", x.float())
        write(f"ids_{count}", ids)
        write(f"rw_{count}", weights)
        exact = reference.experts_forward(x, ids[0], weights, **matrices, format="mxfp4")
        write(f"ref_{count}", exact.float())


def test_data(small_model, tmp_path):
    write_arrays(tmp_path, (1, 5))
    (tmp_path / "ref_1").unlink()
    document = measure("--data", tmp_path)
    settings = document["settings"]
    assert (settings["experts"], settings["top_k"], settings["routing"]) == (EXPERTS, TOP_K, "data")
    one, five = document["rows"]
    assert (one["tokens"], one["relative_l2"]) == (1, None)
    assert 0 < five["relative_l2"] < 5e-3
    assert "rel. L2" in succeed("--data", tmp_path, "--tokens", 5)


def test_ids_of_other_hosts_are_not_counted(small_model, tmp_path):
    write_arrays(tmp_path, (1,))
    torch.tensor([[[0, EXPERTS]]], dtype=torch.int32).numpy().tofile(tmp_path / "ids_1")
    (row,) = measure("--data", tmp_path)["rows"]
    assert (row["touched_experts"], row["macs"]) == (1, 3 * HIDDEN * INNER)


def test_data_refusals(small_model, tmp_path):
    assert "no such folder of plain arrays" in refuse("--data", tmp_path / "nowhere")
    assert "no calls" in refuse("--data", tmp_path)
    write_arrays(tmp_path, (1,))
    assert "--routing cannot be combined with --data" in refuse(
        "--data", tmp_path, "--routing", "zipf"
    )
    assert "--experts cannot be combined with --data" in refuse("--data", tmp_path, "--experts", 2)
    assert "ids_9: no such file" in refuse("--data", tmp_path, "--tokens", 9)
    up = tmp_path / "up.s"
    up.write_bytes(up.read_bytes()[:-1])
    assert f"expected {EXPERTS * INNER * HIDDEN // 32} bytes" in refuse("--data", tmp_path)
    (tmp_path / "down.q").unlink()
    up.write_bytes(bytes(EXPERTS * INNER * HIDDEN // 32))
    assert "down.q: no such file" in refuse("--data", tmp_path)


@pytest.mark.parametrize(
    ("expert", "message"), [(EXPERTS + 1, "-1 to 4, got 5"), (-1, "got skipped ones only")]
)
def test_ids_of_no_expert_are_refused(small_model, tmp_path, expert, message):
    write_arrays(tmp_path, (1,))
    torch.full((1, 1, TOP_K), expert, dtype=torch.int32).numpy().tofile(tmp_path / "ids_1")
    assert message in refuse("--data", tmp_path)


def test_refusals(v4, tmp_path):
    assert "--model: --data needs a model's name" in refuse("--data", tmp_path, "--model", v4)
    assert "unknown ISA" in refuse("--isa", "avx9000")
    assert "--routing: expected one of balanced, concentrated, zipf" in refuse("--routing", "x")
    assert "--tokens: expected positive integers" in refuse("--tokens", "1,x")
    assert "--tokens: expected positive integers" in refuse("--tokens", "0")
    assert "--precision: expected one of all, auto, bf16, " in refuse("--precision", "fp64")
    for seconds in ("inf", "nan", -1):
        assert "--seconds: expected 0 to 86400, got " in refuse("--seconds", seconds)
    for wrong in ("fp9", "mxfp4,fp9", "all,mxfp4", ""):
        said = refuse("--format", wrong)
        assert "--format: expected all, or one or more of mxfp4, int4" in said
        assert f"got {wrong!r}" in said
    assert "no such folder, and unknown model 'nonsense'" in refuse("--model", "nonsense")
    for other in ("int4", "all"):
        said = refuse("--model", v4, "--format", other)
        assert f"is mxfp4, got {other!r}; name a model instead of a folder" in said
    assert "--plot: expected a name that ends in .png" in refuse("--plot", "roofline.gif")
    assert "nowhere does not exist" in refuse("--json", tmp_path / "nowhere" / "a.json")
    assert "expected a file to write, got a folder" in refuse("--json", tmp_path)
    assert "no such file" in refuse("--compare", tmp_path / "old.json")
    old = tmp_path / "old.json"
    for text, message in (
        ("{", "expected JSON"),
        ("[]", "bench --json wrote"),
        ("{}", "bench --json wrote"),
    ):
        old.write_text(text)
        assert message in refuse("--compare", old)


def test_models_in_other_formats_need_a_format(small_model, monkeypatch):
    spec = dataclasses.replace(small_model, weight_format="awq")
    monkeypatch.setattr(models, "find_model", lambda _name: spec)
    said = refuse("--model", "v4")
    assert "is awq, which is not supported; name one of mxfp4, int4" in said
    succeed("--model", "v4", "--format", "int4", "--tokens", 1)


def test_too_little_memory(v4, monkeypatch):
    monkeypatch.setattr(benchmark, "available_bytes", lambda: 1000)
    assert "ask for fewer experts (0 fit), formats, variants or nodes" in refuse("--model", v4)


def test_a_turn_is_compared_with_the_limits_beside_it():
    def timing(*turns):
        turns = [Turn(s, (read, read / 2), dots and (0.9 * dots, dots)) for s, read, dots in turns]
        variant = Variant("avx2", "bf16")
        return Timing(variant, "mxfp4", 1, 1.0, turns, 3, 6.0, weight_bytes=40.0, macs=80.0)

    steady = (1.0, 50.0, 100.0)
    slowed = (2.0, 25.0, 50.0)  # by a neighbour
    worse = (2.0, 50.0, 100.0)
    assert timing(steady).share_of_read == timing(steady).share_of_dots == 0.8
    assert timing(steady, slowed, worse).share_of_dots == 0.8
    assert timing(worse, slowed, worse).share_of_read == 0.4
    assert timing((1.0, 50.0, None)).share_of_dots is None
    assert timing(steady, slowed).spread == 1.0


def test_limits_are_measured_once_between_turns(v4, monkeypatch):
    reads = []
    measure_once = limits.MemoryReader.measure
    monkeypatch.setattr(
        limits.MemoryReader,
        "measure",
        lambda reader, **seconds: reads.append(measure_once(reader, **seconds)) or reads[-1],
    )
    document = measure("--model", v4, "--tokens", "1,2")
    values = [read.bytes_per_second for read in reads]
    turns = [row["turns"] for row in document["rows"]]
    # The first row goes first in the first round, the second one in the second.
    order = [turns[0][0], turns[1][0], turns[1][1], turns[0][1]]
    assert [turn["bytes_per_second"] for turn in order] == [values[i : i + 2] for i in range(4)]
    assert len(values) == 5


def test_one_round(v4):
    (row,) = measure("--model", v4, "--tokens", 1, "--rounds", 1)["rows"]
    assert row["rounds"] == 1
    assert row["spread"] == 0


def test_a_limit_that_moved_is_not_steady():
    assert [Limit(100, least).steady for least in (100, 86, 84)] == [True, True, False]
