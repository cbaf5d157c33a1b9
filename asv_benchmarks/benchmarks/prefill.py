"""Calls of many tokens, which the multiply units limit."""

from . import common


class Prefill(common.ForwardSuite):
    params = common.forward_params(64, 256)

    def time_call(self, folder, isa, precision, tokens, routing):
        self.call()
