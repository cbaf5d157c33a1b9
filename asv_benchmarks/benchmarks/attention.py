"""Attention of one layer, by ISA variant, shape of heads, queries and keys."""

import torch

import cpumoe

from .common import ISAS, require

# heads, kv_heads, head_size, value_size
HEADS = {
    "gpt-oss-20b": (64, 8, 64, 64),
    "qwen3-30b-a3b": (32, 4, 128, 128),
    "deepseek-v3": (128, 128, 192, 128),
}


class Attention:
    """Seconds per call in bf16: one new token with a long cache, and a part of a prompt."""

    param_names = ("isa", "heads", "queries", "keys")
    params = (ISAS, list(HEADS), [1, 256], [256, 2048])
    timeout = 300

    def setup(self, isa, heads, queries, keys):
        """Makes queries, keys and values, and a first call."""
        require(isa)
        number, kv_number, size, value_size = HEADS[heads]
        self.isa = isa
        self.q = torch.randn(1, number, queries, size).bfloat16()
        self.k = torch.randn(1, kv_number, keys, size).bfloat16()
        self.v = torch.randn(1, kv_number, keys, value_size).bfloat16()
        self.time_call(isa, heads, queries, keys)

    def time_call(self, isa, heads, queries, keys):
        """Computes causal attention."""
        cpumoe.attention(self.q, self.k, self.v, causal=True, isa=self.isa)
