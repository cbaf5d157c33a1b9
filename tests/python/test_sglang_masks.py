"""Which experts SGLang's GPU has: masks that change, memory that is given back, frequencies."""

import copy
import gc
import os
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_tools import write_small
from moe_tools import PEAK_MEMORY, output_with_torch, refused
from sglang_tools import (
    EXPERTS,
    assert_close,
    batch,
    checkpoint,
    gpu,
    loaded,
    oracle,
    run,
)

from cpumoe import CheckpointError
from cpumoe.integrations.sglang.kt_kernel import generate_gpu_experts_masks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("v4"))


def test_a_mask_may_change_between_calls(folder):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1, 2, 3))
    args = batch(32)
    masks = [gpu(4, 5, 6, 7), gpu(), gpu(*range(EXPERTS)), gpu(0, 2), gpu(0, 1, 2, 3)]
    for mask in masks:
        wrapper.gpu_experts_mask.copy_(mask)
        assert_close(run(wrapper, args), oracle(folder, args, mask=mask))
        packed = wrapper._layer.experts.packed_experts
        assert packed == [i for i in range(EXPERTS) if not mask[i]]


def test_a_call_has_the_mask_of_its_submit(folder):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1))
    args = batch(300)
    for _ in range(5):
        for mask, other in ((gpu(0, 1), gpu(5)), (gpu(5), gpu(0, 1))):
            wrapper.submit_forward(*args, None)
            wrapper.gpu_experts_mask.copy_(other)
            result = wrapper.sync_forward(args.hidden_states, None)
            assert_close(result, oracle(folder, args, mask=mask))


# A CUDA graph that runs after the change makes no call that could load experts.
def test_a_change_of_the_mask_loads_experts_before_it_returns(folder):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1, 2, 3))
    experts = wrapper._layer.experts
    mask = wrapper.gpu_experts_mask
    for change, expected in [
        (lambda: mask.copy_(gpu(4, 5)), [0, 1, 2, 3, 6, 7]),
        (lambda: mask.fill_(True), []),
        (lambda: mask.__setitem__(3, False), [3]),
        (lambda: torch.logical_not(mask, out=mask), [0, 1, 2, 4, 5, 6, 7]),
        (lambda: setattr(wrapper, "gpu_experts_mask", gpu(7)), [0, 1, 2, 3, 4, 5, 6]),
    ]:
        change()
        assert experts.packed_experts == expected
    for own in (mask & gpu(7), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert type(own) is torch.Tensor
        assert torch.equal(own, gpu(7))


def test_a_mask_outlives_its_layer(folder):
    mask = loaded(folder, gpu_experts_mask=gpu(0, 1)).gpu_experts_mask
    gc.collect()
    assert torch.equal(mask.logical_not_(), gpu(2, 3, 4, 5, 6, 7))


def test_a_mask_may_be_replaced(folder):
    wrapper = loaded(folder)
    wrapper.gpu_experts_mask = gpu(3, 4)
    args = batch(32)
    assert_close(run(wrapper, args), oracle(folder, args, mask=gpu(3, 4)))


@pytest.mark.parametrize("in_place", [False, True], ids=["assigned", "in place"])
def test_other_threads_may_call_while_the_mask_changes(folder, in_place):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1, 2, 3))
    masks = [gpu(4, 5, 6, 7), gpu(0, 1, 2, 3)]
    args = batch(8)
    expected = []
    for mask in masks:
        wrapper.gpu_experts_mask = mask
        expected.append(run(wrapper, args))
    assert not torch.equal(*expected)
    ended = threading.Event()

    def call():
        calls = 0
        while not ended.is_set() or not calls:
            result = run(wrapper, args)
            assert any(torch.equal(result, each) for each in expected)
            calls += 1

    with ThreadPoolExecutor(1) as caller:
        calls = caller.submit(call)
        try:
            for turn in range(60):
                if in_place:
                    wrapper.gpu_experts_mask.copy_(masks[turn % 2])
                else:
                    wrapper.gpu_experts_mask = masks[turn % 2]
        finally:
            ended.set()
        calls.result()


def test_a_mask_whose_experts_cannot_be_read_is_not_taken(tmp_path):
    folder = checkpoint(tmp_path)
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1))
    args = batch(8)
    old = run(wrapper, args)
    file = folder / "model.safetensors"
    written = file.stat().st_mtime_ns
    os.utime(file, ns=(written, written + 10**9))
    for change in (
        lambda: setattr(wrapper, "gpu_experts_mask", gpu()),
        lambda: wrapper.gpu_experts_mask.zero_(),
    ):
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            change()
        assert torch.equal(wrapper.gpu_experts_mask, gpu(0, 1))
        assert torch.equal(run(wrapper, args), old)
    # The remedy: load the weights again.
    wrapper.load_weights()
    wrapper.gpu_experts_mask = gpu()
    assert_close(run(wrapper, args), oracle(folder, args))


AFTER_FORK = """
import os, sys, traceback
import torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from sglang_tools import assert_close, batch, loaded, oracle, run

folder = Path(sys.argv[1])
args = batch(4)
expected = run(loaded(folder), args)
child = os.fork()
if child == 0:
    try:
        assert torch.equal(run(loaded(folder), args), expected)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_may_load_layers_of_its_own(folder):
    assert output_with_torch(AFTER_FORK, str(folder), str(Path(__file__).parent)).strip() == "0"


MEMORY = """
import sys
import torch
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper

def load(gpu_experts):
    wrapper = KTMoEWrapper(
        layer_idx=0, num_experts=32, num_experts_per_tok=6, hidden_size=2048,
        moe_intermediate_size=1024, weight_path=sys.argv[1], method="MXFP4",
        num_gpu_experts=gpu_experts,
    )
    wrapper.load_weights(torch.arange(32))
    return wrapper

load(32)
with PeakMemory() as peak:
    wrapper = load(int(sys.argv[2]))
print(peak.bytes - peak.before, anonymous_bytes() - peak.before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_experts_of_the_gpu_take_no_memory(tmp_path):
    write_small(
        tmp_path,
        "v4-flash",
        layers=1,
        experts=32,
        hidden=2048,
        intermediate=1024,
        pattern="random",
    )

    def loading(gpu_experts):
        return map(
            int, output_with_torch(PEAK_MEMORY + MEMORY, str(tmp_path), str(gpu_experts)).split()
        )

    _, whole = loading(0)
    peak, half = loading(16)
    assert whole > 0.9 * 32 * 3 * 2048 * 1024 * 4.25 / 8
    assert half <= 0.55 * whole
    assert peak <= 0.6 * whole, "loading takes memory for experts of the GPU"


def test_the_most_frequent_experts_are_placed_on_the_gpu():
    frequency = torch.tensor([[1, 9, 2], [8, 3, 3]])
    masks = generate_gpu_experts_masks(frequency, 3)
    assert masks.dtype == torch.bool
    assert masks.tolist() == [[False, True, False], [True, True, False]]
    assert not generate_gpu_experts_masks(frequency, 0).any()
    assert not generate_gpu_experts_masks(frequency, -4).any()
    assert generate_gpu_experts_masks(frequency.double(), 99).all()
    with refused(ValueError, "activation_freq: expected [layers, experts], got [6]"):
        generate_gpu_experts_masks(frequency.flatten(), 1)
