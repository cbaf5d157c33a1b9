"""What rank 0 sends to another rank: a header of eight integers and some bytes.

A message of few tokens is one packet of a fixed size, so that the receiver need not ask first how
long the message is. What does not fit follows as a second packet.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

_HEADER_INTS = 8
_HEADER_BYTES = 8 * _HEADER_INTS

# Kinds of messages.
CALL, MAKE, READY, RELEASE, END = range(5)

# Room for the experts and weights of one token, beside its hidden states.
_ROUTING_BYTES = 512

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Message(NamedTuple):
    """A message.

    Attributes:
        kind: one of the kinds above.
        layer: the layer that a CALL is for.
        numbers: for a CALL, tokens, top_k, hidden size, the number of the dtype, and whether there
            are weights.
        payload: uint8, the bytes.
    """

    kind: int
    layer: int
    numbers: tuple[int, ...]
    payload: torch.Tensor


class Request(NamedTuple):
    """What a rank is asked to compute of one call.

    Attributes:
        x: ``[tokens, hidden]``.
        ids: int32 ``[tokens, top_k]``, the rank's own numbers of experts, -1 for none.
        weights: float32 ``[tokens, top_k]``; None: the results of pairs are wanted, not their sums.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor | None


def parts_of(request: Request) -> list[torch.Tensor]:
    """Returns the bytes of a request, as views."""
    given = (
        (request.ids, request.x)
        if request.weights is None
        else (
            request.ids,
            request.weights,
            request.x,
        )
    )
    return [tensor.reshape(-1).view(torch.uint8) for tensor in given]


def request_bytes(tokens: int, top_k: int, hidden: int, dtype: torch.dtype, plain: bool) -> int:
    """Returns how many bytes `parts_of` returns."""
    return tokens * (top_k * (8 if plain else 4) + hidden * dtype.itemsize)


def request_of(
    payload: torch.Tensor, tokens: int, top_k: int, hidden: int, dtype: torch.dtype, plain: bool
) -> Request:
    """Returns a request from its bytes, as views of them."""
    pairs = 4 * tokens * top_k
    ids = payload[:pairs].view(torch.int32).view(tokens, top_k)
    weights = None
    if plain:
        weights = payload[pairs : 2 * pairs].view(torch.float32).view(tokens, top_k)
        pairs *= 2
    return Request(payload[pairs:].view(dtype).view(tokens, hidden), ids, weights)


def packet_bytes(hidden_size: int) -> int:
    """Returns the size of first packets: one token of bf16 fits."""
    return _HEADER_BYTES + _ROUTING_BYTES + 2 * hidden_size


class Sender:
    """Sends messages to one rank."""

    def __init__(self, rank: int, packet: int, group: Any) -> None:
        """Sends to this rank of the group; `packet` is `packet_bytes` of the model."""
        self._rank = rank
        self._first = packet
        self._group = group
        self._sent: list[tuple[Any, torch.Tensor]] = []  # not known to have left

    def send_request(self, layer: int, request: Request) -> None:
        """Sends a request for one of the rank's layers."""
        tokens, hidden = request.x.shape
        plain = request.weights is not None
        numbers = (tokens, request.ids.shape[1], hidden, _DTYPES.index(request.x.dtype), plain)
        self._send(CALL, layer, numbers, parts_of(request))

    def send(self, kind: int, document: Any = None) -> None:
        """Sends a message of another kind."""
        text = b"" if document is None else json.dumps(document).encode()
        self._send(
            kind, 0, (), [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if text else []
        )

    def flush(self) -> None:
        """Waits until all messages have left."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def _send(
        self, kind: int, layer: int, numbers: tuple[int, ...], parts: list[torch.Tensor]
    ) -> None:
        self.flush()
        count = sum(map(len, parts))
        header = np.zeros(_HEADER_INTS, np.int64)
        header[: 3 + len(numbers)] = (kind, layer, count, *numbers)
        message = torch.empty(
            max(self._first, _HEADER_BYTES + count), dtype=torch.uint8, device="cpu"
        )
        message[:_HEADER_BYTES] = torch.from_numpy(header.view(np.uint8))
        begin = _HEADER_BYTES
        for part in parts:
            message[begin : begin + len(part)] = part
            begin += len(part)
        packets = [message[: self._first], message[self._first :]]
        self._sent = [
            (dist.isend(packet, self._rank, group=self._group), packet)
            for packet in packets
            if len(packet)
        ]


class Receiver:
    """Receives the messages of rank 0."""

    def __init__(self, packet: int, group: Any) -> None:
        """Receives from rank 0 of the group; `packet` is `packet_bytes` of the model."""
        self._group = group
        self._packet = torch.empty(packet, dtype=torch.uint8, device="cpu")

    def receive(self) -> Message:
        """Waits for the next message. Its bytes are valid until the one after it is received."""
        dist.recv(self._packet, 0, group=self._group)
        header = self._packet[:_HEADER_BYTES].view(torch.int64).tolist()
        kind, layer, count, *numbers = header
        payload = self._packet[_HEADER_BYTES : _HEADER_BYTES + count]
        first = len(self._packet)
        if _HEADER_BYTES + count > first:
            whole = torch.empty(_HEADER_BYTES + count, dtype=torch.uint8, device="cpu")
            whole[:first] = self._packet
            dist.recv(whole[first:], 0, group=self._group)
            payload = whole[_HEADER_BYTES:]
        return Message(kind, layer, tuple(numbers), payload)


def request_in(message: Message) -> Request:
    """Returns the request of a CALL."""
    tokens, top_k, hidden, dtype, plain = message.numbers
    return request_of(message.payload, tokens, top_k, hidden, _DTYPES[dtype], bool(plain))


def document_in(message: Message) -> Any:
    """Returns what another message says."""
    return json.loads(bytes(message.payload.numpy()))
