"""The common parts of the suites: a layer of DeepSeek-V4-Flash's shape, and its calls."""

from pathlib import Path

import torch

import cpumoe
from cpumoe.measure.throughput import ROUTINGS, CallTimer, make_workload
from cpumoe.models import find_model
from cpumoe.models.synth import write_checkpoint
from cpumoe.numerics.precision import distinct_precisions

MODEL = "v4-flash"
SIZES = {"experts": 16}  # 214 MB of weights, beyond most caches
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
        write_checkpoint(folder, spec, layers=1, pattern="random", overwrite=True, **SIZES)
        return str(folder)


def require(isa):
    """Makes asv skip a variant that cannot run here."""
    if isa not in cpumoe.supported_isas():
        raise NotImplementedError(f"{isa} cannot run here")


class ForwardSuite(LayerSuite):
    """Seconds per call, by ISA variant, precision, number of tokens and routing.

    The routings are those of `cpumoe bench`; routing follows routing, so that no cache helps.
    """

    param_names = ("isa", "precision", "tokens", "routing")
    rounds = 1
    repeat = (1, 10, 10.0)
    warmup_time = 0  # `setup` calls once

    def setup(self, folder, isa, precision, tokens, routing):
        require(isa)
        experts = cpumoe.Experts.from_checkpoint(folder, layer=0, isa=isa, precision=precision)
        work = make_workload(
            tokens,
            hidden_size=experts.hidden_size,
            num_experts=experts.num_experts,
            top_k=min(find_model(MODEL).top_k, experts.num_experts),
            routing=routing,
        )
        # Not called `timer`, which asv would take for its clock.
        self.calls = CallTimer(experts, work)
        self.calls.call()

    def call(self):
        self.calls.call()


def forward_params(*tokens):
    """Returns the parameters of a `ForwardSuite` with these numbers of tokens."""
    return (ISAS, list(distinct_precisions(torch.bfloat16)), list(tokens), list(ROUTINGS))
