"""Attention masks that exist only where somebody looks at them.

transformers makes a mask ``[batch, 1, queries, keys]`` for a whole pass, which for long prompts is
the largest tensor of all. Where a mask says no more than "causal, within a window", cpumoe's
attention needs only these words. A `PlainMask` holds them, and becomes the whole mask as soon as
any other code computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    causal_mask_function,
    eager_mask,
    prepare_padding_mask,
    sliding_window_causal_mask_function,
)
from typing_extensions import override

_Tensor = torch.Tensor
# What does not depend on a mask's numbers.
_HARMLESS = frozenset(
    getattr(_Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cpu")
) | {_Tensor.dim, _Tensor.size, _Tensor.is_floating_point}


class PlainMask(torch.Tensor):
    """The mask of causal attention whose last query sees the last key.

    Attributes:
        window: how many keys a query sees at most; 0: all before it.
    """

    window: int
    _make: Callable[[], torch.Tensor]
    _whole: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[PlainMask],
        shape: Sequence[int],
        dtype: torch.dtype,
        window: int,
        make: Callable[[], torch.Tensor],
    ) -> PlainMask:
        """Makes a mask without numbers; `make` returns the numbers."""
        nothing = torch.empty((), dtype=dtype, device="cpu").expand(tuple(shape))
        mask: PlainMask = _Tensor._make_subclass(cls, nothing)
        mask.window, mask._make, mask._whole = window, make, None
        return mask

    def whole(self) -> torch.Tensor:
        """Returns the mask's numbers: zero where a query sees a key, else the dtype's least."""
        if self._whole is None:
            self._whole = self._make()
        return self._whole

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _HARMLESS:
            args, kwargs = tree_map(whole, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def whole(mask: Any) -> Any:
    """Returns a `PlainMask` as an ordinary tensor, and anything else as it is."""
    return mask.whole() if isinstance(mask, PlainMask) else mask


def plain_or_whole_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Makes a mask, as transformers' `eager_mask`, which describes the arguments.

    Returns:
        A `PlainMask` if nothing but causality and a window restricts what queries see. Else what
        `eager_mask` returns: a mask that is added to scores, or None if all see all.
    """

    def make() -> torch.Tensor:
        mask: torch.Tensor = eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            dtype=dtype,
            **kwargs,
        )
        return mask

    # transformers allows masks to be left out only if nothing was added to the mask function.
    if (
        not allow_is_causal_skip
        or use_vmap
        or torch.compiler.is_compiling()
        or torch.device(kwargs.get("device", "cpu")).type != "cpu"
        or not isinstance(q_offset, int)
        or q_offset + q_length != kv_offset + kv_length
        or not _all_seen(attention_mask, kv_length, kv_offset)
    ):
        return make()
    window = 0
    if mask_function is not causal_mask_function:
        window = local_size or 0
        if not window or not _is_window(mask_function, window, q_offset, q_length, kv_offset):
            return make()
    return PlainMask((batch_size, 1, q_length, kv_length), dtype, window, make)


def _all_seen(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> bool:
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return padding is None or bool(padding[:, kv_offset : kv_offset + kv_length].all())


def _is_window(
    function: Callable[..., Any], window: int, first: int, queries: int, first_key: int
) -> bool:
    """Whether a mask function is that of a window, and not of chunks.

    Each query is tried with the keys at both ends of its window, inside and outside.
    """
    query = torch.arange(first, first + queries, device="cpu")[None, None, :, None]
    ends = torch.tensor([-window, 1 - window, 0, 1], device="cpu")
    key = query + ends
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device="cpu")
    expected = sliding_window_causal_mask_function(window)(nothing, nothing, query, key)
    actual = function(nothing, nothing, query, key)
    exists = (key >= first_key) & (key < first + queries)
    return bool(((actual == expected) | ~exists).all())
