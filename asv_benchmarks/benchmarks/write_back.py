"""Writing experts to memory from which a GPU takes them."""

from dataclasses import replace

import torch

import cpumoe

from . import common


class WriteBack:
    """One expert per call; E8M0 scales as bf16 numbers. Two slots take turns, as in SGLang."""

    params = (common.FORMATS, common.ISAS)
    param_names = ("format", "isa")
    timeout = 300

    def setup(self, fmt, isa):
        common.require(isa)
        layer = common.made_up_layer(fmt)
        self.experts = layer.pack(cpumoe.ExpertsOptions(isa=isa))
        self.slots = [slot(layer.experts[0]) for _ in range(2)]
        self.next = 0

    def time_export_into(self, fmt, isa):
        expert, into = self.next % self.experts.num_experts, self.slots[self.next % 2]
        self.next += 1
        self.experts.export_into(expert, **into)


def slot(weights):
    """Memory for gate, up and down of an expert."""
    return {name: matrix_like(getattr(weights, name)) for name in ("gate", "up", "down")}


def matrix_like(matrix):
    scales = matrix.scales
    if scales is not None:
        scales = scales.bfloat16() if scales.dtype == torch.uint8 else scales.clone()
    return replace(matrix, codes=matrix.codes.clone(), scales=scales)
