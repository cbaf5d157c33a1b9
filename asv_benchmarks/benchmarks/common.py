"""What the suites share: a layer of DeepSeek-V4-Flash's shape on disk, and calls of it."""

import itertools
from pathlib import Path

import torch

import cpumoe
from cpumoe.models import find_model
from cpumoe.synth import write_checkpoint

MODEL = "v4-flash"
EXPERTS = 16  # 214 MB of weights, beyond most caches
ISAS = cpumoe.known_isas()


class LayerSuite:
    """One checkpoint for all suites: asv runs an inherited `setup_cache` once.

    asv runs each benchmark in a process of its own; packing the layer there takes a fraction of a
    second.
    """

    timeout = 300

    def setup_cache(self):
        spec = find_model(MODEL)
        folder = Path("checkpoint").absolute()
        write_checkpoint(folder, spec, layers=1, experts=EXPERTS, pattern="random", overwrite=True)
        return str(folder)


def require(isa):
    """Has asv skip a variant that cannot run here."""
    if isa not in cpumoe.supported_isas():
        raise NotImplementedError(f"{isa} cannot run here")


def calls(experts, tokens, top_k):
    """Arguments of call after call, for ever; routing differs, so that no cache helps."""
    generator = torch.Generator().manual_seed(0)
    rounds = []
    for _ in range(8):
        scores = torch.rand(tokens, experts.num_experts, generator=generator)
        hidden_states = torch.randn(tokens, experts.hidden_size, generator=generator).bfloat16()
        weights = torch.rand(tokens, top_k, generator=generator)
        rounds.append((hidden_states, scores.topk(top_k).indices, weights))
    return itertools.cycle(rounds)


class ForwardSuite(LayerSuite):
    """Seconds per call, by ISA variant and number of tokens."""

    param_names = ("isa", "tokens")
    rounds = 1
    repeat = (1, 10, 10.0)
    warmup_time = 0  # `setup` calls once

    def setup(self, folder, isa, tokens):
        require(isa)
        self.experts = cpumoe.Experts.from_checkpoint(folder, layer=0, isa=isa)
        self.calls = calls(self.experts, tokens, find_model(MODEL).top_k)
        self.experts(*next(self.calls))

    def call(self):
        self.experts(*next(self.calls))
