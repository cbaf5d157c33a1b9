"""Which experts a layer holds: masks, memory that is given back and taken again, replicas."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoint_tools import a_call, first_layer, split_into_shards, write_small
from moe_tools import EVERY_VARIANT, inputs, layer, mask, output_with_torch, refused

import cpumoe
from cpumoe import CheckpointError, Experts, open_checkpoint

SIZES = {"layers": 2, "experts": 4}


@pytest.fixture(params=["v4-flash", "gpt-oss-20b", "kimi-k2"])
def folder(request, tmp_path):
    return write_small(tmp_path, request.param, **SIZES)


def test_changing_the_mask_back_gives_the_old_bits(folder):
    experts = Experts.from_checkpoint(folder, first_layer(folder))
    args, whole = a_call(), experts.nbytes
    results = {}
    for masked in ((), (0, 1), (2, 3), (0, 1, 2, 3)):
        experts.expert_mask = mask(*masked)
        results[masked] = experts(*args)
    experts.expert_mask = None
    assert experts.packed_experts == [0, 1, 2, 3]  # setting a mask evicts nothing
    for masked in ((2, 3), (0, 1, 2, 3), (0, 1), ()):
        experts.expert_mask = mask(*masked)
        experts.evict()
        assert experts.packed_experts == [i for i in range(4) if i not in masked]
        assert torch.equal(experts(*args), results[masked])
    assert experts.nbytes == whole
    experts.expert_mask = mask(1)
    experts.evict()
    assert experts.nbytes < whole
    experts.expert_mask = None
    assert torch.equal(experts(*args), results[()])
    assert experts.nbytes == whole


def test_masked_experts_need_not_be_packed_at_all(folder):
    number = first_layer(folder)
    whole = Experts.from_checkpoint(folder, number)
    part = Experts.from_checkpoint(
        folder, number, expert_mask=mask(0, 2), pack_masked=False, progress=False
    )
    args = a_call()
    assert part.packed_experts == [1, 3]
    whole.expert_mask = mask(0, 2)
    assert torch.equal(part(*args), whole(*args))
    part.pack([2])
    assert part.packed_experts == [1, 2, 3]
    part.expert_mask = whole.expert_mask = None
    assert torch.equal(part(*args), whole(*args))
    assert part.nbytes == whole.nbytes
    for expert in range(4):
        one, other = part.export(expert), whole.export(expert)
        assert torch.equal(one.down.codes, other.down.codes)
        assert (one.down_bias is None) == (other.down_bias is None)
        assert one.down_bias is None or torch.equal(one.down_bias, other.down_bias)


@EVERY_VARIANT
def test_a_layer_of_tensors_takes_weights_from_a_function(isa, fmt):
    weights = layer(fmt, bias=torch.bfloat16)
    whole = weights.pack(isa=isa)
    part = weights.pack(isa=isa, expert_mask=mask(1, 2), pack_masked=False)
    assert part.packed_experts == [0, 3]
    args = inputs(weights, tokens=7)
    with refused(
        ValueError,
        "expert 1 has no weights, and this layer was made from tensors or an iterable, which are "
        "not kept; call pack([1, 2], source) first",
    ):
        part.expert_mask = None
    assert part.expert_mask is not None
    part.pack([1, 2, 1], whole.export)
    part.expert_mask = None
    assert torch.equal(part(*args), whole(*args))
    part.pack()  # has nothing to do, so needs no source


def test_experts_that_have_weights_stay_as_they_are():
    weights, other = layer("mxfp4"), layer("mxfp4", seed=1)
    experts = weights.pack()
    expected = experts.export(2)
    experts.pack([2], other.pack().export)
    assert torch.equal(experts.export(2).gate.codes, expected.gate.codes)


def test_an_expert_unmasked_in_place_must_be_packed_first(folder):
    experts = Experts.from_checkpoint(folder, first_layer(folder), expert_mask=mask(3))
    args = a_call()
    experts.evict()
    experts(*args)
    experts.expert_mask[3] = False
    message = "expert 3 has no weights, but a token is routed to it; pack it first"
    with refused(ValueError, message):
        experts(*args)
    future = experts.submit(*args)
    with refused(ValueError, message):
        future.result()
    experts.pack()
    whole = Experts.from_checkpoint(folder, first_layer(folder))
    assert torch.equal(experts(*args), whole(*args))


def test_the_checkpoint_may_be_gone_and_come_back(tmp_path):
    source, shards = tmp_path / "source", tmp_path / "shards"
    shards.mkdir()
    split_into_shards(write_small(source, "v4-flash", **SIZES), shards, 2)
    number = first_layer(shards)
    experts = Experts.from_checkpoint(shards, number, expert_mask=mask(1, 2))
    args = a_call()
    old = experts(*args)
    experts.evict()
    moved = shards.rename(tmp_path / "moved")
    for change in (lambda: setattr(experts, "expert_mask", None), lambda: experts.pack([1])):
        with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
            change()
    assert experts.packed_experts == [0, 3]
    assert experts.expert_mask is not None
    assert torch.equal(experts(*args), old)
    moved.rename(shards)
    experts.expert_mask = None
    assert torch.equal(experts(*args), Experts.from_checkpoint(shards, number)(*args))


def test_a_checkpoint_that_has_changed_is_refused(tmp_path):
    folder = write_small(tmp_path, "v4-flash", **SIZES)
    number = first_layer(folder)
    with open_checkpoint(folder) as reader:
        layers = [Experts.from_checkpoint(given, number) for given in (folder, reader)]
    args = a_call()
    expected = layers[0](*args)
    file = folder / "model.safetensors"
    written = file.stat().st_mtime_ns
    for experts in layers:
        experts.expert_mask = mask(0, 1)
        experts.evict()
        os.utime(file, ns=(written, written + 10**9))
        with pytest.raises(CheckpointError, match=r"changed since the layer was made from it; "):
            experts.expert_mask = None
        assert experts.packed_experts == [2, 3]
        os.utime(file, ns=(written, written))
        experts.expert_mask = None
        assert torch.equal(experts(*args), expected)


def test_a_source_that_fails_half_way_changes_nothing():
    weights = layer("int4", experts=6)
    experts = weights.pack(expert_mask=mask(1, 2, 3, 4, experts=6), pack_masked=False)
    before, whole = experts.nbytes, weights.pack()

    def fails(expert):
        if expert == 4:
            raise OSError("the source is gone")
        return whole.export(expert)

    def damaged(expert):
        found = whole.export(expert)
        if expert == 4:
            found.up.scales[3] = float("nan")
        return found

    with refused(OSError, "the source is gone"):
        experts.pack(range(6), fails)
    with pytest.raises(ValueError, match=r"expert 4: up: scale \[3, 0\] is nan"):
        experts.pack(range(6), damaged)
    assert experts.packed_experts == [0, 5]
    assert experts.nbytes == before
    experts.pack(range(6), whole.export)
    experts.expert_mask = None
    args = inputs(weights, tokens=4)
    assert torch.equal(experts(*args), whole(*args))


def test_a_source_may_call_its_layer_but_not_change_it():
    weights = layer("mxfp4")
    experts = weights.pack(expert_mask=mask(1, 2), pack_masked=False)
    whole, args = weights.pack(), inputs(weights, tokens=2)
    changes = (
        lambda: experts.pack([2], whole.export),
        experts.evict,
        lambda: setattr(experts, "expert_mask", None),
    )
    for change in changes:

        def source(expert, change=change):
            change()
            return whole.export(expert)

        with pytest.raises(RuntimeError, match="a source that leaves its own layer alone"):
            experts.pack([1], source)
    experts.pack([1], lambda expert: (experts(*args), whole.export(expert))[1])
    assert experts.packed_experts == [0, 1, 3]


def test_errors_name_what_was_wrong():
    experts = layer("mxfp4").pack()
    with refused(IndexError, "experts: expected 0..3, got 4"):
        experts.pack([0, 4])
    with refused(TypeError, "experts: expected an int, got 'a'"):
        experts.pack("a")
    with refused(
        TypeError,
        "source: expected a function that returns the ExpertWeights of an expert, got str",
    ):
        experts.pack([0], "checkpoint")
    experts.expert_mask = mask(1)
    experts.evict()
    with refused(ValueError, "expert 1 has no weights to export; pack it first"):
        experts.export(1)


def test_no_call_sees_a_change_half_done():
    """Calls of several threads, while the mask changes and experts come and go."""
    weights = layer("mxfp4", experts=8, hidden=64, intermediate=64)
    masks = [mask(0, 1, 2, 3, experts=8), mask(4, 5, 6, 7, experts=8)]
    whole = weights.pack()
    args = inputs(weights, tokens=5, top_k=8)
    expected = [weights.pack(expert_mask=each)(*args) for each in masks]
    assert not torch.equal(*expected)
    experts = weights.pack(expert_mask=masks[0])
    ended = threading.Event()

    def use(submit: bool) -> None:
        calls = 0
        while not ended.is_set() or not calls:
            y = experts.submit(*args).result() if submit else experts(*args)
            assert any(torch.equal(y, each) for each in expected)
            calls += 1

    with ThreadPoolExecutor(3) as threads:
        callers = [threads.submit(use, i % 2 == 0) for i in range(3)]
        try:
            for i in range(60):
                following = masks[(i + 1) % 2].clone()  # the old mask's memory is freed
                experts.pack([e for e in range(8) if not following[e]], whole.export)
                experts.expert_mask = following
                experts.evict()
        finally:
            ended.set()
        for caller in callers:
            caller.result()


def test_evicting_half_of_the_experts_gives_their_memory_back():
    script = """
