"""A layer's experts as streams use them, and the mask by which a host shares them with its GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from cpumoe import _core
from cpumoe._engine.output import ELEMENTS
from cpumoe.checkpoint import ExpertReader
from cpumoe.experts import Experts
from cpumoe.integrations.sglang.placement import checked_mask
from cpumoe.numerics.precision import resolve_precision


class Form(NamedTuple):
    """What calls have in common that differ in their tensors alone."""

    dtype: torch.dtype  # of hidden states and results
    top_k: int
    ids_are_64_bit: bool
    fp32_as_bf16: bool

    def sizes(self) -> dict[str, Any]:
        """Returns the arguments of `_core.stream_buffer_bytes` and `_core.StreamCall`."""
        element = ELEMENTS[self.dtype]
        return {
            "input_dtype": element,
            "output_dtype": element,
            "top_k": self.top_k,
            "ids_are_64_bit": self.ids_are_64_bit,
        }


class Layer:
    """The experts of a decoder layer.

    Attributes:
        experts: the experts.
        index: number of the decoder layer.
        model: the checkpoint, which identifies the model.
        deferred: how many of a token's experts may run after the layer; 0: none.
        tokens: the most tokens that a call passes to the CPU at once.
    """

    def __init__(
        self,
        experts: Experts,
        index: int,
        model: ExpertReader,
        *,
        mask: torch.Tensor,
        deferred: int,
        tokens: int,
    ) -> None:
        """Makes calls of `experts` that skip those of `mask`, which the host may change.

        `experts` have weights for all others, and `mask` as their mask.
        """
        self.experts = experts
        self.index = index
        self.model = model
        self.deferred = deferred
        self.tokens = tokens
        self._hosts_mask = mask
        # The mask that calls read, and whose address graphs know. This mask follows the host's as
        # soon as the experts that the host's asks for are in memory.
        self._mask = checked_mask(mask, experts.num_experts)
        self._changing = threading.Lock()  # one change of the mask at a time
        self._submitting = threading.Lock()  # no call reads the mask while it changes
        self._calls: WeakKeyDictionary[object, dict[Form, _core.StreamCall]] = WeakKeyDictionary()
        self._lock = threading.Lock()  # guards _calls

    def form_of(self, x: torch.Tensor, ids: torch.Tensor) -> Form:
        """Returns the form of a call with these hidden states and ids."""
        precision = resolve_precision(self.experts.precision, x.dtype)
        rounds = x.dtype == torch.float32 and precision == "bf16"
        return Form(x.dtype, ids.shape[1], ids.dtype == torch.int64, rounds)

    def call(
        self, stream: object, form: Form, bridge: Callable[[], _core.Bridge]
    ) -> _core.StreamCall:
        """Returns the engine's call for a stream. `bridge` gives it the stream's buffers."""
        with self._lock:
            calls = self._calls.setdefault(stream, {})
            call = calls.get(form)
            if call is None:
                call = calls[form] = _core.StreamCall(
                    bridge=bridge(),
                    runtime=self.experts.runtime.core,
                    layer=self.experts.core,
                    mask=self._mask.data_ptr(),
                    mask_owner=self._mask,
                    skip_unknown_ids=True,  # the host pads with ids of its own
                    deferred_experts=min(self.deferred, form.top_k),
                    layer_index=self.index,
                    fp32_as_bf16=form.fp32_as_bf16,
                    **form.sizes(),
                )
        return call

    def wait(self) -> bool:
        """Waits until no call runs. Returns False if nobody can tell, as during a capture."""
        return all(call.wait() for call in self._all_calls())

    def captured(self) -> int:
        """Returns how many calls graphs have captured, and may make again at any time."""
        return sum(call.captured_plans for call in self._all_calls())

    @contextmanager
    def submitting(self) -> Iterator[None]:
        """The time in which a call reads the mask."""
        with self._submitting:
            yield

    def follow_mask(self) -> None:
        """Loads the experts that the host's mask asks for, and gives back memory of the others.

        Calls of other threads go on, and skip the experts of the old mask, or of the new one.
        While a graph is captured, memory is not given back: earlier calls may need it.

        Raises:
            FileNotFoundError, CheckpointError: an expert cannot be read. The host's mask then is
                again as it was.
        """
        used = self.experts.expert_mask
        assert used is not None
        if torch.equal(self._mask, self._hosts_mask) and torch.equal(used, self._mask):
            return
        with self._changing:
            wanted = checked_mask(self._hosts_mask, self.experts.num_experts)
            try:
                # Packs what is missing, and keeps what running calls need.
                both = checked_mask(self._mask & wanted, self.experts.num_experts)
                self.experts.expert_mask = both
            except BaseException:
                self._hosts_mask.copy_(self._mask)
                raise
            with self._submitting:
                self._mask.copy_(wanted)
            self.experts.expert_mask = wanted
            if self.wait():
                self.experts.evict()

    def _all_calls(self) -> list[_core.StreamCall]:
        with self._lock:
            return [call for calls in self._calls.values() for call in calls.values()]

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Adds the layer to the text of errors of calls."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"layer {self.index}: {error}") from None
