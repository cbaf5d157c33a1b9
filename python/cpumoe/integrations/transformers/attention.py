"""``attn_implementation="cpumoe"``: cpumoe computes a model's attention.

transformers' models compute attention by a function, whose definition is `eager_attention_forward`
in a model's own file. A module's attention becomes cpumoe's when both compute the same from random
inputs. What cpumoe does not compute at all goes to the definition: gradients, dropout, attention
weights as a result, other devices and dtypes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import cpumoe
from cpumoe.integrations.transformers.plain_mask import PlainMask, plain_or_whole_mask, whole
from cpumoe.integrations.transformers.trial import let_model_write

IMPLEMENTATION = "cpumoe"
_HOSTS = ("eager", "sdpa")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Arguments of modules that do not concern attention. They reach every attention function.
_PASSED_ON = frozenset(
    (
        "cache",
        "cache_position",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
# A model that asks for the name of its attention function may compute something else for ours.
_ASKS = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")
_TOLERANCE = 1e-4
_TAKES = "it takes"  # how the reason begins if an argument is not known


@dataclass
class AttentionModules:
    """What became of a model's attention.

    Attributes:
        ours: names of the modules whose attention cpumoe computes.
        hosts: names of the other modules, or "model", and why each stays the host's.
    """

    ours: list[str] = field(default_factory=list)
    hosts: dict[str, str] = field(default_factory=dict)


@dataclass
class _Known:
    """What is known of a module.

    Attributes:
        options: who computes, and on which variant.
        verdicts: why its attention is the host's, empty if it is cpumoe's, by settings of calls.
    """

    options: cpumoe.ExpertsOptions
    verdicts: dict[object, str] = field(default_factory=dict)


@dataclass
class _Trial:
    """A model that is being tried: its modules' options, and what was found in each."""

    options: cpumoe.ExpertsOptions
    found: dict[nn.Module, str] = field(default_factory=dict)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_trial: ContextVar[_Trial | None] = ContextVar("cpumoe_attention_trial", default=None)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes a module's attention. transformers defines the signature.

    Args:
        module: the module that calls.
        query: ``[batch, heads, queries, size]``.
        key: ``[batch, kv_heads, keys, size]``.
        value: ``[batch, kv_heads, keys, value_size]``.
        attention_mask: what `plain_or_whole_mask` made, a tensor that is added to scores, or None.
        dropout: the probability with which weights are dropped in training.
        scaling: what multiplies scores; None: ``1 / sqrt(size)``.
        is_causal: whether a query sees no later key where there is no mask; None: as the module
            says.
        softcap: see `cpumoe.attention`; None: scores stay.
        s_aux: the sinks, ``[heads]``.
        **kwargs: what else the module was called with.

    Returns:
        ``[batch, queries, heads, value_size]`` and None; attention weights where they are wanted.
    """
    settings = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    given = {name: value for name, value in settings.items() if value is not None}
    if is_causal is not None:
        given["is_causal"] = is_causal
    if torch.compiler.is_compiling():  # Dynamo cannot trace what follows
        return _by_host(module, query, key, value, attention_mask, dropout, given | kwargs)
    known = _known_module(module)
    tensors = (query, key, value)
    reason = _obstacle(module, tensors, dropout, is_causal, attention_mask, s_aux, kwargs)
    if not reason:
        reason = _verdict(module, known, tensors, settings, kwargs)
    trial = _trial.get()
    if trial is not None:
        trial.found[module] = trial.found.get(module) or reason
    elif reason.startswith(_TAKES):
        # The model may leave to these arguments what it tells other functions by the mask.
        raise ValueError(
            f"{type(module).__name__}: expected arguments of attention that cpumoe knows, but "
            f"{reason}; load the model with another attn_implementation"
        )
    if reason:
        return _by_host(module, query, key, value, attention_mask, dropout, given | kwargs)
    result = _by_cpumoe(known.options, query, key, value, attention_mask, settings)
    return result.transpose(1, 2), None


def _known_module(module: nn.Module) -> _Known:
    trial = _trial.get()
    known = _known.get(module)
    if known is None or (trial is not None and known.options is not trial.options):
        options = cpumoe.ExpertsOptions() if trial is None else trial.options
        known = _known[module] = _Known(options)
    return known


def _by_cpumoe(
    options: cpumoe.ExpertsOptions,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    settings: dict[str, Any],
) -> torch.Tensor:
    plain = isinstance(mask, PlainMask)
    return cpumoe.attention(
        query,
        key,
        value,
        scale=settings["scaling"],
        causal=plain,
        window=mask.window if isinstance(mask, PlainMask) else 0,
        softcap=settings["softcap"] or 0.0,
        mask=None if plain else mask,
        sinks=settings["s_aux"],
        runtime=options.runtime,
        isa=options.isa,
    )


def _by_host(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    eager = _definition(module)
    # Without a mask, only sdpa knows whether attention is causal.
    compute = sdpa_attention_forward if mask is None or eager is None else eager
    kwargs.setdefault("scaling", query.shape[-1] ** -0.5)
    if compute is sdpa_attention_forward and kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__}: expected an attention function that knows sinks in the "
            'file of the model, got none; load the model with attn_implementation="eager"'
        )
    result: tuple[torch.Tensor, torch.Tensor | None] = compute(
        module, query, key, value, whole(mask), dropout=dropout, **kwargs
    )
    return result


def _definition(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the function that defines a module's attention, if its file has one."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _obstacle(
    module: nn.Module,
    tensors: tuple[torch.Tensor, ...],
    dropout: float,
    is_causal: bool | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> str:
    """Returns why this call must be the host's; empty if cpumoe may compute it."""
    query, key, _ = tensors
    if dropout:
        return "weights are dropped in training"
    numbers = [*tensors, sinks, None if isinstance(mask, PlainMask) else mask]
    if torch.is_grad_enabled() and any(n is not None and n.requires_grad for n in numbers):
        return "gradients are wanted"
    if kwargs.get("output_attentions"):
        return "attention weights are wanted"
    if not all(tensor.is_cpu and tensor.dtype == query.dtype for tensor in tensors):
        return "tensors are not all on the CPU, or differ in dtype"
    if query.dtype not in _DTYPES:
        return f"its dtype is {query.dtype}"
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] > 1:
            return "there is no mask, but attention is causal"
    elif mask.dim() != 4 or mask.shape[3] != key.shape[2]:
        return "the mask has another number of keys"
    return ""


