"""Writing experts to memory from which a GPU takes them."""

import torch

import cpumoe

from . import common


class WriteBack(common.LayerSuite):
    """One expert per call, with scales as bf16 numbers. Two slots take turns, as in SGLang."""

    params = common.ISAS
    param_names = ("isa",)

    def setup(self, folder, isa):
        common.require(isa)
        self.experts = cpumoe.Experts.from_checkpoint(folder, layer=0, isa=isa)
        self.slots = [slot(self.experts) for _ in range(2)]
        self.next = 0

    def time_export_into(self, folder, isa):
        expert, into = self.next % self.experts.num_experts, self.slots[self.next % 2]
        self.next += 1
        self.experts.export_into(expert, **into)


def slot(experts):
    """Memory for gate, up and down: two MXFP4 codes per byte, and a scale per 32 codes."""
    hidden, features = experts.hidden_size, experts.intermediate_size
    return {
        name: (
            torch.zeros(rows, columns // 2, dtype=torch.uint8),
            torch.zeros(rows, columns // 32, dtype=torch.bfloat16),
        )
        for name, rows, columns in (
            ("gate", features, hidden),
            ("up", features, hidden),
            ("down", hidden, features),
        )
    }
