"""``cpumoe inspect``: what a checkpoint holds, and whether cpumoe can run it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpumoe.cli import console
from cpumoe.cli.errors import InputError, reported
from cpumoe.cli.options import JsonOption, TracebackOption

if TYPE_CHECKING:
    from cpumoe.checkpoint import ExpertReader
    from cpumoe.numerics.glu import GLU

EXAMPLE = "Examples: `cpumoe inspect path/to/model`, `cpumoe inspect gpt-oss-120b`"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a model's name.")
    ],
    json_output: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show a model's layers, experts, format and bytes, and whether cpumoe can run it.

    Only the headers of a folder's files are read. For a model's name, the entry of the built-in
    model registry is shown.
    """
    with reported(traceback):
        document = collect(model)
        if json_output:
            console.show_json(document)
        else:
            _render(document)


def collect(model: str) -> dict[str, Any]:
    """Returns what ``inspect --json`` prints.

    Raises:
        InputError: `model` is neither a folder nor a known model.
        OSError, ValueError: the folder is no MoE checkpoint.
    """
    if Path(model).exists():
        from cpumoe.checkpoint import open_checkpoint

        with open_checkpoint(model) as reader:
            return _checkpoint(reader)
    return _registered(model)


def _registered(name: str) -> dict[str, Any]:
    from cpumoe.formats import WEIGHT_FORMATS
    from cpumoe.models import find_model

    if name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such checkpoint folder")
    try:
        spec = find_model(name)
    except ValueError as error:
        raise InputError(f"{name}: no such folder, and {error}") from error
    reasons = []
    if spec.weight_format not in WEIGHT_FORMATS:
        reasons.append(f"weight format {spec.weight_format} is not supported yet")
    if spec.layout == "other":
        reasons.append("its checkpoint layout has no reader yet")
    first = spec.first_moe_layer
    return {
        "source": "registry",
        "name": spec.name,
        "aliases": list(spec.aliases),
        "model_type": spec.model_type,
        "layers": list(range(first, spec.num_hidden_layers)),
        "num_hidden_layers": spec.num_hidden_layers,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.moe_intermediate_size,
        "format": spec.weight_format,
        **_activation(spec.activation),
        "has_bias": spec.has_bias,
        "bytes": {
            "expert": spec.expert_bytes,
            "layer": spec.layer_bytes,
            "experts": spec.routed_expert_bytes,
            "token": spec.token_bytes,
        },
        "supported": not reasons,
        "reasons": reasons,
    }


def _checkpoint(reader: ExpertReader) -> dict[str, Any]:
    layers = reader.layers()
    missing = reader.folder.missing_shards()
    sizes, damaged = _layer_bytes(reader)
    layer_bytes = max(sizes, default=0)
    expert_bytes = layer_bytes // reader.num_experts
    all_bytes = sum(sizes) if not missing else layer_bytes * len(layers)
    reasons = [*reader.unsupported, *(damaged or _contradictions(reader))]
    if missing:
        reasons.append(f"{console.format_count(len(missing), 'shard')} missing")
    if not layers:
        reasons.append("no layer has routed experts")
    return {
        "source": "checkpoint",
        "path": str(reader.folder.path),
        "model_type": reader.model_type,
        "layers": layers,
        "num_hidden_layers": reader.config.num_hidden_layers,
        "num_experts": reader.num_experts,
        "top_k": reader.top_k,
        "hidden_size": reader.hidden_size,
        "intermediate_size": reader.intermediate_size,
        "format": reader.format,
        "layer_formats": _layer_formats(reader),
        **_activation(None if reader.unsupported else reader.activation),
        "has_bias": reader.has_bias,
        "bytes": {
            "expert": expert_bytes,
            "layer": layer_bytes,
            "experts": all_bytes,
            "token": all_bytes // reader.num_experts * reader.top_k,
        },
        "shards": {
            "present": len(reader.folder.shard_files()) - len(missing),
            "missing": missing,
        },
        "supported": not reasons,
        "reasons": reasons,
    }


def _layer_formats(reader: ExpertReader) -> dict[str, list[int]]:
    """Returns the layers that have each format."""
    found: dict[str, list[int]] = {}
    for layer in reader.layers():
        found.setdefault(reader.layer_format(layer), []).append(layer)
    return found


