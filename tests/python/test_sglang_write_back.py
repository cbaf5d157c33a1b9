"""Experts that SGLang asks for, written into memory of several GPU ranks, byte for byte."""

import json
import os
import re

import pytest
import torch
from checkpoint_tools import edit_tensors
from moe_tools import refused
from safetensors.torch import load_file
from sglang_tools import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    arguments,
    assert_close,
    batch,
    checkpoint,
    gpu,
    loaded,
    oracle,
)

from cpumoe import CheckpointError, open_checkpoint
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper

RANKS = pytest.mark.parametrize("ranks", [1, 2, 4])
GUARD = 64  # bytes behind each buffer, which must not be written


@pytest.fixture(scope="module", params=["v4-flash", "kimi-k2"])
def folder(request, tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"), request.param)


class Buffers:
    """The memory of all ranks for one expert."""

    def __init__(self, ranks, offset=0, group=32):
        self.ranks, self.offset, features = ranks, offset, INTERMEDIATE // ranks
        self.group = group
        self.shapes = {
            "w13": (2 * features, HIDDEN // 2),
            "w13_scales": (2 * features, HIDDEN // group * 2),
            "w2": (HIDDEN, features // 2),
            "w2_scales": (HIDDEN, features // group * 2),
        }
        self.memory = {
            name: [
                torch.full((offset + n * k + GUARD,), 0xAB, dtype=torch.uint8) for _ in range(ranks)
            ]
            for name, (n, k) in self.shapes.items()
        }

    def addresses(self):
        return [
            [tensor.data_ptr() + self.offset for tensor in tensors]
            for tensors in self.memory.values()
        ]

    def written(self, name, rank):
        memory = self.memory[name][rank]
        assert bytes(memory[-GUARD:].tolist()) == b"\xab" * GUARD
        assert bytes(memory[: self.offset].tolist()) == b"\xab" * self.offset
        return memory[self.offset : -GUARD].view(self.shapes[name])


def expected(folder, expert, ranks, layer=None, group=32):
    """The bytes of each rank, from the checkpoint's tensors."""
    with open_checkpoint(folder) as reader:
        weights = reader.expert(reader.layers()[0] if layer is None else layer, expert)

    def scales(tensor):
        if tensor.dtype == torch.uint8:  # E8M0: the bits of 2^(byte - 127)
            bits = torch.where(tensor == 0, 0x40, tensor.int() << 7)
            return bits.to(torch.int16).contiguous().view(torch.uint8)
        return tensor.contiguous().view(torch.uint8)

    size = INTERMEDIATE // ranks
    for rank in range(ranks):
        rows, codes, groups = (
            slice(rank * size // per, (rank + 1) * size // per) for per in (1, 2, group)
        )
        gate, up, down = weights.gate, weights.up, weights.down
        yield {
            "w13": torch.cat([gate.codes[rows], up.codes[rows]]),
            "w13_scales": torch.cat([scales(gate.scales[rows]), scales(up.scales[rows])]),
            "w2": down.codes[:, codes],
            "w2_scales": scales(down.scales[:, groups]),
        }


def assert_written(buffers, folder, expert, layer=None):
    given = (folder, expert, buffers.ranks, layer, buffers.group)
    for rank, tensors in enumerate(expected(*given)):
        for name, tensor in tensors.items():
            assert torch.equal(buffers.written(name, rank), tensor), (name, rank)


@RANKS
def test_every_expert_is_written_as_the_checkpoint_has_it(folder, ranks):
    wrapper = loaded(folder, gpu_experts_mask=gpu(1, 2, 5))  # in memory or not
    slots = [Buffers(ranks), Buffers(ranks)]
    wrapper.submit_write_weight_scale_to_buffer(ranks, 0, *slots[0].addresses())
    for expert in range(EXPERTS):
        wrapper.sync_write_weight_scale_to_buffer()
        if expert + 1 < EXPERTS:
            addresses = slots[(expert + 1) % 2].addresses()
            wrapper.submit_write_weight_scale_to_buffer(ranks, expert + 1, *addresses)
        assert_written(slots[expert % 2], folder, expert)


@pytest.fixture
def large_groups(tmp_path):
    """A checkpoint in INT4 with a scale per 64 weights."""
    folder = checkpoint(tmp_path, "kimi-k2")
    tensors = load_file(folder / "model.safetensors")
    edit_tensors(folder, {k: v[:, ::2] for k, v in tensors.items() if k.endswith("weight_scale")})
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("masked", [False, True], ids=["in memory", "from the file"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_memory_has_the_checkpoints_groups(large_groups, ranks, masked):
    wrapper = loaded(large_groups, gpu_experts_mask=gpu(3) if masked else None)
    buffers = Buffers(ranks, group=64)
    wrapper.submit_write_weight_scale_to_buffer(ranks, 3, *buffers.addresses())
    wrapper.sync_write_weight_scale_to_buffer()
    assert_written(buffers, large_groups, 3)
    message = r"^gpu_tp_count: .*{INTERMEDIATE} intermediate features into groups of 64, got 4"
    with pytest.raises(ValueError, match=message.format(INTERMEDIATE=INTERMEDIATE)):
        wrapper.submit_write_weight_scale_to_buffer(4, 3, *Buffers(4).addresses())


@RANKS
@pytest.mark.parametrize("masked", [False, True], ids=["in memory", "from the file"])
def test_the_least_scale_is_exact(tmp_path, ranks, masked):
    folder = checkpoint(tmp_path)
    name = "layers.0.ffn.experts.3.w1.scale"
    with open_checkpoint(folder) as reader:
        bytes_ = reader.expert(0, 3).gate.scales.clone()
    bytes_[::3] = 0
    bytes_[1::3] = 254
    edit_tensors(folder, {name: bytes_.view(torch.float8_e8m0fnu)})
    wrapper = loaded(folder, gpu_experts_mask=gpu(3) if masked else None)
    buffers = Buffers(ranks)
    wrapper.submit_write_weight_scale_to_buffer(ranks, 3, *buffers.addresses())
    wrapper.sync_write_weight_scale_to_buffer()
    assert_written(buffers, folder, 3)


@pytest.mark.parametrize("offset", [2, 62])
def test_memory_may_begin_anywhere(folder, offset):
    wrapper = loaded(folder)
    buffers = Buffers(2, offset)
    wrapper.submit_write_weight_scale_to_buffer(2, 5, *buffers.addresses())
    wrapper.sync_write_weight_scale_to_buffer()
    assert_written(buffers, folder, 5)


def test_slots_are_written_not_the_checkpoints_numbers(folder):
    wrapper = loaded(
        folder, slots=torch.tensor([4, 1, 0, 0, 7, 7, 2, 3]), gpu_experts_mask=gpu(2, 4)
    )
    for slot, expert in ((0, 4), (2, 0), (3, 0), (4, 7)):
        buffers = Buffers(2)
        wrapper.submit_write_weight_scale_to_buffer(2, slot, *buffers.addresses())
        wrapper.sync_write_weight_scale_to_buffer()
        assert_written(buffers, folder, expert)


def test_forwards_run_between_writings(folder):
    with open_checkpoint(folder) as reader:
        layer = reader.layers()[0]
    wrapper = loaded(folder, gpu_experts_mask=gpu(0))
    args = batch(64)
    want = oracle(folder, args, mask=gpu(0))
    buffers = [Buffers(4) for _ in range(EXPERTS)]
    for expert, memory in enumerate(buffers):
        wrapper.submit_write_weight_scale_to_buffer(4, expert, *memory.addresses())
        wrapper.submit_forward(*args, None)
        assert_close(wrapper.sync_forward(args.hidden_states, None), want)
    wrapper.sync_write_weight_scale_to_buffer()
    for expert, memory in enumerate(buffers):
        assert_written(memory, folder, expert, layer)


def test_the_default_device_does_not_matter(folder):
    wrapper = loaded(folder, gpu_experts_mask=gpu(1))
    buffers = [Buffers(2), Buffers(2)]
    with torch.device("meta"), torch.inference_mode():
        for expert, memory in enumerate(buffers):
            wrapper.submit_write_weight_scale_to_buffer(2, expert, *memory.addresses())
        wrapper.sync_write_weight_scale_to_buffer()
    for expert, memory in enumerate(buffers):
        assert_written(memory, folder, expert)


def test_layers_are_written_independently(folder):
    with open_checkpoint(folder) as reader:
        numbers = reader.layers()
    wrappers = {layer: loaded(folder, layer_idx=layer) for layer in numbers}
    buffers = {layer: Buffers(2) for layer in wrappers}
    for layer, wrapper in wrappers.items():
        wrapper.submit_write_weight_scale_to_buffer(2, 6, *buffers[layer].addresses())
    for layer, wrapper in reversed(wrappers.items()):
        wrapper.sync_write_weight_scale_to_buffer()
        assert_written(buffers[layer], folder, 6, layer)


def test_a_mask_may_change_while_experts_are_written(folder):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1, 2, 3))
    args = batch(4)
    buffers = [Buffers(1) for _ in range(EXPERTS)]
    for turn in range(20):
        for expert, memory in enumerate(buffers):
            wrapper.submit_write_weight_scale_to_buffer(1, expert, *memory.addresses())
        mask = gpu(*range(4)) if turn % 2 else gpu(*range(4, 8))
        wrapper.gpu_experts_mask.copy_(mask)
        wrapper.submit_forward(*args, None)
        result = wrapper.sync_forward(args.hidden_states, None)
        assert_close(result, oracle(folder, args, mask=mask))
        wrapper.sync_write_weight_scale_to_buffer()
        for expert, memory in enumerate(buffers):
            assert_written(memory, folder, expert)


def test_sync_without_submit_does_nothing(folder):
    loaded(folder).sync_write_weight_scale_to_buffer()
    KTMoEWrapper(**arguments(folder)).sync_write_weight_scale_to_buffer()


@pytest.mark.parametrize(
    ("ranks", "expert", "kind", "message"),
    [
        (
            3,
            0,
            ValueError,
            f"gpu_tp_count: expected a number of ranks that divides the {INTERMEDIATE} "
            "intermediate features into groups of 32, got 3; pass another --tp-size",
        ),
        (0, 0, ValueError, "gpu_tp_count: expected at least 1, got 0"),
        (1, EXPERTS, IndexError, f"expert_id: expected 0..{EXPERTS - 1}, got {EXPERTS}"),
        (1, -1, ValueError, "expert_id: expected at least 0, got -1"),
    ],
)
def test_wrong_requests_are_refused(folder, ranks, expert, kind, message):
    wrapper = loaded(folder)
    with refused(kind, message):
        wrapper.submit_write_weight_scale_to_buffer(ranks, expert, *Buffers(1).addresses())
    wrapper.sync_write_weight_scale_to_buffer()


def test_wrong_addresses_are_refused(folder):
    wrapper = loaded(folder)
    addresses = Buffers(1).addresses()
    with refused(ValueError, "w13_weight_ptrs: expected 2 addresses, one per rank, got 1"):
        wrapper.submit_write_weight_scale_to_buffer(2, 0, *addresses)
    addresses[3] = [0]
    with refused(ValueError, "w2_scale_ptrs[0]: expected at least 1, got 0"):
        wrapper.submit_write_weight_scale_to_buffer(1, 0, *addresses)


def test_requests_before_the_weights_are_refused(folder):
    wrapper = KTMoEWrapper(**arguments(folder))
    with pytest.raises(RuntimeError, match="expected load_weights to be called first"):
        wrapper.submit_write_weight_scale_to_buffer(1, 0, *Buffers(1).addresses())


def test_sync_raises_the_error_of_a_writing(tmp_path):
    folder = checkpoint(tmp_path)
    wrapper = loaded(folder, num_gpu_experts=EXPERTS)
    buffers = Buffers(1)
    file = folder / "model.safetensors"
    written = file.stat().st_mtime_ns
    os.utime(file, ns=(written, written + 10**9))
    wrapper.submit_write_weight_scale_to_buffer(1, 0, *buffers.addresses())
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        wrapper.sync_write_weight_scale_to_buffer()
    os.utime(file, ns=(written, written))
    wrapper.submit_write_weight_scale_to_buffer(1, 0, *buffers.addresses())
    wrapper.sync_write_weight_scale_to_buffer()
    assert_written(buffers, folder, 0)
