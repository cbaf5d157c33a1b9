"""SGLang's module with experts in FP8, BF16 and NVFP4, beside MXFP4 and INT4."""

import dataclasses
import re

import pytest
import torch
from cli_tools import run as run_command
from moe_tools import refused
from sglang_tools import (
    EXPERTS,
    arguments,
    assert_close,
    batch,
    checkpoint,
    gpu,
    loaded,
    oracle,
    run,
)

from cpumoe import open_checkpoint
from cpumoe.formats.scale_choice import USUAL_SCALES, ScaleChoice
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper

HIDDEN, INTERMEDIATE = 256, 512
BY_ROW = ScaleChoice(by_row=True)
MODELS = {
    "FP8": ("DeepSeek-V3", USUAL_SCALES),
    "FP8_PERCHANNEL": ("MiniMax-M2", BY_ROW),
    "FP8 with bf16 scales": ("DeepSeek-V3", ScaleChoice(torch.bfloat16)),
    "BF16": ("Mixtral-8x7B", USUAL_SCALES),
    "NVFP4": ("DeepSeek-R1-NVFP4", USUAL_SCALES),
}
WRITTEN = [name for name in MODELS if name != "NVFP4"]
RANKS = pytest.mark.parametrize("ranks", [1, 2, 4])
GUARD = 64  # bytes behind each buffer, which must not be written


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            model, scales = MODELS[name]
            sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "layers": 1}
            path = tmp_path_factory.mktemp("model")
            made[name] = checkpoint(path, model, scales=scales, pattern="random", **sizes)
        return made[name]

    return folder


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_computed_as_the_checkpoint_stores_them(folders, name):
    folder = folders(name)
    assert arguments(folder)["method"] == name.partition(" ")[0]
    wrapper = loaded(folder, gpu_experts_mask=gpu(1, 6))
    for tokens in (1, 16):
        args = batch(tokens)
        wide = args.hidden_states.repeat(1, HIDDEN // 64)
        args = dataclasses.replace(args, hidden_states=wide)
        assert_close(run(wrapper, args), oracle(folder, args, mask=gpu(1, 6)))


@pytest.mark.parametrize("name", ["FP8", "FP8_PERCHANNEL", "BF16", "NVFP4"])
@pytest.mark.parametrize("method", ["FP8", "FP8_PERCHANNEL", "BF16", "NVFP4", "MXFP4"])
def test_the_method_must_be_that_of_the_checkpoint(folders, name, method):
    folder = folders(name)
    if method == name:
        KTMoEWrapper(**arguments(folder, method=method.lower()))
        return
    message = rf"method: expected {name}, because .*, got {method}; pass --kt-method {name}$"
    with pytest.raises(ValueError, match=message):
        KTMoEWrapper(**arguments(folder, method=method))


@pytest.mark.parametrize("name", ["FP8", "FP8_PERCHANNEL", "BF16", "NVFP4"])
def test_the_command_finds_the_method(folders, name):
    arguments = ("--dry-run", "--device", "cpu", "--kt-num-gpu-experts", "0")
    result = run_command("sglang", folders(name), *arguments)
    assert re.search(rf"--kt-method {name}\b", result.stdout), result.output


class Buffers:
    """The memory of all ranks for one expert."""

    def __init__(self, expected):
        self.memory = {
            name: [torch.full((part.nbytes + GUARD,), 0xAB, dtype=torch.uint8) for part in parts]
            for name, parts in expected.items()
        }

    def addresses(self):
        return [
            [memory.data_ptr() if len(memory) > GUARD else 0 for memory in parts]
            for parts in self.memory.values()
        ]

    def assert_written(self, expected):
        for name, parts in expected.items():
            for rank, part in enumerate(parts):
                memory = self.memory[name][rank]
                written = part.contiguous().view(torch.uint8).flatten()
                assert torch.equal(memory[:-GUARD], written), (name, rank)
                assert (memory[-GUARD:] == 0xAB).all()


def expected(folder, index, ranks):
    """What each rank gets, from the checkpoint's tensors."""
    with open_checkpoint(folder) as reader:
        expert = reader.expert(reader.layers()[0], index)
    gate, up, down = expert.gate, expert.up, expert.down
    none = torch.empty(0, 0)

    def scales(matrix):
        return none if matrix.scales is None else matrix.scales.float()

    def rows(tensor, rank):
        size = len(tensor) // ranks
        return tensor[rank * size : (rank + 1) * size]

    def columns(tensor, rank):
        return tensor if tensor.shape[-1] == 1 else rows(tensor.T, rank).T

    def both(rank, of):
        return torch.cat([rows(of(matrix), rank) for matrix in (gate, up)])

    def codes(matrix):
        return matrix.codes.view(torch.uint8)

    return {
        "w13": [both(rank, codes) for rank in range(ranks)],
        "w13_scales": [both(rank, scales) for rank in range(ranks)],
        "w2": [columns(codes(down), rank) for rank in range(ranks)],
        "w2_scales": [columns(scales(down), rank) for rank in range(ranks)],
    }


@RANKS
@pytest.mark.parametrize("name", WRITTEN)
def test_experts_are_written_as_the_checkpoint_has_them(folders, name, ranks):
    wrapper = loaded(folders(name), gpu_experts_mask=gpu(1, 2))  # in memory or not
    for index in range(EXPERTS):
        parts = expected(folders(name), index, ranks)
        buffers = Buffers(parts)
        wrapper.submit_write_weight_scale_to_buffer(ranks, index, *buffers.addresses())
        wrapper.sync_write_weight_scale_to_buffer()
        buffers.assert_written(parts)


def test_ranks_get_whole_blocks(folders):
    wrapper = loaded(folders("FP8"))
    message = (
        "gpu_tp_count: expected a number of ranks that divides the 512 intermediate features into "
        "groups of 128, got 8; pass another --tp-size"
    )
    with refused(ValueError, message):
        wrapper.submit_write_weight_scale_to_buffer(8, 0, *4 * [8 * [64]])


def test_nvfp4_has_no_memory_in_sglang(folders):
    wrapper = loaded(folders("NVFP4"))
    message = (
        "submit_write_weight_scale_to_buffer: expected experts in mxfp4, int4, fp8, bf16, got "
        "nvfp4, for which SGLang has no memory; leave out --kt-gpu-prefill-token-threshold"
    )
    with refused(ValueError, message):
        wrapper.submit_write_weight_scale_to_buffer(1, 0, *4 * [[64]])


def test_scales_need_addresses_where_there_are_scales(folders):
    wrapper = loaded(folders("FP8"))
    with refused(ValueError, "w13_scale_ptrs[0]: expected at least 1, got 0"):
        wrapper.submit_write_weight_scale_to_buffer(1, 0, [64], [0], [64], [0])
