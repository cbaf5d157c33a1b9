"""NUMA nodes, which are made up here: choice, threads, results, placement, errors."""

import os
import re
import warnings

import bench_tools
import pytest
import torch
from cli_tools import make_quick, read, succeed
from moe_tools import EVERY_FORMAT, inputs, layer, refused
from node_tools import CPUS, made_up_nodes, see_machine

import cpumoe
from cpumoe import Runtime, _core
from cpumoe._engine.nodes import Node, divide_threads, parse_nodes

pytestmark = pytest.mark.filterwarnings("ignore:Runtime. . threads requested:RuntimeWarning")


def node(number, cores):
    return Node(id=number, cpus=list(range(cores)), cores=list(range(cores)))


@pytest.mark.parametrize(
    ("threads", "cores", "expected"),
    [
        (8, [4, 4], [4, 4]),
        (7, [4, 4], [4, 3]),
        (6, [8, 4], [4, 2]),
        (12, [8, 4], [8, 4]),
        (24, [8, 4], [16, 8]),
        (2, [4, 4, 4], [1, 1, 0]),
        (2, [2, 8, 4], [0, 1, 1]),
        (1, [2, 2], [1, 0]),
        (5, [1, 1, 1, 1], [2, 1, 1, 1]),
        (192, [24] * 8, [24] * 8),
    ],
)
def test_threads_are_divided_in_proportion_to_cores(threads, cores, expected):
    nodes = [node(number, count) for number, count in enumerate(cores)]
    given = divide_threads(threads, nodes)
    assert [given.get(each, 0) for each in nodes] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), (" 1 ", 1), ("0,2", [0, 2]), ("[1]", [1]), ("[0, 2]", [0, 2])],
)
def test_texts_that_name_nodes(text, expected):
    assert parse_nodes(text, "--nodes") == expected


@pytest.mark.parametrize("text", ["", "all", "0", "2", "[", "[]", "1,", "-1,2", "[0;1]", "1 2"])
def test_texts_that_name_no_nodes(text):
    with pytest.raises(ValueError, match=r"^--nodes: expected auto, 1 for the whole machine as"):
        parse_nodes(text, "--nodes")


def test_a_machine_with_one_node_is_taken_as_before(monkeypatch, tmp_path):
    made_up_nodes(monkeypatch, tmp_path, [2])
    with Runtime() as runtime:
        assert runtime.nodes is None
        assert repr(runtime) == "Runtime(threads=2, pin=False)"
        placement = layer("mxfp4").pack(runtime=runtime).placement
        assert placement.nodes is None
        assert placement.local_share is None
        assert str(placement) == "not divided among NUMA nodes"


@pytest.mark.parametrize(
    ("options", "nodes", "threads"),
    [
        ({}, (0, 1, 2), 6),
        ({"nodes": "auto"}, (0, 1, 2), 6),
        ({"nodes": 1}, None, 6),
        ({"nodes": [2]}, (2,), 1),
        ({"nodes": [2, 0]}, (0, 2), 4),
        ({"threads": 3}, (0, 1, 2), 3),
        ({"threads": 2}, (0, 1), 2),
        ({"threads": 1}, None, 1),
        ({"threads": 1, "nodes": [1]}, (1,), 1),
        ({"pin": True}, (0, 1, 2), 6),
    ],
)
def test_what_runtimes_use(options, nodes, threads, monkeypatch, tmp_path):
    made_up_nodes(monkeypatch, tmp_path, [3, 2, 1])
    with Runtime(**options) as runtime:
        assert (runtime.nodes, runtime.threads) == (nodes, threads)
        assert sum(each.threads for each in runtime.core.nodes) == (threads if nodes else 0)
        assert (f"nodes={list(nodes)}" in repr(runtime)) if nodes else "nodes" not in repr(runtime)


def test_the_environment_variable_is_the_default(monkeypatch, tmp_path):
    made_up_nodes(monkeypatch, tmp_path, [2, 2])
    monkeypatch.setenv("CPUMOE_NODES", "[1]")
    with Runtime() as runtime, Runtime(nodes="auto") as both:
        assert (runtime.nodes, both.nodes) == ((1,), (0, 1))
    monkeypatch.setenv("CPUMOE_NODES", "1")
    with Runtime() as runtime:
        assert runtime.nodes is None
    monkeypatch.setenv("CPUMOE_NODES", "some")
    with pytest.raises(ValueError, match=r"^CPUMOE_NODES: expected auto, 1 for the whole machine"):
        Runtime()


