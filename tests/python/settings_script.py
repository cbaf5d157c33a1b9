"""Imports cpumoe and uses it in forked children, each under one process-wide setting of torch.

Prints a line of JSON for each: the setting's name, and what was computed, or the error's traceback.
Children share what their parent has imported, which takes most of the time.
"""

import contextlib
import hashlib
import importlib
import json
import locale
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

# Imported here for the integration, so that children need not import it.
HOST = (
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
    "transformers.models.deepseek_v4.modeling_deepseek_v4",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.quantizers.auto",
    "transformers.quantizers.quantizer_compressed_tensors",
)
# On small tensors, as in all tests, threads cost more than they save.
torch.set_num_threads(1)


class LookOn(TorchFunctionMode):
    """Observes each function of torch, and changes nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def nothing():
    """Returns the current settings."""


def default_dtype(dtype):
    return lambda: torch.set_default_dtype(dtype)


def autocast():
    torch.set_num_threads(3)
    keep.enter_context(torch.autocast("cpu", torch.bfloat16))


def inference():
    keep.enter_context(torch.inference_mode())
    for name in ("tr_TR.UTF-8", "de_DE.UTF-8", "C.UTF-8"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            return


def all_that_change_nothing():
    locale.setlocale(locale.LC_ALL, "C")
    warnings.simplefilter("error")
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)
    torch.autograd.set_detect_anomaly(True)
    keep.enter_context(LookOn())


keep = contextlib.ExitStack()
SETTINGS = {
    "nothing": nothing,
    "default dtype float16": default_dtype(torch.float16),
    "default dtype float64": default_dtype(torch.float64),
    "default device meta": lambda: torch.set_default_device("meta"),
    "autocast, three threads": autocast,
    "inference mode, another locale": inference,
    "all others": all_that_change_nothing,
}


def digest(*tensors):
    """Returns their bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist()))
    return found.hexdigest()[:12]


def stacked(tensors):
    """A stack of tensors, made of bytes, because autocast refuses FP8; None: there are none."""
    if tensors[0] is None:
        return None
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.stack(flat).view(tensors[0].dtype).view(len(tensors), *tensors[0].shape)


def checked():
    """Results of cpumoe itself: quantizing, references with bounds, made-up weights, layers."""
    import cpumoe
    from cpumoe.measure import throughput
    from cpumoe.models import synth
    from cpumoe.numerics import bounds

    results = {}
    for name in cpumoe.WEIGHT_FORMATS:
        fmt = cpumoe.weight_format(name)
        generator = torch.Generator().manual_seed(1)
        stacks, singles = {}, []
        for part, (n, k) in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            made = [synth.random_matrix(fmt, n, k, p, generator) for p in synth.PATTERNS]
            singles += made
            parts = zip(*((m.codes, m.scales, m.factor) for m in made), strict=True)
            stacks[part] = cpumoe.QuantizedMatrix(*map(stacked, parts))
        tensors = [t for m in singles for t in (m.codes, m.scales, m.factor) if t is not None]
        results[f"{name} weights"] = digest(*tensors)
        experts = len(synth.PATTERNS)
        load = throughput.make_workload(
            num_experts=experts, hidden_size=64, tokens=5, top_k=2, routing="zipf", seed=2
        )
        call = (load.hidden_states, load.topk_ids[0], load.topk_weights)
        layer = cpumoe.Experts.from_tensors(**stacks, format=name)
        results[f"{name} layer"] = digest(layer(*call), layer.submit(*call).result())
        reference, bound = bounds.experts_forward_with_bound(*call, **stacks, format=name)
        results[f"{name} reference"] = digest(reference, bound)
    return results


def generated(root):
    """Results of whole models."""
    from cpumoe.integrations.transformers import from_pretrained

    results = {}
    for family in sorted(os.listdir(root)):
        model = from_pretrained(root / family)
        logits = model(torch.arange(3, 13, device="cpu")[None]).logits
        results[family] = digest(logits) if logits.isfinite().all() else "not finite"
    return results


def computed(name, root):
    """Computes all results under one setting."""
    SETTINGS[name]()
    results = checked()
    from cpumoe.integrations.transformers import activation  # noqa: F401  its import under it, too

    if name == "default device meta":
        torch.set_default_device(None)  # transformers refuses to load under it
    return results | generated(root)


def child(name, root):
    """Prints the line of one setting."""
    try:
        line = {"setting": name, "computed": computed(name, root)}
    except BaseException:
        line = {"setting": name, "error": traceback.format_exc()}
    with os.fdopen(os.dup(1), "w") as out:
        out.write(json.dumps(line) + "\n")


def main(root, processes=2):
    """Runs the children, some at a time."""
    for module in HOST:
        importlib.import_module(module)
    running = 0
    for name in SETTINGS:
        if running == processes:
            os.wait()
            running -= 1
        if os.fork() == 0:
            child(name, root)
            os._exit(0)
        running += 1
    for _ in range(running):
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
