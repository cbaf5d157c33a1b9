"""How fast a whole model reads prompts and writes tokens, and what its memory allows.

To write a token, a model reads its dense weights once, and the weights of the experts that the
token uses. It cannot write tokens faster than memory delivers these bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import cpumoe
from cpumoe.integrations.transformers.experts_module import CpuExperts
from cpumoe.integrations.transformers.grouped_dense import GroupedLinear
from cpumoe.integrations.transformers.language_model import LanguageModel
from cpumoe.text.generation import Prompt, Sampling

_DENSE = (cpumoe.Linear, GroupedLinear, nn.Linear)


@dataclass
class ContextSpeed:
    """Times with prompts of one length.

    Attributes:
        context: tokens of the prompt.
        new_tokens: tokens that were written behind it, the first one excepted.
        prefill_seconds: time until the first token was there, of each round.
        decode_seconds: time for one of the other tokens, of each round.
        bandwidth: bytes that memory delivered per second, measured in each round on the threads
            that compute experts.
        experts_bytes: bytes of experts' weights that a token reads.
        dense_bytes: bytes of all other weights that a token reads.
        experts_share: the part of a token's time that experts take.
        dense_share: the part that dense layers take. Attention, norms, routers and the host take
            the rest.
    """

    context: int
    new_tokens: int
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    experts_bytes: float = 0.0
    dense_bytes: int = 0
    experts_share: float = 0.0
    dense_share: float = 0.0


def measure_speed(
    model: LanguageModel,
    contexts: Sequence[int],
    new_tokens: int,
    rounds: int,
    *,
    bandwidth: Callable[[], float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ContextSpeed]:
    """Lets a model continue prompts of random tokens, each length once per round.

    Args:
        model: the model.
        contexts: tokens of the prompts.
        new_tokens: tokens whose writing is timed, at least 1. One more is written.
        rounds: how often each prompt is read.
        bandwidth: measures how many bytes memory delivers per second.
        progress: is called with the number of prompts that are done, and of all.

    Raises:
        ValueError: the context of the model has no room for a prompt and the new tokens.
        ModelError: the model cannot generate.
    """
    room = model.context_length - new_tokens - 1
    for context in contexts:
        if not 1 <= context <= room:
            raise ValueError(
                f"contexts: expected 1 to {room} tokens, because {new_tokens + 1} follow in the "
                f"model's context of {model.context_length}, got {context}"
            )
    sampling = Sampling(max_new_tokens=new_tokens + 1, temperature=0.0, ignore_eos=True)
    prompts = [_prompt(model, context) for context in contexts]
    found = [ContextSpeed(context, new_tokens) for context in contexts]
    total = (rounds + 1) * len(found)
    # The first round has shares, whose measurement takes time, and no times.
    for done, (speed, prompt) in enumerate(zip(found, prompts, strict=True)):
        progress(done, total)
        _profile(model, speed, prompt, sampling)
    for index in range(len(found), total):
        progress(index, total)
        speed, prompt = found[index % len(found)], prompts[index % len(found)]
        generation = model.generate(prompt, sampling)
        speed.prefill_seconds.append(generation.prefill_seconds)
        speed.decode_seconds.append(generation.decode_seconds / new_tokens)
        speed.bandwidth.append(bandwidth())
    progress(total, total)
    return found


def dense_bytes(model: nn.Module) -> int:
    """Returns the bytes of weights that a token reads, experts excepted.

    A token reads one row of an embedding, whose weights count only if a head shares them.
    """
    kept: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, cpumoe.Linear):
            kept[id(module)] = module.nbytes
        elif not isinstance(module, nn.Embedding):
            kept |= {id(each): each.nbytes for each in module.parameters(recurse=False)}
    return sum(kept.values())


def _prompt(model: LanguageModel, context: int) -> Prompt:
    rng = torch.Generator("cpu").manual_seed(context)
    known = model.model.get_input_embeddings().num_embeddings
    return Prompt(tuple(torch.randint(known, (context,), generator=rng, device="cpu").tolist()))


def _profile(model: LanguageModel, speed: ContextSpeed, prompt: Prompt, sampling: Sampling) -> None:
    experts = [m for m in model.model.modules() if isinstance(m, CpuExperts) and m.experts]
    before = [each.experts.statistics().expert_tokens.sum() for each in experts if each.experts]
    with _Clock(model.model).running() as clock:
        model.generate(prompt, sampling)
    tokens = speed.context + speed.new_tokens
    for module, earlier in zip(experts, before, strict=True):
        assert module.experts is not None
        used = int(module.experts.statistics().expert_tokens.sum() - earlier)
        speed.experts_bytes += used / tokens * module.experts.nbytes / module.num_experts
    speed.dense_bytes = dense_bytes(model.model)
    if clock.total:
        speed.experts_share = clock.experts / clock.total
        speed.dense_share = clock.dense / clock.total


class _Clock:
    """Adds up the times of a model's modules while it writes tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._begun: list[float] = []
        self._writes = False
        self.total = self.experts = self.dense = 0.0

    @contextmanager
    def running(self) -> Iterator[_Clock]:
        handles = self._watch(self._model, "total")
        parts: set[int] = set()
        for module in self._model.modules():
            kind = "experts" if isinstance(module, CpuExperts) else "dense"
            if id(module) not in parts and isinstance(module, (CpuExperts, *_DENSE)):
                parts |= {id(each) for each in module.modules()}
                handles += self._watch(module, kind)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, module: nn.Module, kind: str) -> list[Any]:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kind == "total":
                ids = kwargs.get("input_ids", args[0] if args else None)
                self._writes = ids is not None and ids.numel() == 1
            self._begun.append(time.perf_counter())

        def end(*_: Any) -> None:
            seconds = time.perf_counter() - self._begun.pop()
            if self._writes:
                setattr(self, kind, getattr(self, kind) + seconds)

        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end),
        ]