def test_errors_name_what_is_wrong_with_the_nodes(monkeypatch, tmp_path):
    see_machine(monkeypatch, tmp_path, {0: CPUS[:1], 3: [CPUS[-1] + 1]})
    for nodes, kind, message in (
        ("both", ValueError, 'nodes: expected "auto", 1 for the whole machine as one node, or a'),
        (2, ValueError, 'nodes: expected "auto", 1 for the whole machine as one node, or a list'),
        (True, TypeError, "nodes"),
        (0.5, TypeError, "nodes"),
        ([], ValueError, "nodes: expected at least one node, got none"),
        ([0, 0], ValueError, "nodes: expected each node once, got [0, 0]"),
        (["0"], TypeError, "nodes"),
        ([0, -1], ValueError, "nodes: expected node numbers, which are 0 to 1023, got -1"),
        ([1 << 70], ValueError, "nodes: expected node numbers, which are 0 to 1023, got 11805916"),
        ([0, 1], ValueError, "CPUs and memory this process may use, [0, 3]; got [1]"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            Runtime(nodes=nodes)
    message = "Runtime: nodes: expected at most as many nodes as threads, 1, got [0, 3]"
    with refused(ValueError, message):
        Runtime(1, nodes=[0, 3])
    with refused(ValueError, "Runtime: cpus names the CPUs, so leave out nodes, or pass nodes=1"):
        Runtime(cpus=CPUS[:1], nodes=[0])


def test_threads_stay_on_the_cpus_of_their_node(monkeypatch, tmp_path):
    if len(CPUS) < 2:
        pytest.skip("needs two CPUs")
    see_machine(monkeypatch, tmp_path, {0: CPUS[:1], 4: CPUS[1:]})
    before = set(os.listdir("/proc/self/task"))
    with Runtime(3, nodes=[0, 4]) as runtime:
        weights = layer("mxfp4")
        experts = weights.pack(runtime=runtime)
        experts(*inputs(weights, tokens=3))
        new = set(os.listdir("/proc/self/task")) - before
        masks = sorted(sorted(os.sched_getaffinity(int(task))) for task in new)
        first, second = (each.threads for each in runtime.core.nodes)
    # The driver is the first thread of node 0.
    assert masks == sorted([*[CPUS[:1]] * first, *[CPUS[1:]] * second])


def test_named_cpus_are_grouped_by_node(monkeypatch, tmp_path):
    if len(CPUS) < 2:
        pytest.skip("needs two CPUs")
    see_machine(monkeypatch, tmp_path, {1: [CPUS[-1]], 2: CPUS[:-1]})
    weights = layer("mxfp4")
    args = inputs(weights, tokens=3)
    with Runtime(cpus=CPUS) as runtime, Runtime(cpus=CPUS, nodes=1) as other:
        assert runtime.nodes == (1, 2)
        assert runtime.threads == len(CPUS)
        assert other.nodes is None
        divided = weights.pack(runtime=runtime)
        assert torch.equal(divided(*args), weights.pack(runtime=other)(*args))


@EVERY_FORMAT
@pytest.mark.parametrize("threads", [[1, 1], [2, 1, 1], [1, 1, 3, 1]], ids=str)
def test_results_and_exports_are_those_of_one_node(fmt, threads, monkeypatch, tmp_path):
    weights = layer(fmt, hidden=160, intermediate=96)
    with Runtime(2, nodes=1) as one:
        made_up_nodes(monkeypatch, tmp_path, threads)
        with Runtime() as runtime:
            assert runtime.nodes == tuple(range(len(threads)))
            whole, divided = weights.pack(runtime=one), weights.pack(runtime=runtime)
            assert divided.placement.nodes == runtime.nodes
            assert sum(divided.placement.nbytes) == divided.nbytes
            for tokens in (1, 20):
                args = inputs(weights, tokens=tokens)
                expected = whole(*args)
                assert torch.equal(divided(*args), expected)
                assert torch.equal(divided.submit(*args).result(), expected)
                divided.runtime = one
                assert torch.equal(divided(*args), expected)
                divided.runtime = runtime
            exported, original = divided.export(1), whole.export(1)
            for name in ("gate", "up", "down"):
                mine, theirs = getattr(exported, name), getattr(original, name)
                assert torch.equal(mine.codes, theirs.codes)
            divided.expert_mask = torch.ones(weights.num_experts, dtype=torch.bool)
            divided.evict()
            assert divided.nbytes == 0


def test_dense_layers_are_divided_as_well(monkeypatch, tmp_path):
    made_up_nodes(monkeypatch, tmp_path, [1, 2])
    module = torch.nn.Linear(96, 200, dtype=torch.bfloat16)
    x = torch.randn(7, 96, dtype=torch.bfloat16)
    with Runtime() as runtime, Runtime(nodes=1) as one:
        divided = cpumoe.Linear.from_module(module, runtime=runtime)
        whole = cpumoe.Linear.from_module(module, runtime=one)
        assert torch.equal(divided(x), whole(x))
        assert divided.placement.nodes == (0, 1)
        assert whole.placement.nodes is None


def test_placement_says_which_pages_lie_where(monkeypatch, tmp_path):
    real = _core.topology().nodes[0].memory_node
    see_machine(monkeypatch, tmp_path, {real: CPUS})
    with Runtime(nodes=[real]) as runtime:
        placement = layer("mxfp4", hidden=256, intermediate=256).pack(runtime=runtime).placement
    assert placement.nodes == (real,)
    if placement.bound and placement.local_share is not None:
        assert placement.local_share >= 0.99
        assert str(placement).startswith(f"NUMA nodes {real}, bound to them; pages on their node: ")


def test_nodes_that_the_system_does_not_have_get_memory_by_first_touch(monkeypatch, tmp_path):
    see_machine(monkeypatch, tmp_path, {900: CPUS[:1], 901: [CPUS[-1] + 1]})
    weights = layer("mxfp4")
    with Runtime() as runtime, warnings.catch_warnings():
        warnings.simplefilter("error")
        experts = weights.pack(runtime=runtime)
        placement = experts.placement
        assert (placement.nodes, placement.bound) == ((900, 901), False)
        assert "by first touch" in str(placement)
        experts(*inputs(weights, tokens=2))


def test_bench_says_where_weights_lie(monkeypatch, tmp_path):
    bench_tools.quicken(monkeypatch)
    bench_tools.use_small_model(monkeypatch)
    made_up_nodes(monkeypatch, tmp_path, [1, 1, 1])
    small = ("--experts", 4, "--tokens", "1")
    machine = bench_tools.measure(*small, "--nodes", "0,2")["machine"]
    assert machine["threads"] == 2
    assert machine["placement"]["nodes"] == [0, 2]
    assert sum(machine["placement"]["nbytes"]) > 0
    assert bench_tools.measure(*small, "--nodes", "1")["machine"]["placement"] is None
    assert "NUMA nodes 0, 1, 2, " in bench_tools.succeed(*small, "--nodes", "auto")
    assert "--nodes: expected auto, 1 for the whole machine" in bench_tools.refuse("--nodes", "7")
    assert "this process may use, [0, 1, 2]; got [7]" in bench_tools.refuse("--nodes", "[7]")


def test_info_shows_nodes(monkeypatch, tmp_path):
    make_quick(monkeypatch.setattr)
    made_up_nodes(monkeypatch, tmp_path, [1, 1])
    cpumoe.default_runtime().close()
    try:
        document = read("info")
        text = succeed("info")
    finally:
        cpumoe.default_runtime().close()
    nodes = document["cpu"]["numa_nodes"]
    assert [node["id"] for node in nodes] == [0, 1]
    assert [(node["cores"], node["memory_bytes"]) for node in nodes] == [(1, 4 << 30)] * 2
    bandwidth = document["nodes_bandwidth"]
    assert bandwidth["nodes"] == [0, 1]
    assert all(rate > 0 for row in bandwidth["bytes_per_second"] for rate in row)
    assert document["placement"]["nodes"] == [0, 1]
    assert "NUMA nodes 0, 1, " in text
    assert "GB/s from 1" in text
    assert "4 GiB" in text
