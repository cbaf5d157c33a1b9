"""Weight formats beside each other: calls of few and of many tokens, and packing."""

import cpumoe

from . import common


class Formats:
    """Seconds per call, by weight format, ISA variant and number of tokens."""

    params = (common.FORMATS, common.ISAS, (1, 64))
    param_names = ("format", "isa", "tokens")
    timeout = 300
    rounds = 1
    repeat = (1, 10, 10.0)
    warmup_time = 0  # `common.calls` makes a call

    def setup(self, fmt, isa, tokens):
        common.require(isa)
        experts = common.made_up_layer(fmt).pack(cpumoe.ExpertsOptions(isa=isa))
        self.calls = common.calls(experts, tokens, "balanced")

    def time_call(self, fmt, isa, tokens):
        self.calls.call()


class PackFormats:
    """Packing from tensors in memory, by weight format and ISA variant."""

    params = (common.FORMATS, common.ISAS)
    param_names = ("format", "isa")
    timeout = 300
    number = 1

    def setup(self, fmt, isa):
        common.require(isa)
        cpumoe.default_runtime()
        self.layer, self.options = common.made_up_layer(fmt), cpumoe.ExpertsOptions(isa=isa)

    def time_pack_layer(self, fmt, isa):
        self.layer.pack(self.options)
