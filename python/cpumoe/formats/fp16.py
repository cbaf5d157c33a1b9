"""fp16 as published: the weights are IEEE binary16 numbers, without scales."""

from __future__ import annotations

import torch

from cpumoe.formats.weight_format import WeightFormat

FP16 = WeightFormat(name="fp16", code_bits=16, code_dtypes=(torch.float16,))
