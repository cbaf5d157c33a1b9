"""The common parts of the suites: a layer of DeepSeek-V4-Flash's shape, and its calls."""

from dataclasses import replace
from pathlib import Path

import torch

import cpumoe
from cpumoe.measure.layer_weights import LayerWeights
from cpumoe.measure.throughput import ROUTINGS, CallTimer, make_workload
from cpumoe.models import find_model
from cpumoe.models.synth import write_checkpoint
from cpumoe.numerics.precision import distinct_precisions

MODEL = "v4-flash"
SIZES = {"experts": 16}  # 214 MB of weights, beyond most caches
ISAS = cpumoe.known_isas()
FORMATS = list(cpumoe.WEIGHT_FORMATS)


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


def made_up_layer(fmt):
    """Returns a layer's weights in a format. All experts are one, so that setup is short."""
    spec = find_model(MODEL)
    sizes = {
        "hidden_size": SIZES.get("hidden", spec.hidden_size),
        "moe_intermediate_size": SIZES.get("intermediate", spec.moe_intermediate_size),
    }
    layer = LayerWeights.from_model(replace(spec, **sizes), limit=SIZES["experts"], format=fmt)
    return replace(layer, experts=[layer.experts[0]] * layer.num_experts)


def calls(experts, tokens, routing):
    """Returns a timer of calls of a layer; it has made the first one."""
    timer = CallTimer(
        experts,
        make_workload(
            tokens,
            hidden_size=experts.hidden_size,
            num_experts=experts.num_experts,
            top_k=min(find_model(MODEL).top_k, experts.num_experts),
            routing=routing,
        ),
    )
    timer.call()
    return timer


class ForwardSuite(LayerSuite):
    """Seconds per call, by ISA variant, precision, number of tokens and routing.

    The routings are those of `cpumoe bench`; routing follows routing, so that no cache helps.
    """

    param_names = ("isa", "precision", "tokens", "routing")
    rounds = 1
    repeat = (1, 10, 10.0)
    warmup_time = 0  # `calls` makes a call

    def setup(self, folder, isa, precision, tokens, routing):
        require(isa)
        experts = cpumoe.Experts.from_checkpoint(folder, layer=0, isa=isa, precision=precision)
        # Not called `timer`, which asv would take for its clock.
        self.calls = calls(experts, tokens, routing)

    def call(self):
        self.calls.call()


def forward_params(*tokens):
    """Returns the parameters of a `ForwardSuite` with these numbers of tokens."""
    return (ISAS, list(distinct_precisions(torch.bfloat16)), list(tokens), list(ROUTINGS))
