"""Packing from mapped files or tensors, and the overhead of a call."""

import torch

import cpumoe

from . import common
from .peak_memory import PeakMemory


class Load(common.LayerSuite):
    """Packs a checkpoint whose pages are in memory, because it was just written or read."""

    params = (common.ISAS, ("checkpoint", "tensors"))
    param_names = ("isa", "source")
    number = 1

    def setup(self, folder, isa, source):
        common.require(isa)
        cpumoe.default_runtime()
        self.arguments = {"path": folder, "layer": 0}
        self.method = cpumoe.Experts.from_checkpoint
        if source == "tensors":
            self.arguments = stacks(folder)
            self.method = cpumoe.Experts.from_tensors

    def load(self, isa):
        return self.method(**self.arguments, isa=isa)

    def time_pack_layer(self, folder, isa, source):
        self.load(isa)

    def track_packed_bytes(self, folder, isa, source):
        return self.load(isa).nbytes

    track_packed_bytes.unit = "bytes"

    def track_peak_memory(self, folder, isa, source):
        """Peak anonymous memory, divided by the packed bytes; at least 1."""
        self.load(isa)
        with PeakMemory() as peak:
            experts = self.load(isa)
        return (peak.bytes - peak.before) / experts.nbytes

    track_peak_memory.unit = "copies"


def stacks(folder):
    """The arguments of from_tensors for the checkpoint's layer."""
    with cpumoe.open_checkpoint(folder) as reader:
        experts = [reader.expert(0, i) for i in range(reader.num_experts)]
        activation = reader.activation
    stacked = {}
    for name in ("gate", "up", "down"):
        matrices = [getattr(weights, name) for weights in experts]
        stacked[name] = (
            torch.stack([matrix.codes for matrix in matrices]),
            torch.stack([matrix.scales for matrix in matrices]),
        )
    return {**stacked, "format": "mxfp4", "activation": activation}


class CallOverhead:
    """A call whose work is negligible: checks, routing, waking the threads."""

    params = common.ISAS
    param_names = ("isa",)

    def setup(self, isa):
        common.require(isa)
        codes = torch.zeros(1, 32, 16, dtype=torch.uint8)
        scales = torch.full((1, 32, 1), 127, dtype=torch.uint8)
        matrix = (codes, scales)
        self.experts = cpumoe.Experts.from_tensors(
            gate=matrix, up=matrix, down=matrix, format="mxfp4", isa=isa
        )
        self.call = (torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
        self.experts(*self.call)

    def time_call(self, isa):
        self.experts(*self.call)

    def time_submit(self, isa):
        self.experts.submit(*self.call).result()
