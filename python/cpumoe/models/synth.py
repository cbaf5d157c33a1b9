"""Writes checkpoints with made-up weights in a model's exact native format, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import torch

from cpumoe._base.random import uniform
from cpumoe._base.seed import check_seed
from cpumoe.checkpoint.weight_files import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from cpumoe.checkpoint.writer import CheckpointWriter
from cpumoe.formats import QuantizedMatrix, WeightFormat
from cpumoe.formats.quantized_matrix import BLOCK
from cpumoe.formats.rounding import power_of_two_above
from cpumoe.formats.scale_choice import USUAL_SCALES, ScaleChoice
from cpumoe.models import ModelSpec
from cpumoe.models.synth_layout import Layout, Piece, Sizes
from cpumoe.models.synth_layouts import LAYOUTS

Pattern = Literal["normal", "uniform", "alternating", "ramp", "random"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

WEIGHT_STD = 0.02
DEFAULT_MAX_SHARD_BYTES = 4 << 30
# Range of the E8M0 bytes of `random`: 2^-10 .. 2^-5, so that weights are around WEIGHT_STD.
_RANDOM_E8M0 = (117, 123)
# The root of the mean square of all E4M3 numbers is 100.
_RANDOM_FP8_SCALE = WEIGHT_STD / 100


def random_matrix(
    fmt: WeightFormat,
    n: int,
    k: int,
    pattern: Pattern,
    generator: torch.Generator,
    scales: ScaleChoice = USUAL_SCALES,
) -> QuantizedMatrix:
    """Returns one matrix ``[n, k]`` of a weight pattern, quantized to nearest.

    Args:
        fmt: the weight format.
        n: number of rows.
        k: number of columns, even in formats of 4 bits.
        pattern: ``normal``: independent normal weights of standard deviation `WEIGHT_STD`, as
            trained models have. ``uniform``: one value everywhere (a wrong scale shows).
            ``alternating``: positive for even k, negative for odd (swapped nibbles show). Sizes
            vary, because the sums would cancel otherwise. ``ramp``: rises along k, and starts
            elsewhere in each row (permuted k or rows show). ``random``: every code is equally
            likely, with scales of moderate size; without scales, weights are uniform. This is the
            fastest pattern.
        generator: draws all random numbers, including the size of constant patterns.
        scales: the type of scales, and how many weights share one.

    Raises:
        ValueError: the pattern is unknown, or the format does not allow `k` or `scales`.
    """
    fmt.check_k(k)
    if pattern == "random":
        return _random_codes(fmt, n, k, generator, scales)

    def quantized(weights: torch.Tensor) -> QuantizedMatrix:
        return fmt.quantized(weights, scales.group_of(k), scale_dtype=scales.dtype)

    if pattern == "normal":
        weights = torch.empty(n, k, dtype=torch.float32, device="cpu")
        weights.normal_(0, WEIGHT_STD, generator=generator)
        return quantized(weights)
    # Each matrix has a size of its own, so that confused experts show as well.
    value = WEIGHT_STD * 2 ** (4 * uniform(generator=generator).item() - 3)
    if pattern == "uniform":
        weights = torch.full((n, k), value, dtype=torch.float32, device="cpu")
    elif pattern == "alternating":
        sizes = 1 + (_count(k) // 2 + 3 * _count(n).unsqueeze(1)) % 8 / 8
        weights = value * sizes * (1 - 2 * (_count(k) % 2))
    elif pattern == "ramp":
        start = _count(n).unsqueeze(1) * 7
        weights = value * (2 * ((_count(k) + start) % k) / k - 1)
    else:
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    return quantized(weights)


def write_checkpoint(
    out: str | os.PathLike[str],
    spec: ModelSpec,
    *,
    layers: int | None = None,
    experts: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    top_k: int | None = None,
    scales: ScaleChoice = USUAL_SCALES,
    pattern: Pattern = "normal",
    seed: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes routed experts and routers of `spec` to a checkpoint folder; returns its path.

    Names, dtypes, packing, index and config.json are those of the published model, with the given
    sizes. Attention, embeddings and shared experts are left out. Only one expert is in memory at a
    time. The result depends on the arguments alone. After an error or Ctrl-C, the files that were
    written are deleted.

    Args:
        out: the folder, which is created with its parents.
        spec: the model (see `cpumoe.models.find_model`).
        layers: number of MoE layers to write. Dense layers before them count for the layers'
            numbers, but are not written. Default of this and the other sizes: as in the model.
        experts: experts per layer.
        hidden: hidden size.
        intermediate: intermediate size of an expert.
        top_k: experts per token; default: as in the model, at most `experts`.
        scales: the type of scales, and how many weights share one.
        pattern: the weights (see `random_matrix`).
        seed: seed of the random numbers, 0 to 2**63 - 1.
        overwrite: whether the checkpoint in a non-empty folder may be replaced. Its config, index,
            model.safetensors and the shards that the index lists are deleted first; other files
            stay.
        max_shard_bytes: largest size of a shard that holds more than one tensor.
        progress: called with (bytes written, bytes in all).

    Raises:
        FileExistsError: `out` is a file, or is not empty and `overwrite` is false, or holds
            safetensors files that its index does not list.
        OSError: the disk has not enough free space.
        ValueError: a size, the scales, the pattern, the seed or the model is not supported.
    """
    folder = Path(out)
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    check_seed(seed)
    layout = _layout(spec, _sizes(spec, layers, experts, hidden, intermediate, top_k), scales)
    # Listing more experts than any disk holds would take hours.
    codes = sum(n * k for n, k in layout.projections) * layout.format.code_bits // 8
    least = codes * layout.sizes.experts * layout.sizes.layers
    total, free = _disk_bytes(folder)
    if least > total:
        raise _no_space(folder, least, free)
    specs = [tensor for layer in layout.layer_ids for tensor in layout.tensors(layer)]
    _prepare_folder(folder, overwrite, sum(tensor.nbytes for tensor in specs))
    with CheckpointWriter(
        folder, specs, layout.config(), max_shard_bytes=max_shard_bytes, progress=progress
    ) as writer:
        for layer in layout.layer_ids:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**64)
            for name, row, tensor in _layer_pieces(layout, layer, pattern, generator):
                writer.write(name, tensor, row)
    return folder


