"""bf16 as published: the weights are bf16 numbers, without scales."""

from __future__ import annotations

import torch

from cpumoe.formats.weight_format import WeightFormat

BF16 = WeightFormat(name="bf16", code_bits=16, code_dtypes=(torch.bfloat16,))
