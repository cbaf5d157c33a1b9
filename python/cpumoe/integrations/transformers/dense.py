"""Gives a model's dense layers to cpumoe: attention's projections, shared experts, the head.

A module is replaced if nothing but its product is used. It must be exactly a `torch.nn.Linear`, or
of a derived class that multiplies parts of its input (`grouped_dense`). It must have no hooks, and
its weights must belong to it alone and have a format that holds them. The model then reads two
tokens and writes two, while each such module notes that it is called, and whether anybody looks at
its weights. All other modules stay the host's, but products of shared weights may be computed where
the weights are (`shared_dense`). Therefore no list of model types is needed.

Modules whose weights the checkpoint stores quantized are packed as stored before that
(`stored_dense`). Those that the trial refuses get the weights that the host would have dequantized.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import nn
from typing_extensions import override

import cpumoe
from cpumoe._base.progress import track
from cpumoe._base.tensors import dtype_name
from cpumoe.checkpoint import ExpertReader
from cpumoe.formats import weight_format
from cpumoe.integrations.transformers.grouped_dense import groups_of, pack_groups
from cpumoe.integrations.transformers.options import HOST, NATIVE, ExpertsOptions
from cpumoe.integrations.transformers.shared_dense import compute_in_place
from cpumoe.integrations.transformers.stored_dense import StoredLinear, take_stored
from cpumoe.integrations.transformers.trial import let_model_write
from cpumoe.linear import is_finite, own_format, stored_weights

# Handing a product to other threads takes as long as reading about so many bytes.
_LEAST_BYTES = 64 << 10
# PyTorch computes less than this on one thread in the time that hand-overs of products take.
_LEAST_TOTAL = 16 << 20
_SHARED = "it shares its weights with another module"


@dataclass
class DenseLayers:
    """What became of a model's dense layers.

    Attributes:
        ours: names of the modules that cpumoe computes.
        hosts: names of the other dense layers, and why each stays the host's.
        untried: why the model could not be tried, so that all stay the host's; else empty.
    """

    ours: list[str] = field(default_factory=list)
    hosts: dict[str, str] = field(default_factory=dict)
    untried: str = ""


def with_dense_chosen(
    model: nn.Module, options: ExpertsOptions, *, by_default: str
) -> ExpertsOptions:
    """Returns options whose `dense` is not None.

    Args:
        model: the model, on the meta device.
        options: the options of the load.
        by_default: who computes dense layers unless the options say so, "host" or "native".
    """
    if options.dense is not None:
        return options
    if by_default == NATIVE:
        weights = (module.weight for module in _candidates(model).values())
        few = sum(weight.nbytes for weight in weights) < _LEAST_TOTAL
        # Whoever has an accelerator may move the host's layers to it later.
        if few or torch.accelerator.is_available():
            by_default = HOST
    return replace(options, dense=by_default)


def swap_dense(model: nn.Module, options: ExpertsOptions, *, warns: bool = True) -> DenseLayers:
    """Replaces a model's dense layers by `cpumoe.Linear`, one after the other.

    The memory of a layer's weights is free again before the next layer is packed.

    Args:
        model: a model with weights.
        options: which weights are wanted (`dense`), and threads, precision, variant and kernels of
            the layers.
        warns: whether to warn if the model cannot be tried.

    Returns:
        What was replaced, and what was not.
    """
    done = DenseLayers()
    dense = options.dense
    if dense in (HOST, None):
        return done
    users = _users(model)
    chosen: dict[str, nn.Linear | StoredLinear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StoredLinear):
            chosen[name] = module
        elif isinstance(module, nn.Linear):
            reason = _obstacle(module, users)
            if reason == _SHARED:
                reason = compute_in_place(module, options.runtime)
                if not reason:
                    done.ours.append(name)
                    continue
            reason = reason or _unheld(module, dense)
            if reason:
                done.hosts[name] = reason
            else:
                chosen[name] = module
    other_uses, done.untried = _other_uses(model, chosen)
    if done.untried and warns:
        why = f"dense layers stay transformers': {done.untried}"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
    for name, reason in other_uses.items():
        done.hosts[name] = reason
        refused = chosen.pop(name)
        if isinstance(refused, StoredLinear):
            _put(model, name, refused.of_the_host())
    for name in track(list(chosen), "packing dense layers", enabled=options.progress):
        module = chosen.pop(name)
        if isinstance(module, StoredLinear):
            layer = module.layer
        else:
            format = None if dense == NATIVE else dense
            matrix, format = stored_weights(module, format, f"{name}.weight")
            groups, bias = groups_of(module), module.bias
            layer = pack_groups(matrix, groups, format=format, bias=bias, options=options)
        _put(model, name, layer)
        done.ours.append(name)
    _keep_size(model)
    return done


def take_stored_dense(
    model: nn.Module,
    reader: ExpertReader,
    conversions: Sequence[Any],
    dequantizer: type,
    options: ExpertsOptions,
) -> list[StoredLinear]:
    """Keeps the host from reading dense weights that cpumoe can pack as they are stored.

    `stored_dense.take_stored` describes the arguments. The model is on the meta device.
    """
    if options.dense in (HOST, None):
        return []
    modules = _candidates(model)
    return take_stored(model, modules, reader, conversions, dequantizer, options.dense)


def _candidates(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the dense layers that may be replaced, as far as it does not depend on weights."""
    users = _users(model)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not _obstacle(module, users)
    }


