"""The processes that share a model's experts. Rank 0 has the rest of the model and leads."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cpumoe._base.launcher import check_launcher, own_rank
from cpumoe.checkpoint import ExpertReader, open_checkpoint
from cpumoe.distributed import messages
from cpumoe.distributed.agreement import (
    RanksError,
    UnreachableError,
    difference,
    digest,
    fingerprint,
    host_name,
    software,
    worded,
)
from cpumoe.distributed.cpus import same_machine, share_of_cpus
from cpumoe.distributed.led_experts import LedExperts
from cpumoe.distributed.messages import Receiver, Sender
from cpumoe.distributed.part import Part, check_sums
from cpumoe.distributed.placement import check_frequencies, place
from cpumoe.distributed.routing import Owners
from cpumoe.distributed.watch import Watch, accept, connect, listen, local_address
from cpumoe.isa import isa as default_isa
from cpumoe.numerics.glu import GLU
from cpumoe.options import ExpertsOptions
from cpumoe.runtime import Runtime

# How long ranks wait for each other at the start. Machines may load programs at different speeds.
_START_SECONDS = 300
# The group itself never gives up: a rank may wait for days for its next request. `Watch` notices
# the end of a rank.
_NO_LIMIT = timedelta(days=3650)
# How long an error of the group waits for the watch to say which rank has ended.
_REASON_SECONDS = 3.0
_KEY = "cpumoe/"
_SUCCESSIVE = "successive experts"

_UNTYPED: Any = dist  # what PyTorch's annotations do not export


class _Facts(NamedTuple):
    """What a rank tells the others at the start."""

    host: str
    cpus: list[int]
    error: str | None
    common: dict[str, str]  # must be equal for all ranks


class Ranks:
    """This process and the others that share a model's experts.

    `join` makes it. Rank 0 loads a model with ``ExpertsOptions(ranks=ranks)`` of
    `cpumoe.integrations.transformers`, and all other ranks call `follow`.

    Attributes:
        rank: this process' number, from 0.
        world: the number of processes.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        group: Any,
        watch: Watch,
        reader: ExpertReader,
        sums: str,
        frequencies: torch.Tensor | None,
        *,
        ends_process: bool,
    ) -> None:
        """Keeps what `join` has made."""
        self.rank = rank
        self.world = world
        self._group = group
        self._watch = watch
        self._reader = reader
        self._sums = sums
        self._frequencies = frequencies
        self._ends_process = ends_process
        self._packet = messages.packet_bytes(reader.hidden_size)
        self._senders = (
            [Sender(other, self._packet, group) for other in range(1, world)] if rank == 0 else []
        )
        self._layers = 0
        self._left = False

    def experts(
        self,
        reader: ExpertReader,
        layer: int,
        *,
        module: str = "",
        activation: GLU | None = None,
        options: ExpertsOptions | None = None,
    ) -> LedExperts:
        """Lets all ranks pack their experts of a layer, and returns the layer. For rank 0 alone.

        Other ranks pack while this one goes on; `wait` waits for them.

        Args:
            reader: the checkpoint.
            layer: index of the decoder layer.
            module: the module whose experts these are (`ExpertReader.of_module`).
            activation: the activation; default: as config.json says.
            options: threads, precision, variant and kernels. Other ranks use their own threads.

        Raises:
            RanksError: a rank has ended, or there are more ranks than experts.
        """
        options = options or ExpertsOptions()
        own = reader.of_module(module)
        # Counts are those of text. Experts for the tokens of images are a module of their own.
        counts = None if own.module else self._frequencies
        frequencies = None if counts is None else counts[layer]
        placement = "contiguous" if frequencies is None else "balanced"
        experts_of = place(own.num_experts, self.world, placement, frequencies)
        glu = own.known_activation() if activation is None else activation
        number, self._layers = self._layers, self._layers + 1
        document = {
            "number": number,
            "layer": layer,
            "module": module,
            "activation": asdict(glu),
            "precision": options.precision,
            "isa": options.isa,
            "batch_invariant": options.batch_invariant,
            "few_token_limit": options.few_token_limit,
        }
        for sender, experts in zip(self._senders, experts_of[1:], strict=True):
            sender.send(messages.MAKE, {**document, "experts": experts})
        part = Part.from_checkpoint(
            own, layer, experts_of[0], activation=glu, progress=False, options=options
        )
        return LedExperts(
            number, part, Owners(experts_of), self._sums, self._senders, self._group, self._lost
        )

    def wait(self) -> list[int]:
        """Waits until all ranks have packed their experts. For rank 0 alone.

        Returns:
            The bytes of packed weights of each other rank.

        Raises:
            RanksError: a rank has ended.
        """
        answer = torch.zeros(1, dtype=torch.int64, device="cpu")
        packed = []
        for other, sender in enumerate(self._senders, start=1):
            sender.send(messages.READY)
            try:
                dist.recv(answer, other, group=self._group)
            except RuntimeError as error:
                raise (self._lost() or error) from error
            packed.append(int(answer))
        return packed

    def release(self) -> None:
        """Lets the other ranks free the layers that they have. For rank 0 alone."""
        for sender in self._senders:
            sender.send(messages.RELEASE)

    def follow(self, runtime: Runtime | None = None) -> None:
        """Computes what rank 0 asks for, until rank 0 ends. For all ranks but 0.

        Args:
            runtime: the threads that compute; None: the process's shared runtime.

        Raises:
            RanksError: another rank has ended.
            OSError, ValueError, MemoryError: this rank cannot load its experts. The other ranks
                have been told.
        """
        receiver = Receiver(self._packet, self._group)
        parts: dict[int, Part] = {}
        while True:
            try:
                message = receiver.receive()
                if message.kind == messages.CALL:
                    self._answer(parts[message.layer], message)
                    continue
                if message.kind == messages.READY:
                    packed = sum(part.experts.nbytes for part in parts.values())
                    dist.send(torch.tensor([packed], device="cpu"), 0, group=self._group)
            except RuntimeError as error:
                raise (self._lost() or error) from error
            if message.kind == messages.END:
                return
            if message.kind == messages.RELEASE:
                parts.clear()
            if message.kind == messages.MAKE:
                document = messages.document_in(message)
                parts[document["number"]] = self._made(document, runtime)

    def fail(self, message: str) -> None:
        """Tells the other ranks why this one ends, unless it has left them."""
        if not self._left:
            self._left = True
            self._watch.fail(message)

    def close(self) -> None:
        """Ends the other ranks, if this is rank 0, and leaves them."""
        if self._left:
            return
        self._left = True
        for sender in self._senders:
            sender.send(messages.END)
            sender.flush()
        self._watch.close()
        self._reader.close()
        dist.destroy_process_group(self._group)

    def __enter__(self) -> Ranks:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the other ranks, or tells them of the error."""
        if error is None:
            self.close()
        elif not isinstance(error, RanksError):
            self.fail(f"rank {self.rank} ({host_name()}): {str(error) or type(error).__name__}")

    def _answer(self, part: Part, message: messages.Message) -> None:
        request = messages.request_in(message)
        if request.weights is None:
            result = part.terms(request.x, request.ids)
        else:
            result = part.sums(request.x, request.ids, request.weights)
        dist.send(result, 0, group=self._group)

    def _made(self, document: dict[str, Any], runtime: Runtime | None) -> Part:
        return Part.from_checkpoint(
            self._reader.of_module(document["module"]),
            document["layer"],
            document["experts"],
            activation=GLU(**document["activation"]),
            progress=False,
            runtime=runtime,
            precision=document["precision"],
            isa=document["isa"],
            batch_invariant=document["batch_invariant"],
            few_token_limit=document["few_token_limit"],
        )

    def _lost(self) -> RanksError | None:
        """Returns the error of a rank that has ended, after an error of the group; None: none."""
        reason = self._watch.lost(_REASON_SECONDS)
        if reason is not None and self._ends_process:
            time.sleep(_REASON_SECONDS)  # `on_end` ends the process meanwhile
        return None if reason is None else RanksError(reason)


def join(
    path: str | os.PathLike[str],
    *,
    sums: str = "fixed",
    frequencies: torch.Tensor | Callable[[ExpertReader], torch.Tensor] | None = None,
    options: Mapping[str, str] | None = None,
    on_end: Callable[[str, bool], None] | None = None,
) -> Ranks:
    """Joins the processes that a launcher such as torchrun has started.

    The launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. All ranks must have the same
    checkpoint, software, variant and options. Ranks of one machine that may use the same CPUs
    divide them.

    Args:
        path: the checkpoint's folder, which each machine may have in another place.
        sums: how results are added up. "fixed": with the bits of one process. "plain": ranks add
            up their experts first, which sends fewer bytes, and whose rounding depends on the
            number of ranks.
        frequencies: ``[layers, experts]``, how often tokens use each expert, or a function that
            returns this for the checkpoint. Ranks then get experts with about equally many tokens.
            If the function raises OSError or ValueError, the other ranks are told. Default:
            successive experts.
        options: further options that must be equal, by name.
        on_end: called in a thread when a rank has ended, with a message, and whether another rank
            has already shown it. It must end the process. Default: calls raise RanksError.

    Raises:
        RanksError: a rank is missing or differs from the others, or cannot read the checkpoint; or
            the launcher's variables are missing or wrong.
        OSError, ValueError: this rank cannot read the checkpoint, the frequencies are not those of
            its layers, or this CPU cannot run the variant; the sums are unknown.
    """
    check_sums(sums)
    rank, world, store = _rendezvous()
    failure: Exception | None = None
    common = software()
    try:
        reader = open_checkpoint(path)
        counts = frequencies(reader) if callable(frequencies) else frequencies
        if counts is not None:
            check_frequencies(counts, reader)
        common |= {
            "checkpoint": fingerprint(reader.folder),
            "variant": default_isa(),
            "sums": sums,
            "placement": _SUCCESSIVE if counts is None else f"by counts {digest(counts)}",
            **(options or {}),
        }
    except (OSError, ValueError) as error:
        failure = error
    cpus = sorted(os.sched_getaffinity(0))
    text = None if failure is None else worded(failure)
    store.set(f"{_KEY}{rank}", json.dumps(_Facts(host_name(), cpus, text, common)))
    try:
        facts, connections, names = _agreement(store, rank, world)
    except RanksError:
        if failure is not None:
            raise failure from None
        raise
    _divide_cpus(facts, rank)
    watch = Watch(connections, names, on_end)
    with _silent_stdout():
        dist.init_process_group(
            "gloo",
            store=_UNTYPED.PrefixStore(f"{_KEY}group", store),
            rank=rank,
            world_size=world,
            timeout=_NO_LIMIT,
        )
    ends_process = on_end is not None
    return Ranks(rank, world, None, watch, reader, sums, counts, ends_process=ends_process)


def _rendezvous() -> tuple[int, int, Any]:
    """Returns rank, number of ranks, and the launcher's store."""
    limit = timedelta(seconds=_START_SECONDS)
    try:
        check_launcher()
    except ValueError as error:
        raise UnreachableError(str(error)) from None
    try:
        store, rank, world = next(_UNTYPED.rendezvous("env://", timeout=limit))
    except (ValueError, RuntimeError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        world = int(os.environ["WORLD_SIZE"])
        others = f"all of {world} ranks" if own_rank() == 0 else "rank 0"
        raise UnreachableError(
            f"rank {own_rank()}: expected {others} at {place} (MASTER_ADDR, MASTER_PORT) within "
            f"{_START_SECONDS} seconds, got: {_first_line(error)}; start a process for "
            f"each RANK from 0 to {world - 1} with this address"
        ) from error
    store.set_timeout(limit)
    return rank, world, store


def _agreement(store: Any, rank: int, world: int) -> tuple[list[_Facts], dict[int, Any], list[str]]:
    """Lets rank 0 compare all ranks, and connects them; returns facts, connections and names."""
    verdict: dict[str, Any] = {}
    listener: socket.socket | None = None
    if rank == 0:
        facts = [_Facts(*_read(store, str(other), f"rank {other}")) for other in range(world)]
        names = _names(facts)
        errors = [(name, each.error) for name, each in zip(names, facts, strict=True)]
        error = next((f"{name}: {text}" for name, text in errors if text is not None), None)
        error = error or difference([each.common for each in facts], names)
        if error is None:
            listener = listen(local_address(os.environ.get("MASTER_ADDR", "localhost")))
            verdict["address"] = listener.getsockname()[:2]
        verdict["error"] = error
        store.set(f"{_KEY}verdict", json.dumps(verdict))
    else:
        verdict = _read(store, "verdict", "rank 0")
    if verdict["error"] is not None:
        raise RanksError(verdict["error"])
    if rank > 0:
        facts = [_Facts(*_read(store, str(other), f"rank {other}")) for other in range(world)]
        host, port = verdict["address"]
        return facts, connect((host, port), rank), _names(facts)
    assert listener is not None
    with listener:
        return facts, accept(listener, world), names


def _names(facts: list[_Facts]) -> list[str]:
    return [f"rank {rank} ({each.host})" for rank, each in enumerate(facts)]


def _read(store: Any, key: str, who: str) -> Any:
    try:
        return json.loads(store.get(f"{_KEY}{key}"))
    except RuntimeError as error:
        raise RanksError(
            f"{who} did not come within {_START_SECONDS} seconds, or the launcher has ended: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """Returns what PyTorch says before it lists a stack of C++ functions."""
    return str(error).partition("\n")[0] or type(error).__name__


def _divide_cpus(facts: list[_Facts], rank: int) -> None:
    """Takes this rank's share of CPUs that several ranks of this machine may use."""
    sharing = same_machine([each.host for each in facts], [each.cpus for each in facts], rank)
    if len(sharing) > 1:
        cpus = share_of_cpus(sharing.index(rank), len(sharing))
        if cpus is not None:
            os.sched_setaffinity(0, cpus)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keeps what Gloo prints while it connects away from the text that this process writes."""
    sys.stdout.flush()
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
