"""Drives the wrapper of experts of sglang-kt 0.7.2, unmodified and without a GPU.

python fork.py      prints a line per case; the exit status is the number of failures

sglang-kt's KTEPWrapperMethod calls a module kt_kernel, here cpumoe's, for the experts on the CPU.
PyTorch computes the experts of the GPU (fork_gpu.py).
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fork_shims  # noqa: F401  # before sglang
import torch
from cases import run
from fork_gpu import HIDDEN, INTERMEDIATE, GpuExperts, Int4Experts, Mxfp4Experts

from cpumoe import SwiGLU, open_checkpoint, reference
from cpumoe.checkpoint import ExpertWeights
from cpumoe.models import find_model
from cpumoe.models.synth import write_checkpoint

LAYERS, EXPERTS, TOP_K = 3, 8, 3
ON_GPU = [1, 4, 6]
LONG = 100  # batches of this many tokens compute all experts on the GPU, if the case wants it
# Relative to the norm of the result, which is rounded to bf16 three times.
TOLERANCE = 8e-3


@dataclass
class Model:
    """A checkpoint, and how sglang-kt runs it."""

    method: str
    gpu: type[GpuExperts]
    folder: Path
    limit: float | None
    layers: list[int]
    experts: dict[int, list[ExpertWeights]]


def main() -> int:
    from sglang.srt.layers.moe import kt_ep_wrapper as host

    start_distributed()
    Int4Experts.replace_kernels(host)
    with tempfile.TemporaryDirectory() as folder:
        models = (
            # The limit bounds many of the tiny model's values: a result without it is wrong.
            write_model(Path(folder, "mxfp4"), "v4-flash", "MXFP4", Mxfp4Experts, limit=0.5),
            write_model(Path(folder, "int4"), "kimi-k2", "RAWINT4", Int4Experts, limit=None),
        )
        cases = {}
        for model, own in zip(models, (long_prompts, moved_experts), strict=True):
            for case in (hybrid, all_on_cpu, permuted, deferral, own):
                name = f"sglang-kt: {case.__name__.replace('_', ' ')}, {model.method}"
                cases[name] = partial(case, host, model)
        return run(cases)


def hybrid(host, model):
    layer, method = make(host, model)
    assert type(method.wrapper).__module__.startswith("cpumoe.")
    for tokens in (1, 3, 64):
        check(method, layer, model, batch(tokens))
    assert method.gpu_method.scaling is None  # the model multiplies by the scaling factor


def all_on_cpu(host, model):
    layer, method = make(host, model, on_gpu=[])
    check(method, layer, model, batch(16))


def permuted(host, model):
    from sglang.srt.eplb import expert_location

    order = [5, 2, 7, 0, 3, 6, 1, 4]
    location = SimpleNamespace(physical_to_logical_map_cpu=torch.tensor([order] * (LAYERS + 1)))
    expert_location._global_expert_location_metadata = location
    try:
        slots = [model.experts[model.layers[0]][expert] for expert in order]
        layer, method = make(host, model, experts=slots)
        check(method, layer, model, batch(16), experts=slots)
    finally:
        expert_location._global_expert_location_metadata = None


def long_prompts(host, model):
    """A long prompt runs on the GPU alone, with the experts that cpumoe writes into its memory."""
    first, second, _ = model.layers
    layers = {index: make(host, model, layer=index, threshold=LONG) for index in (first, second)}
    for index in (first, second, first):
        layer, method = layers[index]
        check(method, layer, model, batch(LONG))
        assert_holds(host._SHARED_FULL_CONTEXT, model, index)
        check(method, layer, model, batch(32))


def moved_experts(host, model):
    """The experts that a long prompt uses most move to the GPU.

    These are the steps of KTEPWrapperMethod.apply. Called as a whole, it fails after them: it makes
    a parameter of integers that requires a gradient.
    """
    layer, method = make(host, model, threshold=LONG)
    for favourites in ([0, 2, 5], [3, 4, 7]):
        host._SHARED_FULL_CONTEXT = None
        context = method._build_full_context(layer)
        context.gpu_method.process_weights_after_loading(context.gpu_layer)
        assert_holds(context, model, model.layers[0])
        args = batch(LONG)
        args[1][10:] = torch.tensor(favourites)
        method._update_gpu_experts_from_batch(layer, context, dispatch(*args))
        assert method.gpu_experts_mask.nonzero().flatten().tolist() == favourites
        assert torch.equal(method.wrapper.gpu_experts_mask, method.gpu_experts_mask)
        check(method, layer, model, batch(32))


def assert_holds(context, model, index):
    """Checks that the GPU has all experts of a layer, bit for bit."""
    expected = Layer(model)
    model.gpu().create_weights(expected, EXPERTS, HIDDEN, INTERMEDIATE)
    model.gpu().fill(expected, range(EXPERTS), model.experts[index])
    model.gpu().process_weights_after_loading(expected)
    for name in model.gpu.names:
        assert torch.equal(getattr(context.gpu_layer, name), getattr(expected, name)), name


def deferral(host, model):
    """What a layer defers is in the next layer's result. The last layer defers nothing."""
    total, expected = torch.zeros(1), torch.zeros(1)
    layers = {index: make(host, model, layer=index, deferred=2) for index in model.layers}
    for index, (layer, method) in layers.items():
        args = batch(2, seed=index)  # many tokens would keep all experts
        total = total + method.apply(layer, dispatch(*args)).hidden_states.double()
        expected = expected + oracle(model, model.experts[index], args)
        equal = float((total - expected).norm() / expected.norm()) < TOLERANCE
        assert equal == (index == model.layers[-1])


