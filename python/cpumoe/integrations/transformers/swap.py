"""Replaces a model's experts modules by cpumoe's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from cpumoe._base.progress import track
from cpumoe.checkpoint import ExpertReader
from cpumoe.integrations.transformers.activation import module_activation
from cpumoe.integrations.transformers.experts_module import CpuExperts
from cpumoe.integrations.transformers.options import ExpertsOptions

# Attributes that transformers' `use_experts_implementation` sets on every experts module.
_MARKS = ("has_gate", "is_transposed", "is_concatenated")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Matches the renamed keys of routed experts, and no `.shared_experts.`.
EXPERT_KEYS = r"\.experts\."


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of each experts module in the model."""
    for name, module in model.named_modules():
        if all(hasattr(module, mark) for mark in _MARKS):
            yield name, module


def swap_experts(model: nn.Module, reader: ExpertReader) -> list[CpuExperts]:
    """Replaces every experts module by one without parameters, and returns the new modules.

    The model may be on the meta device, because no weight is read. All checks that need no weights
    are made.

    Raises:
        UnsupportedFormatError: cpumoe does not support the format of the checkpoint's experts.
        CheckpointError, IndexError, FileNotFoundError: see `ExpertReader.check_layer`.
        ValueError: cpumoe does not support the activation, or sizes differ.
    """
    reader.check_supported()
    swapped = []
    for name, module in list(experts_modules(model)):
        replacement = _replacement(name, module, reader)
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, child, replacement)
        if not any(True for _ in parent.parameters(recurse=False)):
            # Some families' `_init_weights` initializes the experts of a block. They are gone, and
            # the block itself has nothing to initialize.
            parent._is_hf_initialized = True  # type: ignore[assignment]
        swapped.append(replacement)
    return swapped


def pack_all(modules: list[CpuExperts], reader: ExpertReader, options: ExpertsOptions) -> None:
    """Packs the experts of all layers from the checkpoint; see `ExpertsOptions`."""
    if options.ranks is not None:
        options.ranks.release()  # of a model that was loaded before
    for module in track(modules, "packing experts", enabled=options.progress):
        module.pack(reader, options)
    if options.ranks is not None:
        options.ranks.wait()


def _replacement(name: str, module: nn.Module, reader: ExpertReader) -> CpuExperts:
    reader = reader.of_module(name)
    match = _LAYER.search(name)
    if match is None:
        raise ValueError(f"{name}: expected a module of a decoder layer, as in 'layers.3.mlp'")
    layer = int(match[1])
    num_experts = module.num_experts
    if num_experts != reader.num_experts:
        raise ValueError(
            f"{name}: the model has {num_experts} experts, the checkpoint {reader.num_experts}"
        )
    has_bias = getattr(module, "has_bias", False)
    if has_bias != reader.has_bias:
        biases = {True: "biases", False: "no biases"}
        raise ValueError(
            f"{name}: the model's experts have {biases[has_bias]}, the checkpoint's "
            f"{biases[reader.has_bias]}"
        )
    reader.check_layer(layer)
    normed = getattr(module, "has_post_expert_norm", False)
    norm = module.get_submodule("post_expert_norm") if normed else None
    if (norm is None) != (reader.output_norm is None):
        norms = {True: "no norm", False: "a norm"}
        raise ValueError(
            f"{name}: the model's experts have {norms[norm is None]} of their outputs, the "
            f"checkpoint's {norms[reader.output_norm is None]}"
        )
    activation = module_activation(module)
    return CpuExperts(layer, reader.num_experts, activation, name=name, post_expert_norm=norm)