def _layout(spec: ModelSpec, sizes: Sizes, scales: ScaleChoice) -> Layout:
    layout_type = LAYOUTS.get(spec.layout)
    if layout_type is None:
        raise ValueError(
            f"{spec.name}: its {spec.weight_format} checkpoint layout cannot be written yet; "
            f"layouts that can: {', '.join(LAYOUTS)}"
        )
    layout = layout_type(spec, sizes, scales)
    layout.check_k(sizes.hidden, "hidden_size")
    layout.check_k(sizes.intermediate, "intermediate_size")
    return layout


def _layer_pieces(
    layout: Layout, layer: int, pattern: Pattern, generator: torch.Generator
) -> Iterator[Piece]:
    yield from layout.router(layer, generator)
    for index in range(layout.sizes.experts):
        matrices = [
            random_matrix(layout.format, n, k, pattern, generator, layout.scales)
            for n, k in layout.projections
        ]
        yield from layout.expert(layer, index, matrices, generator)


def _count(end: int) -> torch.Tensor:
    return torch.arange(end, dtype=torch.float32, device="cpu")


def _random_codes(
    fmt: WeightFormat, n: int, k: int, generator: torch.Generator, choice: ScaleChoice
) -> QuantizedMatrix:
    group = fmt.checked_group(choice.group_of(k), k)
    dtype = fmt.checked_scale_dtype(choice.dtype)
    if dtype is None:
        weights = uniform(n, k, generator=generator).sub_(0.5).mul_(12**0.5 * WEIGHT_STD)
        return fmt.quantized(weights)
    # random_ draws one number per element, so fewer and wider elements are several times faster.
    words = torch.empty(n, -(-k * fmt.code_bits // 64), dtype=torch.int64, device="cpu")
    codes = words.random_(-(2**63), None, generator=generator).view(torch.uint8)
    codes = codes[:, : k * fmt.code_bits // 8].contiguous()
    if fmt.blocks:
        codes[codes.bitwise_and(0x7F) == 0x7F] = 0  # NaN
        shape = (n, 1) if choice.by_row else (-(-n // BLOCK), -(-k // BLOCK))
        scales = uniform(*shape, generator=generator).add_(0.5) * _RANDOM_FP8_SCALE
        scales = power_of_two_above(scales) if dtype == torch.float8_e8m0fnu else scales.to(dtype)
        return QuantizedMatrix(codes.view(fmt.code_storage), scales)
    shape = (n, -(-k // group))
    if dtype == torch.uint8:
        scales = torch.randint(
            *_RANDOM_E8M0, shape, dtype=torch.uint8, device="cpu", generator=generator
        )
    else:
        scales = uniform(*shape, generator=generator) * WEIGHT_STD / 4
        if fmt.factor_for is not None:
            factor = torch.tensor(WEIGHT_STD / 4 / 256, dtype=torch.float32, device="cpu")
            return QuantizedMatrix(codes, (scales / factor).to(dtype), factor)
        scales = scales.to(dtype)
    return QuantizedMatrix(codes, scales)


def _sizes(
    spec: ModelSpec,
    layers: int | None,
    experts: int | None,
    hidden: int | None,
    intermediate: int | None,
    top_k: int | None,
) -> Sizes:
    experts = spec.num_experts if experts is None else experts
    sizes = Sizes(
        layers=spec.num_moe_layers if layers is None else layers,
        experts=experts,
        hidden=spec.hidden_size if hidden is None else hidden,
        intermediate=spec.moe_intermediate_size if intermediate is None else intermediate,
        top_k=min(spec.top_k, experts) if top_k is None else top_k,
    )
    for name, value in vars(sizes).items():
        if value <= 0:
            raise ValueError(f"{name}: must be positive, got {value}")
    if sizes.top_k > sizes.experts:
        raise ValueError(f"top_k: must be at most experts ({sizes.experts}), got {sizes.top_k}")
    return sizes


def _prepare_folder(folder: Path, overwrite: bool, nbytes: int) -> None:
    replaced: list[Path] = []
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: expected a folder to write to, got a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{folder}: expected an empty folder; name another one, or pass --overwrite "
                f"(in Python: overwrite=True)"
            )
        replaced = _checkpoint_files(folder)
    free = _disk_bytes(folder)[1] + sum(path.lstat().st_size for path in replaced)
    if nbytes > free:
        raise _no_space(folder, nbytes, free)
    folder.mkdir(parents=True, exist_ok=True)
    for path in replaced:
        path.unlink()


def _disk_bytes(folder: Path) -> tuple[int, int]:
    """Returns all bytes, and the free ones, of the disk on which a folder is or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(existing)
    return usage.total, usage.free


def _no_space(folder: Path, nbytes: int, free: int) -> OSError:
    return OSError(
        f"{folder}: the checkpoint needs {nbytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free; "
        f"write fewer layers or experts"
    )


def _checkpoint_files(folder: Path) -> list[Path]:
    """Returns the files of a folder's checkpoint, all of which may be deleted."""
    shards = {SINGLE_NAME, *_indexed_shards(folder / INDEX_NAME)}
    others = sorted({path.name for path in folder.glob("*.safetensors")} - shards)
    if others:
        raise FileExistsError(
            f"{folder}: {INDEX_NAME} does not list {others[0]} ({len(others)} such files); "
            f"move them away, or name another folder"
        )
    files = (folder / name for name in sorted({*shards, INDEX_NAME, CONFIG_NAME}))
    return [path for path in files if path.is_symlink() or path.is_file()]


def _indexed_shards(index: Path) -> set[str]:
    """Returns the safetensors files that an index lists; none if it cannot be read."""
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()
    names = {file for file in files if isinstance(file, str) and Path(file).name == file}
    return {name for name in names if name.endswith(".safetensors")}
