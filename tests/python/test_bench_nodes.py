"""``cpumoe bench --nodes``: choices of NUMA nodes in one run, with nodes that are made up here."""

import copy
import json
import statistics

import bench_tools
import pytest
from node_tools import made_up_nodes

from cpumoe.cli import bench_compare

pytestmark = pytest.mark.filterwarnings("ignore:Runtime. . threads requested:RuntimeWarning")
SMALL = ("--experts", 4, "--tokens", "1,3")
# Without the option there is a runtime for all tests of this process, of the real machine.
AUTO = ("--nodes", "auto")
CHOICES = ("--nodes", "[0]", "--nodes", "0,1", "--nodes", "1")


@pytest.fixture(autouse=True)
def _nodes(monkeypatch, tmp_path):
    bench_tools.quicken(monkeypatch)
    bench_tools.use_small_model(monkeypatch)
    made_up_nodes(monkeypatch, tmp_path / "machine", [1, 2])


def test_choices_of_nodes_are_compared_with_the_first():
    document = bench_tools.measure(*SMALL, *CHOICES)
    rows, runtimes = document["rows"], document["machine"]["runtimes"]
    expected = [(m, nodes, n) for m in (1, 3) for nodes, n in (([0], 1), ([0, 1], 3), (None, 3))]
    assert [(row["tokens"], row["nodes"], row["threads"]) for row in rows] == expected
    assert [(each["threads"], len(each["nodes"])) for each in runtimes] == [(1, 1), (3, 2), (3, 0)]
    assert document["machine"]["threads"] == 3
    assert document["machine"]["placement"] == runtimes[1]["placement"]
    for index, row in enumerate(rows):
        first = rows[index - index % 3]
        pairs = zip(first["turns"], row["turns"], strict=True)
        ratios = [theirs["seconds"] / own["seconds"] for theirs, own in pairs]
        assert row["nodes_speed"] == pytest.approx(statistics.median(ratios))
        assert row["speed_ratio"] is None
        assert [each["node"] for each in row["by_node"]] == (row["nodes"] or [])


def test_each_node_is_compared_with_its_own_limits():
    document = bench_tools.measure(*SMALL, *AUTO)
    machine = document["machine"]
    (runtime,) = machine["runtimes"]
    nbytes = machine["placement"]["nbytes"]
    for row in document["rows"]:
        assert (row["nodes"], row["nodes_speed"]) == ([0, 1], None)
        assert row["local_share"] == machine["placement"]["local_share"]
        for index, each in enumerate(row["by_node"]):
            node, part = runtime["nodes"][index], nbytes[index] / sum(nbytes)
            assert each["node"] == node["node"] == index
            read = row["weight_bytes"] * part / node["bytes_per_second"] / row["seconds"]
            assert each["share_of_read_bandwidth"] == pytest.approx(read)
            dots = row["share_of_dot_peak"] * part / (node["threads"] / machine["threads"])
            assert each["share_of_dot_peak"] == pytest.approx(dots)
            assert each["share_of_bound"] == pytest.approx(max(read, dots))


def test_tables_of_nodes():
    text = bench_tools.succeed(*SMALL, *CHOICES)
    for part in ("\n[0] ", "\n0,1 ", "\n1 ", "vs [0]: time of --nodes [0] divided", "by node"):
        assert part in text
    assert "reads its own memory at " in text
    assert "(node 1) GB/s" in text
    assert max(map(len, text.splitlines())) <= 80
    alone = bench_tools.succeed(*SMALL, *AUTO)
    assert "by node: the greater share, of each node's own limits" in alone
    assert "vs [0]" not in alone
    assert max(map(len, alone.splitlines())) <= 80
    assert "its own memory" not in bench_tools.succeed(*SMALL, "--nodes", "1")


def test_compared_runs_have_the_same_nodes(tmp_path):
    old = tmp_path / "old.json"
    bench_tools.succeed(*SMALL, *CHOICES, "--json", old)
    table = bench_tools.succeed(*SMALL, "--nodes", "0,1", "--compare", old).split("Compared")[1]
    assert table.count(" 0,1 ") == 2
    assert "[0]" not in table
    document = json.loads(old.read_text())
    # Reports of one choice did not name it in their rows.
    one = copy.deepcopy(document)
    one["rows"] = [row for row in one["rows"] if row.pop("nodes") == [0, 1]]
    old.write_text(json.dumps(one))
    assert bench_compare.read(old)["rows"][0]["nodes"] == [0, 1]
    assert "new/old speed" in bench_tools.succeed(*SMALL, "--nodes", "1", "--compare", old)
    several = bench_tools.succeed(*SMALL, *CHOICES, "--compare", old).split("Compared")[1]
    assert several.count(" 0,1 ") == 2
    assert "[0]" not in several


def test_refusals(tmp_path):
    said = bench_tools.refuse(*SMALL, "--nodes", "auto", "--nodes", "0,1")
    assert "--nodes: expected different nodes, got auto and 0,1, which are the same" in said
    for other in ("--tune", "--write-back"):
        assert f"--nodes: {other} expects one value, got 3" in bench_tools.refuse(other, *CHOICES)
    pytest.importorskip("matplotlib")
    said = bench_tools.refuse(*CHOICES, "--plot", tmp_path / "roofline.svg")
    assert "--plot cannot be combined with several --nodes" in said
