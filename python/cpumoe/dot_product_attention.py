"""Attention on the CPU: softmax(scale q k^T + mask) v, for grouped heads."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from cpumoe import _core
from cpumoe._base.tensors import (
    address,
    is_recorded,
    modes_are_active,
    new_strided,
    plain,
    refuse_tracing,
)
from cpumoe._engine.attention_op import (
    NO_MASK,
    AttentionSettings,
    check_tensors,
    define_operator,
    record_attention,
)
from cpumoe._engine.gradients import without_gradients
from cpumoe._engine.output import ELEMENTS
from cpumoe.isa import select_isa
from cpumoe.runtime import Runtime, default_runtime

# Dynamo, which is about to trace the call, sees a function that returns True.
_seen_by_dynamo = torch.compiler.is_dynamo_compiling

_MASKS = {
    torch.bool: _core.MaskType.BOOL,
    torch.bfloat16: _core.MaskType.BF16,
    torch.float16: _core.MaskType.FP16,
    torch.float32: _core.MaskType.FP32,
}
_NOTHING = (0, 0, 0, 0)  # an address and strides

# The engine's calls by runtime and by the variant that was asked for.
_calls: WeakKeyDictionary[Runtime, dict[str | None, _core.AttentionCall]] = WeakKeyDictionary()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    runtime: Runtime | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    """Computes attention for inference, with all sums in fp32 and without a matrix of scores.

    Successive heads of `q` share a head of `k` and `v`. Keys and values are read once for all heads
    that share them. The result does not depend on the number of threads.

    ``torch.compile``, ``torch.export`` and tracers record the call as the operator
    ``torch.ops.cpumoe.attention``, which uses the default runtime and variant.

    Args:
        q: ``[batch, heads, queries, head_size]`` bf16, fp16 or fp32, with any strides.
        k: ``[batch, kv_heads, keys, head_size]`` in the dtype of `q`; kv_heads divides heads.
        v: ``[batch, kv_heads, keys, value_size]`` in the dtype of `q`.
        scale: what multiplies the products of queries and keys. Default: 1 / sqrt(head_size).
        causal: whether query t sees no key after ``t + keys - queries``, so that the last query
            sees the last key.
        window: of these keys, a query sees only the last `window`; 0: all. Needs `causal`.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask; 0: they stay.
        mask: ``[batch or 1, heads or 1, queries or 1, keys]``: bool, True where a query sees a key,
            or bf16, fp16 or fp32, which is added to the scores.
        sinks: ``[heads]``: a score of each head that takes part in the softmax and has no value, as
            in gpt-oss.
        runtime: the threads that compute; default: the shared ones.
        isa: the ISA variant; default: the one that `cpumoe.isa` names.

    Returns:
        ``[batch, heads, queries, value_size]`` in the dtype of `q`; its memory is
        ``[batch, queries, heads, value_size]``. A query that sees no key gets zeros. If an input
        requires a gradient, so does the result, and the backward pass through it raises
        RuntimeError.

    Raises:
        TypeError: a tensor has another dtype, device or layout, or no memory.
        ValueError: shapes do not fit together, or a number is out of range.
        RuntimeError: the runtime is closed, or belongs to the parent of a forked process.
    """
    settings = AttentionSettings(scale, causal, window, softcap)
    if _seen_by_dynamo():
        return record_attention(q, k, v, mask, sinks, settings)
    tensors = [tensor for tensor in (q, k, v, mask, sinks) if tensor is not None]
    try:
        return _compute(q, k, v, mask, sinks, settings, runtime, isa)
    except TypeError:
        if not is_recorded(*tensors):
            raise
        return record_attention(q, k, v, mask, sinks, settings)


def _compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    settings: AttentionSettings,
    runtime: Runtime | None = None,
    isa: str | None = None,
) -> torch.Tensor:
    settings.check()
    given = (q, k, v)
    q, k, v = (plain(t, name) for t, name in zip(given, "qkv", strict=True))
    mask = NO_MASK if mask is None else plain(mask, "mask")
    if sinks is not None:
        sinks = plain(sinks, "sinks")
    sizes = check_tensors(q, k, v, mask, sinks)
    if modes_are_active():
        refuse_tracing("q")
    batch, heads, _, queries, _, head_size, value_size = sizes
    q, k, v = _rows(q), _rows(k), _rows(v)
    shape = (batch, heads, queries, value_size)
    strides = (queries * heads * value_size, value_size, heads * value_size, 1)
    output, start = new_strided(shape, strides, q.dtype)
    mask_type, masked = _core.MaskType.NONE, _NOTHING
    if mask is not NO_MASK:
        mask = _rows(mask)
        mask_type, masked = _MASKS[mask.dtype], _view(mask, "mask")
    scores = None if sinks is None else sinks.detach().float().contiguous()
    _engine_call(runtime or default_runtime(), isa).run(
        ELEMENTS[q.dtype],
        sizes,
        _view(q, "q"),
        _view(k, "k"),
        _view(v, "v"),
        (start, *strides[:3]),
        head_size**-0.5 if settings.scale is None else settings.scale,
        settings.causal,
        settings.window,
        settings.softcap,
        mask_type,
        masked,
        0 if scores is None else address(scores, "sinks"),
    )
    return without_gradients(output, *given)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _view(tensor: torch.Tensor, name: str) -> tuple[int, int, int, int]:
    """Returns address and strides. A dimension of size 1 is repeated as often as needed."""
    shape, strides = tensor.shape, tensor.stride()
    batch, head, row = (0 if n == 1 else s for n, s in zip(shape[:3], strides[:3], strict=True))
    return address(tensor, name), batch, head, row


def _engine_call(runtime: Runtime, isa: str | None) -> _core.AttentionCall:
    calls = _calls.setdefault(runtime, {})
    call = calls.get(isa)
    if call is None:
        name, origin = select_isa(isa)
        call = calls[isa] = _core.AttentionCall(runtime=runtime.core, isa=name, origin=origin)
    return call


_LIBRARY = define_operator(_compute)