def _keep_size(model: Any) -> None:
    """Refuses to resize a head that is packed, before the embedding is resized."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, cpumoe.Linear):
        model.resize_token_embeddings = _refuse_to_resize


def _refuse_to_resize(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "resize_token_embeddings: the model's head is packed and cannot be resized; load the model "
        "with ExpertsOptions(dense='host')"
    )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, child = name.rpartition(".")
    setattr(model.get_submodule(path), child, module)


class _Watched(nn.Linear):
    """A module that notes that it is called, and whether its parameters are used otherwise."""

    @override
    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and not self.__dict__.get("_computes"):
            self.__dict__["_used"] = True
        return super().__getattr__(name)

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["_computes"] = self.__dict__["_called"] = True
        try:
            return super().forward(input)
        finally:
            del self.__dict__["_computes"]


def _watch(module: nn.Linear) -> None:
    own = type(module)
    # `_Watched` comes first, and calls what the module's own class computes.
    module.__class__ = type(own.__name__, (_Watched, own), {"__module__": own.__module__})


def _unwatch(module: nn.Linear) -> None:
    module.__class__ = type(module).__bases__[1]


def _other_uses(
    model: nn.Module, modules: Mapping[str, nn.Linear | StoredLinear]
) -> tuple[dict[str, str], str]:
    """Tries a model.

    Returns:
        Which modules are not known to be used by calling them alone, and why; and why the model
        could not be tried, or an empty text.
    """
    if not modules:
        return {}, ""
    for module in modules.values():
        if isinstance(module, StoredLinear):
            module.forget()
        else:
            _watch(module)
    refused = ""
    try:
        let_model_write(model)
    except Exception as error:  # whatever a model refuses; the modules then stay as they are
        refused = f"the model cannot be tried: {error}"
    finally:
        seen = {name: _seen(module) for name, module in modules.items()}
    if refused:
        return dict.fromkeys(modules, refused), refused
    found = {
        name: "the model looks at its weights" if used else "the tokens of a trial do not reach it"
        for name, (used, called) in seen.items()
        if used or not called
    }
    return found, ""


def _seen(module: nn.Linear | StoredLinear) -> tuple[bool, bool]:
    """Ends a module's trial. Returns whether its weights were looked at, and whether it ran."""
    if isinstance(module, StoredLinear):
        return module.looked_at, module.called
    _unwatch(module)
    return _took(module, "_used"), _took(module, "_called")


def _took(module: nn.Module, note: str) -> bool:
    """Removes a module's note and returns whether there was one."""
    return module.__dict__.pop(note, None) is not None


def _users(model: nn.Module) -> Counter[int]:
    """Returns how many names of modules each parameter has, by its identity."""
    return Counter(
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _obstacle(module: nn.Linear, users: Counter[int]) -> str:
    """Returns why a module must stay the host's, whatever its weights are; empty if it need not."""
    weight = module.weight
    if any(users[id(parameter)] > 1 for parameter in module.parameters()):
        few = weight.nbytes < _LEAST_BYTES
        return _few_bytes(weight) if few else _SHARED
    if not groups_of(module):
        return f"it is a {type(module).__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks"
    if weight.nbytes < _LEAST_BYTES:
        return _few_bytes(weight)
    return ""


def _few_bytes(weight: torch.Tensor) -> str:
    return f"its weights have only {weight.nbytes} bytes"


def _unheld(module: nn.Linear, dense: str) -> str:
    """Returns why cpumoe cannot pack a module's weights; empty if it can."""
    weight = module.weight
    if not weight.is_cpu:
        return f"its weights are on {weight.device}"
    if dense == NATIVE and own_format(weight) is None:
        if not is_finite(weight):
            return "a weight is NaN or infinite"
        return f"no format holds its {dtype_name(weight.dtype)} weights exactly"
    if dense != NATIVE and not weight_format(dense).takes_k(module.in_features):
        return f"{dense} has no rows of {module.in_features} weights"
    return ""
