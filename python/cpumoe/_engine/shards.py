"""Shards of experts for tensor parallelism: some of the intermediate features of each expert.

A shard has these rows of gate and up, and these columns of down. What the shards of an expert
compute adds up to what the whole expert computes, because the sum over down's columns is a sum over
intermediate features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from cpumoe._base.scalars import integer
from cpumoe.checkpoint import ExpertReader, ExpertWeights
from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix
from cpumoe.formats.quantized_matrix import group_of
from cpumoe.formats.weight_format import KERNEL_GROUP


def shard_features(reader: ExpertReader, layer: int, shard: Sequence[int] | None) -> range:
    """Returns the intermediate features of a rank's shard of a layer; None: all of them.

    Args:
        reader: the checkpoint.
        layer: index of the decoder layer.
        shard: the rank and the number of ranks.

    Raises:
        TypeError: `shard` is no pair of ints.
        ValueError: there is no such rank, or the layer has too few groups of features.
        IndexError: there is no such layer.
    """
    size = reader.intermediate_size
    if shard is None:
        return range(size)
    rank, world = _checked(shard)
    by_row = reader.scales_by_row(layer)
    group = 0 if by_row else reader.group_size(layer, size)
    groups_vary = WEIGHT_FORMATS[reader.layer_format(layer)].groups_vary
    return partition(size, group, world, groups_vary=groups_vary)[rank]


def partition(size: int, group: int, world: int, *, groups_vary: bool = False) -> list[range]:
    """Divides intermediate features among ranks, as evenly as whole groups allow.

    Args:
        size: the number of features.
        group: successive features that share a scale of down; 0: the scales do not matter.
        world: the number of ranks.
        groups_vary: whether the number of a shard's scales must tell the size of its groups.

    Raises:
        ValueError: there are fewer groups than ranks.
    """
    unit = math.lcm(group or 1, KERNEL_GROUP)
    units = -(-size // unit)
    if units < world:
        raise ValueError(
            f"shard: expected at most {units} ranks, because {size} intermediate features have "
            f"{units} groups of {unit}, got {world}"
        )
    last = units - units // world  # the first unit of the last rank
    while groups_vary and not _says_group(size - last * unit, group):
        last += 1
    bounds = [rank * last // (world - 1) * unit for rank in range(world - 1)]
    bounds += [last * unit if world > 1 else 0, size]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def shard_of(weights: ExpertWeights, features: range, *, first: bool) -> ExpertWeights:
    """Returns a shard of an expert, as views.

    Args:
        weights: the whole expert.
        features: the shard's intermediate features.
        first: whether the shard has the bias of down. The others have zeros instead.

    Raises:
        ValueError: the features cut a group of weights that share a scale.
    """
    up = rows_of(weights.up, features)
    down_bias = weights.down_bias
    return ExpertWeights(
        gate=up if weights.gate is weights.up else rows_of(weights.gate, features),
        up=up,
        down=columns_of(weights.down, features),
        gate_bias=_features_of(weights.gate_bias, features),
        up_bias=_features_of(weights.up_bias, features),
        down_bias=down_bias if first or down_bias is None else torch.zeros_like(down_bias),
    )


def rows_of(matrix: QuantizedMatrix, rows: range) -> QuantizedMatrix:
    """Returns rows of a matrix, as views.

    Raises:
        ValueError: the rows begin within a block that shares a scale, and end in another one.
    """
    return replace(matrix[rows.start : rows.stop], name=matrix.name)


def columns_of(matrix: QuantizedMatrix, columns: range) -> QuantizedMatrix:
    """Returns columns of a matrix, as views.

    Raises:
        ValueError: a group or block that shares a scale is cut, or the number of scales would not
            tell the size of the groups (see `group_of`).
    """
    size = matrix.shape[1]
    if len(columns) == size:
        return matrix
    per = size // matrix.codes.shape[1]  # columns per element
    codes = matrix.codes[:, columns.start // per : columns.stop // per]
    grid = matrix.scale_grid
    if matrix.scales is None or grid is None:
        return QuantizedMatrix(codes, name=matrix.name)
    depth = grid[1]
    if depth == size:
        return QuantizedMatrix(codes, matrix.scales, matrix.factor, name=matrix.name)
    if columns.start % depth or (columns.stop % depth and columns.stop != size):
        raise ValueError(
            f"{matrix.name}: {depth} columns share scales, so columns must begin and end with such "
            f"a group, got columns {columns.start} to {columns.stop}"
        )
    scales = matrix.scales[:, columns.start // depth : -(-columns.stop // depth)]
    shard = QuantizedMatrix(codes, scales, matrix.factor, name=matrix.name)
    if grid[0] == 1 and shard.group_size != min(depth, len(columns)):
        raise ValueError(
            f"{matrix.name}: {scales.shape[1]} scales of {len(columns)} columns do not tell that "
            f"groups have {depth}, got columns {columns.start} to {columns.stop}; choose columns "
            f"that end with a whole group, or the last group alone"
        )
    return shard


def _says_group(columns: int, group: int) -> bool:
    """Whether the number of scales of so many columns tells how many columns share one."""
    if columns <= group or columns % (group or 1) == 0:
        return True
    return group_of(columns, -(-columns // group), KERNEL_GROUP) == group


def _features_of(bias: torch.Tensor | None, features: range) -> torch.Tensor | None:
    return None if bias is None else bias[features.start : features.stop]


def _checked(shard: Sequence[int]) -> tuple[int, int]:
    given: Any = shard
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(f"shard: expected (rank, world), two ints, or None, got {shard!r}")
    rank, world = (integer(number, "shard") for number in given)
    if not 0 <= rank < world:
        raise ValueError(f"shard: expected a rank from 0 to world - 1, got ({rank}, {world})")
    return rank, world
