"""Recognizes the gated linear unit that an experts module of transformers computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import nn

from cpumoe.numerics.glu import GLU, SwiGLU

# Probes lie around zero, where gates differ most, and far enough away to show a limit whose name in
# the module is unknown. They are float64: in float32, 1 + erf(gate) is mostly rounding error where
# gelu is small, and a large up magnifies it.
_FAR = [10 ** (2 + i / 2) for i in range(9)]
_PROBES = [*range(-48, 49), *(i / 10 for i in range(-10, 11)), *_FAR, *(-far for far in _FAR)]


# The functions of experts without a gate projection.
_UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class _Gate(Protocol):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor: ...


def module_activation(module: nn.Module) -> GLU:
    """Returns the activation of an experts module, recognized by its results.

    The module's `_apply_gate` (transformers 5.23, ``integrations/moe.py``) is evaluated on a grid
    of gate and up values and compared with each `GLU` that the module's `alpha` and `limit` allow.
    So an unknown model that gates like a known one needs no code here, and one with another gate is
    refused.

    Raises:
        ValueError: no `GLU` fits. The message names the module's class.
    """
    name = type(module).__name__
    if not getattr(module, "has_gate", True):
        return _without_gate(module)
    # transformers may run this while new tensors go to the meta device, and the caller may have
    # chosen another default dtype or autocast.
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        beyond = 2 * (_limit(module) or 0)
        probes = torch.tensor([*_PROBES, -beyond, beyond], dtype=torch.float64, device="cpu")
        gate, up = (grid.flatten() for grid in torch.meshgrid(probes, probes, indexing="ij"))
        # With one feature, [gate; up] and interleaved columns are equal.
        gate_up = torch.stack((gate, up), -1)
        actual = cast("_Gate", module)._apply_gate(gate_up)[..., 0].double()
        for candidate in _candidates(module):
            if torch.allclose(actual, candidate(gate, up), rtol=1e-5, atol=1e-6):
                return candidate
    raise ValueError(
        f"{name}._apply_gate: cpumoe does not have this activation; expected f(gate) * up, where f "
        f"is silu, gelu, gelu_tanh, relu or relu2, with or without a limit, silu with soft caps, "
        f"or (up + 1) * gate * sigmoid(alpha * gate) with a limit"
    )


def _without_gate(module: nn.Module) -> GLU:
    """Returns the `GLU` without a gate that the module's `act_fn` computes."""
    up = torch.tensor(_PROBES, dtype=torch.float64, device="cpu")
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        actual = cast("nn.Module", module.act_fn)(up).double()
        for function in _UNGATED:
            candidate = GLU(function, gated=False)
            if torch.allclose(actual, candidate(up, up), rtol=1e-5, atol=1e-6):
                return candidate
    raise ValueError(
        f"{type(module).__name__}: experts without a gate projection are supported only with the "
        f"activations {', '.join(_UNGATED)}, got {type(module.act_fn).__name__}"
    )


def _candidates(module: nn.Module) -> Iterator[GLU]:
    alpha = _attribute(module, "alpha", "swiglu_alpha")
    yield SwiGLU()
    for limit in {_limit(module), None}:
        for function in ("gelu", "gelu_tanh", "relu", "relu2"):
            yield GLU(function, limit=limit)
        for some_alpha in {alpha or 1.0, 1.0}:
            for offset in (0.0, 1.0):
                yield SwiGLU(alpha=some_alpha, limit=limit, up_offset=offset)
    gate_cap, up_cap = (_softcap(module, name) for name in ("gate_softcap", "up_softcap"))
    if gate_cap and up_cap:
        yield GLU("softcapped_silu", gate_cap=gate_cap, up_cap=up_cap)


def _softcap(module: nn.Module, name: str) -> float | None:
    act_fn = getattr(module, "act_fn", None)
    return _attribute(getattr(act_fn, name, None), "softcap")


def _limit(module: nn.Module) -> float | None:
    return _attribute(module, "limit", "swiglu_limit")


def _attribute(module: object, *names: str) -> float | None:
    """Returns the first of the attributes that is a positive finite number."""
    values = (getattr(module, name, None) for name in names)
    numbers = (float(value) for value in values if isinstance(value, (int, float)))
    return next((number for number in numbers if 0 < number < math.inf), None)
