"""Attention on the CPU: softmax(scale q k^T + mask) v, for grouped heads."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from cpumoe import _core
from cpumoe._base.tensors import (
    contiguous,
    is_recorded,
    located,
    modes_are_active,
    new_strided,
    plain,
    refuse_tracing,
    rows_view,
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
from cpumoe.isa import check_isa, select_isa
from cpumoe.runtime import Runtime, check_runtime, default_runtime

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

    Successive heads of `q` share a head of `k` and `v`. Keys and values are not repeated for these
    heads. The result does not depend on the number of threads.

    ``torch.compile``, ``torch.export`` and tracers record the call as the operator
    ``torch.ops.cpumoe.attention``, which uses the default runtime and variant.

    Args:
        q: ``[batch, heads, queries, head_size]`` bf16, fp16 or fp32, with any strides.
        k: ``[batch, kv_heads, keys, head_size]`` in the dtype of `q`; kv_heads divides heads.
        v: ``[batch, kv_heads, keys, value_size]`` in the dtype of `q`.
        scale: what multiplies the products of queries and keys. Default: 1 / sqrt(head_size).
        causal: whether query t sees no key after ``t + keys - queries``, so that the last query
            sees the last key.
        window: of these keys, a query sees only the last `window`, at most 2^31; 0: all. Needs
            `causal`.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask; 0: they stay.
            Other numbers are normal numbers of fp32.
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
        TypeError: a tensor has another dtype, device or layout, or no memory; another argument is
            of another type.
        ValueError: shapes do not fit together, a number is out of range, or this CPU cannot run the
            variant.
        RuntimeError: the runtime is closed, or belongs to the parent of a forked process.
    """
    settings = AttentionSettings(scale, causal, window, softcap)
    if _seen_by_dynamo():
        return record_attention(q, k, v, mask, sinks, settings)
    try:
        return _compute(q, k, v, mask, sinks, settings, runtime, isa)
    except TypeError:
        if not is_recorded(*(tensor for tensor in (q, k, v, mask, sinks) if tensor is not None)):
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
    check_runtime(runtime)
    check_isa(isa)
    given = [tensor for tensor in (q, k, v, mask, sinks) if tensor is not None]
    (q, q_start), (k, k_start), (v, v_start) = (
        located(tensor, name) for tensor, name in ((q, "q"), (k, "k"), (v, "v"))
    )
    mask_start = 0
    if mask is None:
        mask = NO_MASK
    else:
        mask, mask_start = located(mask, "mask")
    sinks_start = 0
    if sinks is not None:
        sinks = plain(sinks, "sinks").detach()
    sizes = check_tensors(q, k, v, mask, sinks)
    if modes_are_active():
        refuse_tracing("q")
    if sinks is not None:
        fp32 = sinks if sinks.dtype == torch.float32 else sinks.float()
        sinks, sinks_start, _ = contiguous(fp32, "sinks")
    batch, heads, _, queries, _, head_size, value_size = sizes
    shape = (batch, heads, queries, value_size)
    strides = (queries * heads * value_size, value_size, heads * value_size, 1)
    output, start = new_strided(shape, strides, q.dtype)
    # Copies of rows that are not contiguous must live until the end of the call.
    q, queries_view = rows_view(q, q_start)
    k, keys_view = rows_view(k, k_start)
    v, values_view = rows_view(v, v_start)
    mask_type, mask_view = _core.MaskType.NONE, _NOTHING
    if mask is not NO_MASK:
        mask_type = _MASKS[mask.dtype]
        mask, mask_view = rows_view(mask, mask_start)
    _engine_call(runtime or default_runtime(), isa).run(
        ELEMENTS[q.dtype],
        sizes,
        queries_view,
        keys_view,
        values_view,
        (start, *strides[:3]),
        head_size**-0.5 if settings.scale is None else settings.scale,
        settings.causal,
        settings.window,
        settings.softcap,
        mask_type,
        mask_view,
        sinks_start,
    )
    return without_gradients(output, *given)


def _engine_call(runtime: Runtime, isa: str | None) -> _core.AttentionCall:
    calls = _calls.setdefault(runtime, {})
    call = calls.get(isa)
    if call is None:
        name, origin = select_isa(isa)
        call = calls[isa] = _core.AttentionCall(runtime=runtime.core, isa=name, origin=origin)
    return call


_LIBRARY = define_operator(_compute)
