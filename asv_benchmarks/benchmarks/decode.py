"""Calls of few tokens, which the memory's read bandwidth limits."""

from . import common


class Decode(common.ForwardSuite):
    params = common.forward_params(1, 4, 16)

    def time_call(self, folder, isa, precision, tokens, routing):
        self.call()
