"""Computes a model's RMS norms in one operation each, instead of eight of the model's own code.

An RMS norm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019) is
``y = x / sqrt(mean(x^2) + eps) * scale`` over the last dimension, where the scale is the weight, 1
plus the weight, or absent. A module becomes one that computes this in fp32 and rounds once, if a
trial with random weights proves that its class computes this, whatever the class and its attributes
are called. The module keeps its parameters, its attributes and its hooks. Calls that the trial does
not cover go to the module's own code.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

import cpumoe
from cpumoe._engine.plain_ops import rms_norm
from cpumoe.runtime import default_runtime

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp32 results may differ by the roundings of a long sum and of a few products. A host that rounds
# to a narrower dtype on the way does so at most four times, each time by half of `eps`.
_TOLERANCES = {
    dtype: 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps for dtype in _DTYPES
}
_WIDTHS = (5, 64)  # of inputs of norms without a weight, which have any width
_FORMULA = "_cpumoe_formula"
_ONE_PLUS, _ROUNDED = "one plus", "one plus, rounded"


def _one_plus(weight: torch.Tensor) -> torch.Tensor:
    return 1 + weight.float()


def _one_plus_rounded(weight: torch.Tensor) -> torch.Tensor:
    return 1 + weight


# What the host may make of the weight of a norm. Every entry keeps the weight's roundings.
_SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "weight": lambda weight: weight,
    _ONE_PLUS: _one_plus,
    _ROUNDED: _one_plus_rounded,
}


@dataclass
class NormModules:
    """What became of a model's norms.

    Attributes:
        ours: names of the modules that cpumoe computes.
        hosts: names of the other modules that may be norms, and why each stays the host's.
    """

    ours: list[str] = field(default_factory=list)
    hosts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Formula:
    """What a norm computes.

    Attributes:
        eps: what is added to the mean of squares.
        weight: name of the parameter; empty: there is none.
        dtype: the dtype of the parameter in the trial.
        scale: a key of `_SCALES`.
        runtime: threads for many rows; None: the shared ones.
        inputs: dtypes of inputs that the trial covers. A result has the dtype of its input.
    """

    eps: float
    weight: str
    dtype: torch.dtype | None
    scale: str
    runtime: cpumoe.Runtime | None
    inputs: tuple[torch.dtype, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Formula:
        """Returns itself, because a runtime has no copies."""
        return self

    def covers(self, x: torch.Tensor, weight: torch.Tensor | None) -> bool:
        """Whether the trial covers an input, with the weight that the norm has now."""
        if x.dtype not in self.inputs or not x.is_cpu:
            return False
        return weight is None or (weight.dtype == self.dtype and weight.shape == x.shape[-1:])

    def compute(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Returns what the norm computes, rounded once to the dtype of `x`."""
        if self.scale != _ROUNDED:
            threads = (self.runtime or default_runtime()).core
            one_plus = self.scale == _ONE_PLUS
            result = rms_norm(x, weight, self.eps, one_plus=one_plus, runtime=threads)
            if result is not None:
                return result
        return self._by_torch(x, weight)

    def _by_torch(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        scale = None if weight is None else _SCALES[self.scale](weight)
        shape = x.shape[-1:]
        if scale is None or scale.dtype == x.dtype:
            return nn.functional.rms_norm(x, shape, scale, self.eps)
        normed = nn.functional.rms_norm(x.float(), shape, scale.float(), self.eps)
        return normed.to(x.dtype)


class _OneOperation(nn.Module):
    """Comes before a norm's own class, and computes the calls that a trial covers."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        formula: _Formula = self.__dict__[_FORMULA]
        if len(args) == 1 and not kwargs and not self.training:
            x = args[0]
            weight = getattr(self, formula.weight) if formula.weight else None
            if formula.covers(x, weight):
                return formula.compute(x, weight)
        return super().forward(*args, **kwargs)


def swap_norms(model: nn.Module, runtime: cpumoe.Runtime | None = None) -> NormModules:
    """Lets one operation compute each of a model's RMS norms.

    Args:
        model: a model with weights.
        runtime: threads for norms of many rows; default: the shared ones.

    Returns:
        What was replaced, and what was not.
    """
    done = NormModules()
    found: dict[object, _Formula | None] = {}
    for name, module in model.named_modules():
        if not _may_be_norm(module):
            continue
        reason = _obstacle(module)
        if not reason:
            kind = _kind(module)
            if kind is None or kind not in found:
                found[kind] = _formula_of(module, runtime)
            formula = found[kind]
            if formula is None:
                reason = "it computes something else"
            else:
                module.__dict__[_FORMULA] = formula
                own: Any = type(module)
                module.__class__ = _with_one_operation(own)
        if reason:
            done.hosts[name] = reason
        else:
            done.ours.append(name)
    return done


@functools.cache
def _with_one_operation(own: type[nn.Module]) -> type[nn.Module]:
    # Hosts look at names of classes.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (_OneOperation, own), names)


def _may_be_norm(module: nn.Module) -> bool:
    """Whether a module of a host's class has a number, and besides at most a vector."""
    own = type(module).__module__.partition(".")[0]
    return (
        own not in ("torch", __name__.partition(".")[0])
        and not isinstance(module, _OneOperation)
        and not _present(module._modules)
        and not _present(module._buffers)
        and len(weights := _present(module._parameters)) <= 1
        and all(weight.dim() == 1 for weight in weights.values())
        and any(type(value) is float for value in vars(module).values())
    )


def _present(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if part is not None}


def _obstacle(module: nn.Module) -> str:
    """Returns why a module must stay the host's, whatever it computes; empty if it need not."""
    if "forward" in vars(module):
        return "something has replaced its forward"
    for weight in _present(module._parameters).values():
        if type(weight) is not nn.Parameter or not weight.is_cpu or weight.dtype not in _DTYPES:
            return f"its weight is {weight.dtype} on {weight.device}"
    return ""


def _kind(module: nn.Module) -> object:
    """Returns what modules that compute the same have in common; None: it is not known."""
    weights = _present(module._parameters)
    values = {
        name: value
        for name, value in vars(module).items()
        if name not in _MACHINERY and name != "training"
    }
    if not all(type(value) in (bool, int, float, str, type(None)) for value in values.values()):
        return None
    shapes = tuple((name, weight.shape, weight.dtype) for name, weight in weights.items())
    # True and 1 are equal, and so are numbers of different types.
    return type(module), shapes, tuple((n, type(v), v) for n, v in sorted(values.items()))


_MACHINERY = frozenset(vars(nn.Module()))


def _formula_of(module: nn.Module, runtime: cpumoe.Runtime | None) -> _Formula | None:
    """Tries a module, and returns the formula that it computes, if it is an RMS norm."""
    rng = torch.Generator("cpu").manual_seed(0)
    trial = copy.copy(module)  # shares its parts with the module until it gets its own
    trial.__dict__["training"] = False
    names = [*_present(module._parameters)]
    weight = None
    if names:
        own = module._parameters[names[0]]
        assert own is not None
        weight = _random(own.shape, rng).to(own.dtype)
        parameters = {**module._parameters, names[0]: nn.Parameter(weight)}
        trial.__dict__["_parameters"] = parameters
    numbers = {value for value in vars(module).values() if type(value) is float and value >= 0}
    for eps in sorted(numbers):
        for scale in _SCALES if names else ("weight",):
            dtype = None if weight is None else weight.dtype
            formula = _Formula(eps, names[0] if names else "", dtype, scale, runtime)
            inputs = tuple(dtype for dtype in _DTYPES if _computes(trial, formula, weight, dtype))
            if torch.float32 in inputs:  # only fp32 tells formulas from one another
                return replace(formula, inputs=inputs)
    return None


def _computes(
    trial: nn.Module, formula: _Formula, weight: torch.Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether a module computes a formula from random numbers of a dtype."""
    limits = torch.finfo(dtype)
    tiny = 8 * limits.tiny * limits.eps  # results may be subnormal numbers
    with torch.no_grad():
        for x in _inputs(formula.eps, weight):
            x = x.to(dtype)
            expected = _exact(x, formula, weight)
            try:
                results = trial.forward(x.clone()), formula.compute(x, weight)
            except Exception:  # whatever the class refuses
                return False
            for result in results:
                if not isinstance(result, torch.Tensor) or result.dtype != dtype:
                    return False
                if result.shape != x.shape:
                    return False
                difference = (result.double() - expected).abs()
                if not (difference <= _TOLERANCES[dtype] * expected.abs() + tiny).all():
                    return False
    return True


def _inputs(eps: float, weight: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Yields inputs whose rows differ in size, so that eps counts in some and not in others."""
    rng = torch.Generator("cpu").manual_seed(1)
    small = max(eps, 1e-12) ** 0.5
    sizes = torch.tensor(
        [1.0, small, 0.3 * small, 30.0, 8 * small, 300.0], dtype=torch.float32, device="cpu"
    )
    for width in _WIDTHS if weight is None else weight.shape:
        x = _random((len(sizes), width), rng) * sizes[:, None]
        x[0, : width // 2] = 0
        yield x
        yield (x + 0.7 * sizes[:, None]).view(1, 2, 3, width)
        yield x[3:4, None]


def _exact(x: torch.Tensor, formula: _Formula, weight: torch.Tensor | None) -> torch.Tensor:
    exact = x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + formula.eps).sqrt()
    return exact if weight is None else exact * _SCALES[formula.scale](weight).double()


def _random(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu")
