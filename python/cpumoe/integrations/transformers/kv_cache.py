"""A cache of keys and values with spare room.

transformers' `DynamicCache` copies all keys and values of a layer for each new token. Here a layer
has room for more tokens than it holds, and doubles the room when it is full.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES
from typing_extensions import override

# What transformers calls the cache of a call; 5.24 warns of the older name.
CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"
# The least room of a layer, in tokens.
_LEAST_ROOM = 256


class _Rows:
    """Keys or values ``[batch, heads, tokens, size]``, the middle of a larger tensor."""

    def __init__(self) -> None:
        """Makes no room yet."""
        self._room: torch.Tensor | None = None
        self._begin = 0  # of the rows that were kept last, in `_room`
        self._kept: torch.Tensor | None = None

    def append(self, kept: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """Returns kept and new rows, one after the other.

        Args:
            kept: the rows that were returned last, or a part of them, or others.
            new: the rows to add.
        """
        count = 0 if kept is None or kept.dim() != 4 else kept.shape[2]
        end = count + new.shape[2]
        begin = self._place(kept) if count else 0
        room = self._room
        if (
            room is None
            or begin is None
            or begin + end > room.shape[2]
            or room.dtype != new.dtype
            or (room.shape[0], room.shape[1], room.shape[3])
            != (new.shape[0], new.shape[1], new.shape[3])
            # PyTorch forbids changes of such tensors outside of inference mode.
            or (room.is_inference() and not torch.is_inference_mode_enabled())
        ):
            begin = 0
            # Rows that have moved to the end of the room move to its beginning.
            fits = room is not None and room.shape[2] >= 2 * end
            size = room.shape[2] if room is not None and fits else max(2 * end, _LEAST_ROOM)
            room = new.new_empty((new.shape[0], new.shape[1], size, new.shape[3]))
            if kept is not None and count:
                room[:, :, :count] = kept
            self._room = room
        room[:, :, begin + count : begin + end] = new
        return room[:, :, begin : begin + end]

    def _place(self, kept: torch.Tensor | None) -> int | None:
        """Returns where some rows begin in the room; None if they are not in it."""
        room = self._room
        if room is None or kept is None or kept.stride() != room.stride():
            return None
        first = int(kept.storage_offset()) - int(room.storage_offset())
        if kept.untyped_storage().data_ptr() != room.untyped_storage().data_ptr() or first < 0:
            return None
        begin, rest = divmod(first, room.stride(2))
        return begin if not rest and begin + kept.shape[2] <= room.shape[2] else None


class GrowingLayer(DynamicLayer):
    """A layer of the cache that keeps all tokens."""

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        """Makes an empty layer."""
        super().__init__(**kwargs)
        self._key_rows, self._value_rows = _Rows(), _Rows()

    @override
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _is_differentiated(key_states, value_states):
            states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = keys = self._key_rows.append(self.keys, key_states)
        self.values = values = self._value_rows.append(self.values, value_states)
        return keys, values


class GrowingWindowLayer(DynamicSlidingWindowLayer):
    """A layer of the cache that keeps the tokens of a window."""

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        """Makes an empty layer for a window of so many tokens."""
        super().__init__(sliding_window, **kwargs)
        self._key_rows, self._value_rows = _Rows(), _Rows()

    @override
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.record_past or _is_differentiated(key_states, value_states):
            states: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        keys = self._key_rows.append(self.keys, key_states)
        values = self._value_rows.append(self.values, value_states)
        # The next token sees these and itself. With a window of one, it sees only itself.
        first = max(keys.shape[2] - self.sliding_window + 1, 0)
        self.keys, self.values = keys[:, :, first:], values[:, :, first:]
        return keys, values


def _is_differentiated(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def growing_cache(model: Any) -> DynamicCache:
    """Makes an empty cache for a model, whose layers have spare room where they keep tokens."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = GrowingWindowLayer(layer.sliding_window)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache
