"""Many tokens: bound by the multiply units."""

from . import common


class Prefill(common.ForwardSuite):
    params = (common.ISAS, [64, 256])

    def time_call(self, folder, isa, tokens):
        self.call()