def _layer_bytes(reader: ExpertReader) -> tuple[list[int], list[str]]:
    """Returns each layer's bytes of expert tensors in shards that exist, and shards' errors."""
    from cpumoe.checkpoint import CheckpointError

    damaged: dict[str, None] = {}

    def size(name: str) -> int:
        try:
            return reader.folder.info(name).nbytes
        except FileNotFoundError:
            pass  # the document lists missing shards
        except CheckpointError as error:
            damaged[str(error)] = None
        return 0

    sizes = [sum(map(size, names)) for names in reader.tensor_names().values()]
    return sizes, list(damaged)


def _contradictions(reader: ExpertReader) -> list[str]:
    """Returns the first contradiction between config.json and the tensors, if any."""
    from cpumoe.checkpoint import CheckpointError

    if reader.unsupported:
        return []
    try:
        reader.check_depth()
        for layer in reader.layers():
            with contextlib.suppress(FileNotFoundError):  # the document lists missing shards
                reader.check_layer(layer)
    except CheckpointError as error:
        return [str(error)]
    return []


def _activation(activation: GLU | None) -> dict[str, Any]:
    values = None if activation is None else asdict(activation)
    return {"activation": values, "swiglu": values}  # "swiglu" is its old name


def _render(document: dict[str, Any]) -> None:
    sizes = document["bytes"]
    facts = {
        "model": console.escape(document.get("name") or document["path"]),
        "type": console.escape(document["model_type"]),
        "layers": f"{len(document['layers'])} with routed experts"
        f"{_span(document['layers'])}, {document['num_hidden_layers']} in all",
        "experts": f"{document['num_experts']} per layer, {document['top_k']} per token",
        "sizes": f"hidden {document['hidden_size']}, intermediate {document['intermediate_size']}",
        "format": console.escape(_formats(document)),
        "activation": _formula(document["activation"], document["has_bias"]),
        "bytes": f"{console.format_bytes(sizes['expert'])} per expert, "
        f"{console.format_bytes(sizes['layer'])} per layer, "
        f"{console.format_bytes(sizes['experts'])} in all",
        "a token reads": f"{console.format_bytes(sizes['token'])} of expert weights",
    }
    if "aliases" in document:
        facts["also called"] = ", ".join(document["aliases"])
    if "shards" in document:
        facts["shards"] = _shards(document["shards"])
    reasons = "; ".join(document["reasons"])
    facts["supported"] = (
        console.OK if document["supported"] else f"{console.NOT_OK}: {console.escape(reasons)}"
    )
    console.show(console.fact_table(facts))


def _formats(document: dict[str, Any]) -> str:
    layers_of = document.get("layer_formats", {})
    if len(layers_of) < 2:
        return str(document["format"])
    parts = []
    for name, layers in layers_of.items():
        successive = layers[-1] - layers[0] == len(layers) - 1
        span = _span(layers) if successive else ""
        parts.append(f"{name} in {console.format_count(len(layers), 'layer')}{span}")
    return ", ".join(parts)


def _span(layers: list[int]) -> str:
    if not layers:
        return ""
    return f" ({layers[0]})" if len(layers) == 1 else f" ({layers[0]}..{layers[-1]})"


def _formula(activation: dict[str, Any] | None, has_bias: bool) -> str:
    if activation is None:
        return "unknown"
    alpha, limit, offset = activation["alpha"], activation["limit"], activation["up_offset"]
    x = "g" if activation["gated"] else "u"
    formula = f"{activation['function']}({x})" if alpha == 1 else f"{x} * sigmoid({alpha:g} {x})"
    formula += " * u" if activation["gated"] else ", without a gate projection"
    if offset:
        formula = formula.replace("* u", f"* (u + {offset:g})")
    parts = [formula]
    if activation["gate_cap"] is not None:
        parts.append(f"soft caps {activation['gate_cap']:g} of g, {activation['up_cap']:g} of u")
    if limit is not None and math.isfinite(limit):
        parts.append(f"g at most {limit:g}, u within ±{limit:g}")
    if has_bias:
        parts.append("with biases")
    return "; ".join(parts)


def _shards(shards: dict[str, Any]) -> str:
    missing = shards["missing"]
    text = f"{shards['present']} present, {len(missing)} missing"
    if not missing:
        return text
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"{text}: {console.escape(', '.join(missing[:3]))}{more}"
