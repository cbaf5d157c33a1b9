"""From a checkpoint's mapped pages to packed weights, and the cost of a call that does little."""

import torch

import cpumoe

from . import common


class Load(common.LayerSuite):
    """The checkpoint was just written, or read by an earlier sample: its pages are in memory."""

    params = common.ISAS
    param_names = ("isa",)
    number = 1

    def setup(self, folder, isa):
        common.require(isa)
        cpumoe.default_runtime()

    def time_pack_layer(self, folder, isa):
        cpumoe.Experts.from_checkpoint(folder, layer=0, isa=isa)

    def track_packed_bytes(self, folder, isa):
        return cpumoe.Experts.from_checkpoint(folder, layer=0, isa=isa).nbytes

    track_packed_bytes.unit = "bytes"


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