class Layer(torch.nn.Module):
    """What the wrapper reads of SGLang's FusedMoE."""

    num_experts, top_k, moe_tp_size = EXPERTS, TOP_K, 1
    intermediate_size_per_partition = INTERMEDIATE

    def __init__(self, model):
        super().__init__()
        from sglang.srt.layers.moe import MoeRunnerConfig

        self.quant_config = SimpleNamespace(get_quant_method=lambda layer, prefix: model.gpu())
        self.moe_runner_config = MoeRunnerConfig(
            num_experts=EXPERTS, swiglu_limit=model.limit, routed_scaling_factor=2.5
        )


def make(host, model, *, layer=None, on_gpu=ON_GPU, experts=None, deferred=0, threshold=0):
    """Makes and loads a layer as sglang-kt's model loader does."""
    index = model.layers[0] if layer is None else layer
    mask = torch.zeros(EXPERTS, dtype=torch.bool)
    mask[on_gpu] = True
    config = host.KTConfig(
        layer_idx=index,
        gpu_experts_mask=mask,
        cpuinfer_threads=2,
        threadpool_count=1,
        weight_path=str(model.folder),
        chunked_prefill_size=512,
        max_deferred_experts_per_token=deferred,
        method=model.method,
        num_layers=model.layers[-1] + 1,
        gpu_prefill_token_threshold=threshold,
        kt_enable_dynamic_expert_update=True,
    )
    module, gpu = Layer(model), model.gpu()
    method = host.KTEPWrapperMethod(gpu, config)
    method.create_weights(
        layer=module,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size_per_partition=INTERMEDIATE,
        params_dtype=torch.bfloat16,
    )
    method.create_moe_runner(module, module.moe_runner_config)
    gpu.fill(module, on_gpu, experts or model.experts[index])
    method.process_weights_after_loading(module)
    return module, method


def batch(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    return x, ids, torch.rand(tokens, TOP_K, generator=generator)


def dispatch(x, ids, weights):
    from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    return StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, None))


def check(method, layer, model, args, experts=None):
    result = method.apply(layer, dispatch(*args)).hidden_states
    expected = oracle(model, experts or model.experts[method.kt_config.layer_idx], args)
    error = float((result.double() - expected).norm() / expected.norm())
    assert result.dtype == torch.bfloat16
    assert error < TOLERANCE, f"{len(result)} tokens: error {error:.1e}"


def oracle(model, experts, args):
    matrices = [[getattr(e, name) for e in experts] for name in ("gate", "up", "down")]
    return reference.experts_forward(
        *args, *matrices, format=model.gpu.format, activation=SwiGLU(limit=model.limit)
    )


def write_model(folder, name, method, gpu, limit):
    folder.mkdir()
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K}
    write_checkpoint(folder, find_model(name), layers=LAYERS, experts=EXPERTS, **sizes)
    path = folder / "config.json"
    # The limit must come from sglang-kt.
    path.write_text(json.dumps({**json.loads(path.read_text()), "swiglu_limit": None}))
    with open_checkpoint(folder) as reader:
        layers = list(reader.layers())
        experts = {i: [reader.expert(i, e) for e in range(EXPERTS)] for i in layers}
    return Model(method, gpu, folder, limit, layers, experts)


def start_distributed():
    """Makes sglang-kt's groups of processes, each with this process alone."""
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel

    meeting = f"file://{tempfile.mkdtemp()}/ranks"
    init_distributed_environment(1, 0, meeting, 0, "gloo")
    initialize_model_parallel(backend="gloo")


if __name__ == "__main__":
    with torch.inference_mode():  # as SGLang's scheduler does
        sys.exit(main())
