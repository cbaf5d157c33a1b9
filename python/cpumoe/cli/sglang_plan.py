"""The command line of an SGLang server, made for a model and a machine.

The GPUs' memory is divided in this order::

    fraction * memory = dense weights + KV cache + experts

``fraction`` is SGLang's ``--mem-fraction-static``. The rest of the memory is for activations, CUDA
graphs and the driver. Weights are divided among the GPUs, and each GPU has a KV cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpumoe._engine.nodes import VARIABLE
from cpumoe.cli.console import format_bytes, format_count, format_percent
from cpumoe.cli.errors import InputError
from cpumoe.cli.sglang_host import TESTED, UPSTREAM, Host, Options
from cpumoe.cli.sglang_machine import Machine
from cpumoe.cli.sglang_model import LaunchModel
from cpumoe.integrations.sglang import pythonpath
from cpumoe.integrations.sglang.plugin import SWITCH

# Options, with their other names.
MODEL = ("--model-path", "--model")
WEIGHTS = ("--kt-weight-path",)
TENSOR_PARALLEL = ("--tensor-parallel-size", "--tp-size", "--tp")
_GPU_EXPERTS = ("--kt-num-gpu-experts",)
_GPU_RATIO = ("--kt-gpu-experts-ratio",)
_FRACTION = ("--mem-fraction-static",)
_METHOD = ("--kt-method",)
_THREADS = ("--kt-cpuinfer",)
_NODES = ("--kt-threadpool-count",)
_NODE_NUMBERS = ("--kt-numa-nodes",)
_LORA = ("--kt-expert-lora-path",)

MOST_GPUS = 1024
_DEFAULT_FRACTION = 0.8


@dataclass(frozen=True)
class Plan:
    """How to start the server.

    Attributes:
        arguments: the arguments of ``python -m sglang.launch_server``.
        environment: the variables to set.
        remarks: what the user should know of the result.
        warnings: what the user should change, or expect.
        problems: why the server would not start on this machine.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    remarks: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]


def make_plan(
    model: LaunchModel, machine: Machine, host: Host | None, given: Options, kv_cache: int
) -> Plan:
    """Returns the launch of a server.

    Args:
        model: the model.
        machine: the machine.
        host: the installed SGLang; None: there is none.
        given: SGLang's options that the user gave. They take precedence.
        kv_cache: bytes of each GPU that experts must leave to the KV cache.

    Raises:
        InputError: a value in `given` is wrong.
    """
    planner = _Planner(model, machine, given, kv_cache)
    planner.check_host(host)
    planner.check_method()
    planner.check_nodes()
    gpu_experts = planner.gpu_experts()
    planner.check_memory(gpu_experts)
    return Plan(
        arguments=tuple(planner.arguments(gpu_experts)),
        environment={**environment(), **planner.variables},
        remarks=(*model.remarks, *planner.remarks),
        warnings=tuple(planner.warnings),
        problems=(*planner.problems, *model.missing),
    )


