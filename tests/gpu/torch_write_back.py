"""Writes experts into page-locked memory, as SGLang does before it computes a layer on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.gpu.gpu_tools import Device, Sizes, arguments, call, make_batch, make_layers
from tests.gpu.results import PASS, check, report, run_parts

from cpumoe import open_checkpoint

# The experts of DeepSeek-V4-Flash, and some of its layer's.
SIZES = Sizes(layers=1, experts=48, hidden=4096, intermediate=2048)
ROUNDS = 4


class Slot:
    """Memory for one expert of one rank: w13, its scales, w2, its scales."""

    def __init__(self, sizes: Sizes, ranks: int, *, pinned: bool) -> None:
        """Allocates the memory of all ranks."""
        hidden, features = sizes.hidden, sizes.intermediate // ranks
        shapes = (
            ((2 * features, hidden // 2), torch.uint8),
            ((2 * features, hidden // 32), torch.bfloat16),
            ((hidden, features // 2), torch.uint8),
            ((hidden, features // 32), torch.bfloat16),
        )
        self.tensors = [
            [torch.empty(shape, dtype=dtype, pin_memory=pinned) for _ in range(ranks)]
            for shape, dtype in shapes
        ]

    def addresses(self) -> list[list[int]]:
        """Returns the arguments for the module."""
        return [[tensor.data_ptr() for tensor in ranks] for ranks in self.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes that an expert takes."""
        return sum(tensor.nbytes for ranks in self.tensors for tensor in ranks)


class WriteBack:
    """A layer whose experts are written to two slots by turns."""

    def __init__(self, work: Path, device: Device, sizes: Sizes = SIZES) -> None:
        """Makes the layer."""
        self._device = device
        self._sizes = sizes
        self._pinned = device.device.type == "cuda"
        [self._layer] = make_layers(work, sizes)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the checks by name."""
        return {"bytes": self.compare, "speed": self.measure, "beside calls": self.beside_calls}

    def compare(self) -> None:
        """Experts for 1, 2 and 4 ranks, against the checkpoint."""
        wrong = []
        for ranks in (1, 2, 4):
            slot = Slot(self._sizes, ranks, pinned=self._pinned)
            for expert in (0, self._sizes.experts - 1):
                self._write(expert, ranks, slot)
                self._layer.sync_write_weight_scale_to_buffer()
                wrong += self._differences(expert, ranks, slot)
        check("bytes of experts for 1, 2 and 4 ranks", not wrong, "; ".join(wrong))

    def measure(self) -> None:
        """GB/s of writing alone, and of writing and copying to the GPU by turns."""
        slots = [Slot(self._sizes, 1, pinned=self._pinned) for _ in range(2)]
        device = [
            [torch.empty_like(tensor, device=self._device.device) for [tensor] in slot.tensors]
            for slot in slots
        ]

        def write(*, copy: bool) -> float:
            start = time.perf_counter()
            for expert in range(self._sizes.experts):
                self._write(expert, 1, slots[expert % 2])
                self._layer.sync_write_weight_scale_to_buffer()
                if copy:
                    for target, [source] in zip(
                        device[expert % 2], slots[expert % 2].tensors, strict=True
                    ):
                        target.copy_(source, non_blocking=True)
            self._device.synchronize()
            seconds = time.perf_counter() - start
            return self._sizes.experts * slots[0].nbytes / seconds / 1e9

        write(copy=True)
        alone = max(write(copy=False) for _ in range(ROUNDS))
        both = max(write(copy=True) for _ in range(ROUNDS))
        memory = _copy_gb_per_s(slots[0].nbytes * 16)
        report(
            PASS,
            "write-back",
            gb_per_s=alone,
            with_copies_gb_per_s=both,
            memory_copy_gb_per_s=memory,
            share_of_memory_copy=round(alone / memory, 2),
            ms_per_expert=slots[0].nbytes / alone / 1e6,
        )

    def beside_calls(self) -> None:
        """Calls go on while experts are written."""
        slot = Slot(self._sizes, 1, pinned=self._pinned)
        batch = make_batch(self._sizes, 4)
        expected = call(self._layer, batch, 0)
        on_device = batch.to(self._device.device)
        equal = True
        last = min(self._sizes.experts, 10) - 1
        for expert in range(last + 1):
            self._write(expert, 1, slot)
            output = call(self._layer, on_device, self._device.handle())
            equal = equal and torch.equal(output.cpu(), expected)
            self._layer.sync_write_weight_scale_to_buffer()
        wrong = self._differences(last, 1, slot)
        check("calls while experts are written", equal and not wrong, f"equal: {equal}, {wrong}")

    def _write(self, expert: int, ranks: int, slot: Slot) -> None:
        self._layer.submit_write_weight_scale_to_buffer(ranks, expert, *slot.addresses())

    def _differences(self, expert: int, ranks: int, slot: Slot) -> list[str]:
        with open_checkpoint(self._layer.weight_path) as reader:
            weights = reader.expert(0, expert)
            gate, up, down = weights.gate, weights.up, weights.down
            size = self._sizes.intermediate // ranks
            wrong = []
            for rank in range(ranks):
                rows, codes, groups = (
                    slice(rank * size // per, (rank + 1) * size // per) for per in (1, 2, 32)
                )
                expected = (
                    torch.cat([gate.codes[rows], up.codes[rows]]),
                    torch.cat([_bf16(gate.scales[rows]), _bf16(up.scales[rows])]),
                    down.codes[:, codes],
                    _bf16(down.scales[:, groups]),
                )
                for name, want, got in zip(
                    ("w13", "w13 scales", "w2", "w2 scales"), expected, slot.tensors, strict=True
                ):
                    if not torch.equal(want, got[rank]):
                        wrong.append(f"expert {expert}, rank {rank} of {ranks}: {name}")
        return wrong


def _bf16(scales: torch.Tensor) -> torch.Tensor:
    """Returns E8M0 bytes as bf16 numbers."""
    bits = torch.where(scales == 0, 0x40, scales.int() << 7)
    return bits.to(torch.int16).contiguous().view(torch.bfloat16)


def _copy_gb_per_s(nbytes: int) -> float:
    """Returns the speed of PyTorch's copy from memory to memory, in bytes that are written."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        speeds.append(nbytes / (time.perf_counter() - start) / 1e9)
    return max(speeds)


def main() -> None:
    """Runs the checks."""
    work, device = arguments()
    run_parts(WriteBack(work, device).parts())


if __name__ == "__main__":
    main()