import os
import torch
from cpumoe import Experts

def stack(n, k):
    codes = torch.randint(256, (32, n, k // 2), dtype=torch.uint8)
    return codes, torch.full((32, n, k // 32), 127, dtype=torch.uint8)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

experts = Experts.from_tensors(
    gate=stack(1024, 2048), up=stack(1024, 2048), down=stack(2048, 1024), format="mxfp4"
)
experts.expert_mask = torch.arange(32) % 2 == 1
whole, before = experts.nbytes, resident()
experts.evict()
print(whole, experts.nbytes, before - resident())
"""
    whole, left, freed = (int(number) for number in output_with_torch(script).split())
    assert whole == 32 * 3 * 2048 * 1024 * 17 // 32
    assert left == whole // 2
    assert freed >= 0.95 * whole / 2


def test_a_forked_child_is_refused_even_while_its_parent_packs():
    script = """
import os
import torch
from cpumoe import Experts

def stack(n, k):
    return torch.zeros(2, n, k // 2, dtype=torch.uint8), torch.ones(2, n, k // 32).bfloat16()

def pack(**options):
    matrices = {name: stack(64, 64) for name in ("gate", "up", "down")}
    return Experts.from_tensors(**matrices, format="int4", **options)

def source(expert):
    child = os.fork()
    if child == 0:
        for change in (experts.evict, lambda: setattr(experts, "expert_mask", None)):
            try:
                change()
            except RuntimeError as error:
                if "a forked process may use" in str(error):
                    continue
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return whole.export(expert)

torch.set_num_threads(1)
whole = pack()
experts = pack(expert_mask=torch.tensor([False, True]), pack_masked=False)
experts.pack([1], source)
print(experts.packed_experts)
"""
    assert output_with_torch(script).splitlines() == ["0", "[0, 1]"]


def test_a_mask_that_moves_in_memory_is_followed():
    weights = layer("mxfp4")
    moving = mask(0)
    experts = weights.pack(expert_mask=moving)
    args = inputs(weights, tokens=6)
    moving.set_(mask(0, 1, 2, 3))
    assert not experts(*args).any()
    moving.set_(mask())
    assert torch.equal(experts(*args), weights.pack()(*args))


def test_more_or_fewer_experts_than_announced():
    weights = layer("mxfp4")
    whole = weights.pack()
    sizes = {"hidden_size": weights.hidden, "intermediate_size": 96, "format": "mxfp4"}
    for announced, got in ((5, 4), (3, "more")):
        with refused(ValueError, f"expected {announced} experts, got {got}"):
            Experts((whole.export(i) for i in range(4)), num_experts=announced, **sizes)


def test_the_bits_of_a_layer_do_not_depend_on_how_it_was_filled():
    weights = layer("int4", experts=5)
    args = inputs(weights, tokens=9, top_k=3)
    whole = weights.pack()
    with cpumoe.Runtime(1) as runtime:
        part = weights.pack(
            expert_mask=mask(*range(5), experts=5), pack_masked=False, runtime=runtime
        )
        assert part.packed_experts == []
        assert part.nbytes == 0
        for expert in (4, 0, 2, 3, 1):
            part.pack([expert], whole.export)
        part.expert_mask = None
        assert torch.equal(part(*args), whole(*args))
