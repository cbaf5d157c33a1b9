"""Few tokens: bound by the memory that the weights are read from."""

from . import common


class Decode(common.ForwardSuite):
    params = (common.ISAS, [1, 4, 8])

    def time_call(self, folder, isa, tokens):
        self.call()