class _Planner:
    def __init__(self, model: LaunchModel, machine: Machine, given: Options, kv_cache: int) -> None:
        self._model = model
        self._machine = machine
        self._given = given
        self._kv_cache = kv_cache
        self._on_cpu = given.text("--device") == "cpu"
        self._ratio = given.share(*_GPU_RATIO)
        fraction = given.share(*_FRACTION)
        self._fraction = _DEFAULT_FRACTION if fraction is None else fraction
        ranks = given.integer(*TENSOR_PARALLEL, least=1, most=MOST_GPUS)
        self._ranks = ranks or _ranks(len(machine.gpus))
        named = given.integers(*_NODE_NUMBERS)
        self._nodes = machine.nodes if named is None else tuple(sorted(set(named)))
        self._unknown_nodes = [node for node in named or () if node not in machine.cores_of_nodes]
        known = named is not None and not self._unknown_nodes
        self._cores = machine.cores_on(self._nodes) if known else machine.cores
        self._threads = given.integer(*_THREADS, least=1) or self._cores
        given.integer(*_NODES, least=1)
        self.variables: dict[str, str] = {}
        self.remarks: list[str] = []
        self.warnings: list[str] = []
        self.problems: list[str] = []

    def check_host(self, host: Host | None) -> None:
        """Finds out whether SGLang can run, and drops options that it does not have."""
        if host is None:
            self.problems.append(
                "sglang: not installed in this Python's environment; pip install "
                f"sglang=={TESTED[UPSTREAM]}"
            )
            return
        if host.version != TESTED[host.name]:
            self.warnings.append(
                f"{host.name} {host.version}: cpumoe was written for {TESTED[host.name]}"
            )
        if host.name == UPSTREAM and self._given.take(*_NODE_NUMBERS):
            # SGLang has no such option. The module reads the variable.
            self.variables[VARIABLE] = f"[{','.join(map(str, self._nodes))}]"
        self.warnings += self._given.fit(host)
        if host.name == UPSTREAM and self._ratio is not None:
            # SGLang knows numbers only. sglang-kt prefers the ratio to a number, so the plan does.
            self._given.take(*_GPU_RATIO, *_GPU_EXPERTS)

    def check_method(self) -> None:
        """Finds out whether the user asked for what cpumoe does not compute."""
        method = self._given.text(*_METHOD)
        if method is not None and method.upper() != self._model.method:
            self.problems.append(
                f"{_METHOD[0]}: expected {self._model.method}, the format of the experts in "
                f"{self._given.text(*WEIGHTS) or self._model.weights}, got {method!r}; leave the "
                "option out"
            )
        if self._given.has(*_LORA):
            self.problems.append(
                f"{_LORA[0]}: cpumoe has no LoRA adapters for experts; leave the option out"
            )

    def check_nodes(self) -> None:
        """Finds out whether the NUMA nodes exist that the user named."""
        if self._unknown_nodes:
            self.problems.append(
                f"{_NODE_NUMBERS[0]}: expected nodes whose CPUs and memory this process may use, "
                f"{sorted(self._machine.cores_of_nodes)}; got {self._unknown_nodes}"
            )
        elif len(self._nodes) > 1:
            numbers = ", ".join(map(str, self._nodes))
            self.remarks.append(f"NUMA nodes: experts and threads are divided among {numbers}")
        elif self._nodes:
            self.remarks.append(f"NUMA nodes: experts and threads are on node {self._nodes[0]}")

    def gpu_experts(self) -> int:
        """Returns how many experts of each layer the GPUs have."""
        experts = self._model.experts
        number = self._given.integer(*_GPU_EXPERTS)
        if number is not None and number > experts:
            raise InputError(
                f"{_GPU_EXPERTS[0]}: expected at most {experts} experts per layer, got {number}"
            )
        if self._ratio is not None:
            number = int(experts * self._ratio)
        self._check_gpus()
        if self._on_cpu or not self._machine.gpus:
            return number or 0
        return self._divide_memory(number)

    def check_memory(self, gpu_experts: int) -> None:
        """Finds out whether the system has memory for the other experts."""
        model, free = self._model, self._machine.memory
        needed = model.layers * (model.experts - gpu_experts) * model.cpu_expert_bytes
        self.remarks.append(
            f"CPU: {format_bytes(needed)} for {model.experts - gpu_experts} of {model.experts} "
            f"experts in each of {model.layers} layers, "
            f"{format_count(self._threads, 'thread')}"
        )
        if 0 < free < needed:
            self.problems.append(
                f"experts need {format_bytes(needed)}; the system has {format_bytes(free)} free; "
                "leave more of them to the GPU, or use a machine with more memory"
            )

    def arguments(self, gpu_experts: int) -> list[str]:
        """Returns the server's arguments: defaults that the user did not set, and the user's."""
        model = self._model
        defaults: list[tuple[Sequence[str], Sequence[str]]] = [
            (MODEL, [model.path]),
            (WEIGHTS, [model.weights]),
            (_METHOD, [model.method]),
            ((*_GPU_EXPERTS, *_GPU_RATIO), [str(gpu_experts)]),
            (_THREADS, [str(self._cores)]),
            (_NODES, [str(max(1, len(self._nodes)))]),
            (("--disable-shared-experts-fusion",), []),
        ]
        if not self._on_cpu:
            defaults.append((_FRACTION, [f"{_DEFAULT_FRACTION:g}"]))
            if self._ranks > 1:
                defaults.append((TENSOR_PARALLEL, [str(self._ranks)]))
        words: list[str] = []
        for names, values in defaults:
            if not self._given.has(*names):
                words += [names[0], *values]
        return words + self._given.words()

    def _check_gpus(self) -> None:
        gpus = len(self._machine.gpus)
        if self._on_cpu:
            return
        if not gpus:
            self.problems.append(
                "no GPU: nvidia-smi finds none; --dry-run with --gpu-memory plans for another "
                "machine"
            )
        elif gpus < self._ranks:
            self.problems.append(
                f"{TENSOR_PARALLEL[0]} {self._ranks} needs {format_count(self._ranks, 'GPU')}; "
                f"this machine has {gpus}"
            )

    def _divide_memory(self, number: int | None) -> int:
        """Divides the GPUs' memory, and returns the number of experts.

        Args:
            number: the number that the user wants; None: as many as fit.
        """
        model, ranks = self._model, self._ranks
        memory = min(gpu.memory for gpu in self._machine.gpus[:ranks])
        speculative = self._given.has("--speculative-algorithm")
        dense = model.dense_bytes + (model.draft_bytes if speculative else 0)
        room = int((self._fraction * memory - self._kv_cache) * ranks) - dense
        divided = (
            f"{format_percent(self._fraction)} of {format_bytes(memory * ranks)} for "
            f"{format_bytes(dense)} of weights besides experts, "
            f"{format_bytes(self._kv_cache * ranks)} of KV cache"
        )
        if room < 0:
            # Only a user who gave the number may know better.
            (self.problems if number is None else self.warnings).append(
                f"the GPU's memory is too small: {divided}; raise {_FRACTION[0]}, lower --kv-cache "
                "or use more GPUs"
            )
            return number or 0
        bytes_of_one = model.layers * model.gpu_expert_bytes
        most = min(model.experts, room // bytes_of_one)
        chosen = most if number is None else number
        needed = (
            f"{format_bytes(chosen * bytes_of_one)} for {chosen} of {model.experts} experts in "
            "each layer"
        )
        self.remarks.append(f"GPU: {divided}, and {needed}")
        if chosen > most:
            self.warnings.append(
                f"the GPU needs {needed}, but has {format_bytes(room)} for experts, which is "
                f"enough for {most}"
            )
        return chosen


def _ranks(gpus: int) -> int:
    """The largest power of two that is not above the number of GPUs: it divides models' heads."""
    return 1 << max(0, gpus.bit_length() - 1)


def environment() -> dict[str, str]:
    """The variables through which both SGLangs find cpumoe's module."""
    folders = [str(pythonpath()), os.environ.get("PYTHONPATH", "")]
    return {SWITCH: "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}