def _unknown(kwargs: dict[str, Any]) -> list[str]:
    """Returns the names of arguments that may change what attention computes."""
    return [
        name
        for name, value in kwargs.items()
        if name not in _PASSED_ON
        and name not in ("sliding_window", "output_attentions")
        and value is not None
        and value is not False
    ]


def _verdict(
    module: nn.Module,
    known: _Known,
    tensors: tuple[torch.Tensor, ...],
    settings: dict[str, Any],
    kwargs: dict[str, Any],
) -> str:
    """Returns why a module's attention is the host's, and tries it if it is called so first."""
    unknown = _unknown(kwargs)
    if unknown:
        return f"{_TAKES} {', '.join(unknown)}"
    sizes = tuple(tensor.shape[1::2] for tensor in tensors)
    call = (settings["scaling"], settings["softcap"], settings["s_aux"] is None, sizes)
    if call not in known.verdicts:
        known.verdicts[call] = _try(module, known.options, tensors, settings, kwargs)
    return known.verdicts[call]


def _try(
    module: nn.Module,
    options: cpumoe.ExpertsOptions,
    tensors: tuple[torch.Tensor, ...],
    settings: dict[str, Any],
    kwargs: dict[str, Any],
) -> str:
    """Compares cpumoe's attention with the definition, from few random numbers."""
    definition = _definition(module)
    if definition is None:
        return "its file does not define attention"
    rng = torch.Generator("cpu").manual_seed(0)
    queries, keys = 3, 5
    q, k, v = (
        torch.randn(
            (2, tensor.shape[1], rows, tensor.shape[3]),
            generator=rng,
            dtype=torch.float32,
            device="cpu",
        )
        for tensor, rows in zip(tensors, (queries, keys, keys), strict=True)
    )
    mask = torch.randn((2, 1, queries, keys), generator=rng, dtype=torch.float32, device="cpu")
    mask[:, :, 0, 3:] = torch.finfo(torch.float32).min
    given = {name: value for name, value in settings.items() if value is not None}
    given.setdefault("scaling", q.shape[-1] ** -0.5)
    given["sliding_window"] = kwargs.get("sliding_window")
    try:
        with torch.no_grad():
            expected = definition(module, q, k, v, mask, dropout=0.0, **given)[0].float()
            actual = _by_cpumoe(options, q, k, v, mask, settings).transpose(1, 2)
    except Exception as error:  # whatever a model's own function refuses
        return f"its attention cannot be tried: {error}"
    if expected.shape != actual.shape:
        return "its attention has a result of another shape"
    if not ((actual - expected).norm() <= _TOLERANCE * expected.norm()):
        return "its attention computes something else"
    return ""


def swap_attention(model: Any, options: cpumoe.ExpertsOptions) -> AttentionModules:
    """Lets cpumoe compute a model's attention, as far as it computes the same.

    The model reads two tokens and writes two. If a module is called with arguments that may change
    what attention computes, or if no module asks for its attention function, the model stays as it
    was.

    Args:
        model: a model of transformers, with weights.
        options: threads and variant.
    """
    done = AttentionModules()
    reason = _refusal(model)
    if reason:
        done.hosts["model"] = reason
        return done
    before = _implementations(model)
    model.set_attn_implementation(IMPLEMENTATION)
    trial = _Trial(options)
    names = {module: name for name, module in model.named_modules()}
    try:
        with _trying(trial):
            let_model_write(model)
        if not trial.found:
            reason = "it does not ask for its attention function"
        elif not all(module in names for module in trial.found):
            reason = "parts of it cannot be named"
    except Exception as error:  # whatever a model refuses
        reason = f"it cannot be tried: {error}"
    # An argument that attention does not know may be there because of ours.
    unknown = (why for why in trial.found.values() if why.startswith(_TAKES))
    reason = reason or next(unknown, "")
    if reason:
        _restore(model, before)
        done.hosts["model"] = reason
        return done
    for module, why in trial.found.items():
        if why:
            done.hosts[names[module]] = why
        else:
            done.ours.append(names[module])
    if not done.ours:
        _restore(model, before)
    return done


@contextmanager
def _trying(trial: _Trial) -> Iterator[None]:
    token = _trial.set(trial)
    try:
        yield
    finally:
        _trial.reset(token)


def _refusal(model: Any) -> str:
    """Returns why a model cannot even be tried."""
    if not model._can_set_attn_implementation():
        return "its attention is not a function that can be chosen"
    if model.config._attn_implementation not in _HOSTS:
        return f"its attention is {model.config._attn_implementation!r}"
    for module in {type(each).__module__ for each in model.modules()}:
        if ".models." in module and _ASKS.search(inspect.getsource(sys.modules[module])):
            return "it asks which attention it has"
    return ""


def _implementations(model: Any) -> list[tuple[Any, str]]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [(config, config._attn_implementation) for config in configs.values()]


def _restore(model: Any, before: list[tuple[Any, str]]) -> None:
    for config, implementation in before:
        config._attn_implementation_internal = implementation


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, plain_or_whole_mask)
