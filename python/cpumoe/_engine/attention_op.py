"""``torch.ops.cpumoe.attention``: attention as compilers and tracers record it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch

from cpumoe._base.operators import define
from cpumoe._base.scalars import boolean, integer, number
from cpumoe._base.tensors import describe
from cpumoe._engine.gradients import refuse_derivatives
from cpumoe._engine.output import ELEMENTS

# Stands for no mask, so that a mask is always a tensor.
NO_MASK = torch.empty(0, dtype=torch.bool, device="cpu")
_LARGEST_WINDOW = 2**31  # of the engine
# The engine computes with the numbers in fp32, and divides by a soft cap.
_FP32 = torch.finfo(torch.float32)


class AttentionSettings(NamedTuple):
    """The numbers of a call; `cpumoe.attention` describes them."""

    scale: float | None
    causal: bool
    window: int
    softcap: float

    def check(self) -> None:
        """Raises TypeError or ValueError unless all values are possible together."""
        boolean(self.causal, "causal")
        if not 0 <= integer(self.window, "window") <= _LARGEST_WINDOW:
            raise ValueError(f"window: expected 0 to {_LARGEST_WINDOW}, got {self.window}")
        if self.window and not self.causal:
            raise ValueError(
                f"window: expected 0 without causal, got {self.window}; pass a mask for a window "
                "on both sides"
            )
        if self.scale is not None and not abs(number(self.scale, "scale")) <= _FP32.max:
            raise ValueError(f"scale: expected a finite number of fp32, got {self.scale}")
        cap = number(self.softcap, "softcap")
        if cap != 0 and not _FP32.tiny <= cap <= _FP32.max:
            raise ValueError(
                f"softcap: expected 0, or a number from {_FP32.tiny:.4g} to {_FP32.max:.4g}, which "
                f"fp32 holds, got {self.softcap}"
            )


Computation = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        torch.Tensor | None,
        AttentionSettings,
    ],
    torch.Tensor,
]


def check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[int, int, int, int, int, int, int]:
    """Checks dtypes and shapes; see `cpumoe.attention`. `mask` may be `NO_MASK`.

    Returns:
        batch, heads, kv_heads, queries, keys, head_size, value_size.
    """
    if q.dtype not in ELEMENTS:
        raise TypeError(f"q: expected bfloat16, float16 or float32, got {describe(q)}")
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {describe(tensor)}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected [batch, heads, rows, size], got {describe(tensor)}")
    batch, heads, queries, head_size = q.shape
    kv_heads, keys, value_size = k.shape[1], k.shape[2], v.shape[3]
    if not head_size or not heads:
        raise ValueError(f"q: expected at least one head of at least one element, got {[*q.shape]}")
    if k.shape != (batch, kv_heads, keys, head_size):
        wanted = [batch, "kv_heads", "keys", head_size]
        raise ValueError(f"k: expected {_shape(wanted)} like q, got {[*k.shape]}")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides {heads}, got {[*k.shape]}")
    if v.shape != (batch, kv_heads, keys, value_size) or not value_size:
        wanted = [batch, kv_heads, keys, "value_size"]
        raise ValueError(f"v: expected {_shape(wanted)} like k, got {[*v.shape]}")
    if mask is not NO_MASK:
        if mask.dtype != torch.bool and mask.dtype not in ELEMENTS:
            raise TypeError(
                f"mask: expected bool, bfloat16, float16 or float32, got {describe(mask)}"
            )
        wanted = [f"{batch} or 1", f"{heads} or 1", f"{queries} or 1", keys]
        fits = mask.dim() == 4 and mask.shape[3] == keys
        for i in range(3 if fits else 0):
            fits = fits and mask.shape[i] in (1, q.shape[i])
        if not fits:
            raise ValueError(f"mask: expected {_shape(wanted)}, got {[*mask.shape]}")
    if sinks is not None:
        if not sinks.is_floating_point():
            raise TypeError(f"sinks: expected floating point numbers, got {describe(sinks)}")
        if sinks.shape != (heads,):
            raise ValueError(f"sinks: expected [{heads}], one for each head, got {[*sinks.shape]}")
    return batch, heads, kv_heads, queries, keys, head_size, value_size


def _shape(sizes: list[object]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def record_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    settings: AttentionSettings,
) -> torch.Tensor:
    """Calls the operator in code that is being traced; see `cpumoe.attention`."""
    scale, causal, window, softcap = settings
    result = torch.ops.cpumoe.attention(
        q, k, v, mask, sinks, scale=scale, causal=causal, window=window, softcap=softcap
    )
    return cast("torch.Tensor", result)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    if q.device.type not in ("cpu", "meta"):
        raise TypeError(f"q: expected a CPU tensor, got device {q.device}")
    AttentionSettings(scale, causal, window, softcap).check()
    check_tensors(q, k, v, NO_MASK if mask is None else mask, sinks)
    batch, heads, queries, _ = q.shape
    value_size = v.shape[3]
    strides = (queries * heads * value_size, value_size, heads * value_size, 1)
    return q.new_empty_strided((batch, heads, queries, value_size), strides)


def define_operator(compute: Computation) -> torch.library.Library:
    """Defines the operator.

    Args:
        compute: does what `cpumoe.attention` does, without tracers.

    Returns:
        What PyTorch forgets the operator with.
    """

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        *,
        scale: float | None = None,
        causal: bool = False,
        window: int = 0,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        with torch.no_grad():  # gradients are the business of refuse_derivatives
            return compute(q, k, v, mask, sinks, AttentionSettings(scale, causal, window, softcap))

    library = define(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, *, "
        "float? scale=None, bool causal=False, int window=0, float softcap=0.0) -> Tensor",
        run,
        _fake,
    )
    refuse_derivatives("attention", library, inputs=(0, 1, 2, 3, 4))
    return library
