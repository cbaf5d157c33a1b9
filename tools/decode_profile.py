"""Where the time of decoding goes: cpumoe's kernels, cpumoe's overhead, the host.

``python tools/decode_profile.py [MODEL] --tokens 64`` decodes greedily, one token at a time. For
each layer call it separates

- kernels: the C++ engine's call, from its first instruction to its last;
- Python: the rest of `CpuExperts.forward` (checks, addresses, the output's allocation);
- dispatch: what the engine's call takes when all ids are -1, so that nothing is computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cpumoe import _core
from cpumoe.integrations.transformers import CpuExperts, LanguageModel
from cpumoe.text.generation import Sampling


@contextmanager
def stopwatch(owner: Any, method: str) -> Iterator[list[float]]:
    """Yields the seconds that each call of `owner.method` takes inside the block."""
    seconds: list[float] = []
    original = getattr(owner, method)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = original(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, method, timed)
    try:
        yield seconds
    finally:
        setattr(owner, method, original)


def profile(model: LanguageModel, prompt: str, tokens: int) -> dict[str, float]:
    """Returns milliseconds per token and microseconds per layer call, as medians."""
    modules = [module for module in model.model.modules() if isinstance(module, CpuExperts)]
    ids = model.encode(prompt)
    model.generate(ids, Sampling(2, temperature=0))
    with stopwatch(_core.Call, "run") as runs, stopwatch(CpuExperts, "forward") as calls:
        result = model.generate(ids, Sampling(tokens, temperature=0))
    if result.completion_tokens < 2:
        raise SystemExit("nothing decoded: the first token is prefill's; see --tokens, --prompt")
    decoding = slice(len(modules), None)  # without prefill
    kernels = runs[decoding]
    python = [call - run for call, run in zip(calls[decoding], kernels, strict=True)]
    return {
        "tokens": result.completion_tokens,
        "layers": len(modules),
        "ms_per_token": 1e3 * result.decode_seconds / max(1, result.completion_tokens - 1),
        "kernels_us_per_call": 1e6 * statistics.median(kernels),
        "python_us_per_call": 1e6 * statistics.median(python),
        "dispatch_us_per_call": 1e6 * _dispatch(modules[0]),
        "experts_share": result.experts_seconds / (result.prefill_seconds + result.decode_seconds),
    }


def _dispatch(module: CpuExperts, repeats: int = 2000) -> float:
    """Seconds of an engine's call at one token that computes nothing."""
    experts: Any = module.experts
    x = torch.zeros(1, experts.hidden_size, dtype=torch.bfloat16)
    ids, weights = torch.full((1, 6), -1), torch.ones(1, 6)
    with torch.inference_mode(), stopwatch(_core.Call, "run") as runs:
        for _ in range(repeats):
            module(x, ids, weights)
    return statistics.median(runs)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder; default: the embedded model")
    parser.add_argument("--prompt", default="In the beginning", help="what to continue")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    arguments = parser.parse_args()
    model = LanguageModel.from_pretrained(arguments.model)
    print(json.dumps(profile(model, arguments.prompt, arguments.tokens), indent=2))


if __name__ == "__main__":
    main()
