"""How vLLM stores routed experts while it loads them, and which matrices of cpumoe these are.

vLLM keeps the gate and up projections of all experts in tensors ``w13_...``, gate first, and the
down projections in tensors ``w2_...``. Its loader finds them by these names, and cuts the shard of
a rank out of each by the attribute ``quant_method``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cpumoe.formats import QuantizedMatrix
from cpumoe.numerics.glu import GLU, SwiGLU

_UNIT_E8M0 = 127  # 2^0
_ZERO_INT4 = -0x77777778  # eight codes 8, which stand for 0


@dataclass(frozen=True)
class StoredTensor:
    """One kind of tensor that vLLM keeps for the experts of a layer.

    Attributes:
        part: what of a `QuantizedMatrix` it is; "": cpumoe does not need it.
        name: vLLM's name, after ``w13_`` and ``w2_``.
        dtype: the elements' dtype.
        rows: rows of weights that share an element; 0: the tensor has one element for each matrix.
        columns: columns of weights that share an element; 0: all.
        fill: the value where the checkpoint has nothing, as in padding. Zero codes, or scales that
            change nothing.
        loading: vLLM's word for how a rank's shard is cut out, or "".
        adopts: whether the tensor takes the checkpoint's dtype, so that nothing is rounded.
        exact: whether the checkpoint's numbers must be numbers of `dtype`, unless the model is
            computed in `dtype`.
    """

    part: str
    name: str
    dtype: torch.dtype
    rows: int = 1
    columns: int = 1
    fill: int = 0
    loading: str = ""
    adopts: bool = False
    exact: bool = False

    def shape(self, experts: int, matrices: int, n: int, k: int) -> tuple[int, ...]:
        """Returns the shape for stacks of so many matrices ``[n, k]`` for each expert."""
        if not self.rows:
            return (experts, matrices) if matrices > 1 else (experts,)
        columns = -(-k // self.columns) if self.columns else 1
        return experts, matrices * -(-n // self.rows), columns


@dataclass(frozen=True)
class StoredForm:
    """How the experts of a checkpoint are stored.

    Attributes:
        format: cpumoe's name of the weight format.
        tensors: the tensors. The codes come first.
        group: successive columns that share a scale, and that no rank may cut; 1: none do, or all.
        ragged: whether the last group of a row may be smaller.
        cut_by_model: whether vLLM's model, and not its loader, cuts the shards of ranks out.
        vllm_name: what vLLM's own methods call this form, for its models that ask.
        interleaved: whether rows of gate and up alternate.
        divides: whether the factor divides the weights.
    """

    format: str
    tensors: tuple[StoredTensor, ...]
    group: int = 1
    ragged: bool = True
    cut_by_model: bool = False
    vllm_name: str = ""
    interleaved: bool = False
    divides: bool = False

    def why_not(self, hidden: int, intermediate: int, ranks: int) -> str | None:
        """Returns why cpumoe, or vLLM's loader, cannot have experts of these sizes, or None.

        Args:
            hidden: width of the hidden states.
            intermediate: inner width of an expert in this rank.
            ranks: number of ranks that share an expert.
        """
        codes = self.tensors[0].columns
        whole = math.lcm(codes, self.group)
        multiple = codes if self.ragged else whole
        if hidden % multiple:
            return f"hidden size {hidden} is no multiple of {multiple}"
        if self.cut_by_model:  # which gives each rank whole groups
            intermediate, ranks = intermediate * ranks, 1
            multiple = whole
        multiple = whole if ranks > 1 else multiple
        if intermediate % multiple:
            shared = f" in each of {ranks} ranks" if ranks > 1 else ""
            return f"intermediate size {intermediate}{shared} is no multiple of {multiple}"
        return None

    def padded(self, intermediate: int, ranks: int) -> int:
        """Returns the inner width of vLLM's tensors for that of an expert in one of `ranks`."""
        if ranks == 1 or not self.cut_by_model:
            return intermediate
        return -(-intermediate // self.group) * self.group

    def matrix(
        self, tensors: Mapping[str, torch.Tensor], expert: int, projection: str
    ) -> QuantizedMatrix:
        """Returns an expert's matrix as views of vLLM's tensors, by their full names."""
        parts = {}
        for tensor in self.tensors:
            if tensor.part:
                stack = "w2" if projection == "down" else "w13"
                stored = tensors[f"{stack}_{tensor.name}"][expert]
                parts[tensor.part] = self._of_projection(stored, projection)
        factor = parts.get("factor")
        if factor is not None:
            factor = factor.reshape(())
            factor = factor.reciprocal() if self.divides else factor
        return QuantizedMatrix(parts["codes"], parts.get("scales"), factor)

    def bias(
        self, tensors: Mapping[str, torch.Tensor], expert: int, projection: str
    ) -> torch.Tensor:
        """Returns an expert's bias of a projection."""
        name = "w2_bias" if projection == "down" else "w13_bias"
        return self._of_projection(tensors[name][expert], projection)

    def _of_projection(self, stored: torch.Tensor, projection: str) -> torch.Tensor:
        if projection == "down":
            return stored
        index = 0 if projection == "gate" else 1
        if self.interleaved and stored.shape[0] > 2:
            return stored[index::2]
        half = stored.shape[0] // 2
        return stored[index * half : (index + 1) * half]


def mxfp4(codes: str = "weight", *, interleaved: bool = False) -> StoredForm:
    """MXFP4: of gpt-oss, whose rows of gate and up alternate, and of DeepSeek-V4 and others."""
    loading = "group" if codes == "weight_packed" else "block"
    return StoredForm(
        "mxfp4",
        (
            StoredTensor("codes", codes, torch.uint8, columns=2),
            StoredTensor(
                *("scales", "weight_scale", torch.uint8),
                columns=32,
                fill=_UNIT_E8M0,
                loading=loading,
            ),
        ),
        group=32,
        cut_by_model=interleaved,
        vllm_name="gpt_oss_mxfp4" if interleaved else "mxfp4",
        interleaved=interleaved,
    )


def int4(group: int | None) -> StoredForm:
    """compressed-tensors' symmetric INT4; None: the weights of a row share a scale."""
    loading = "channel" if group is None else "group"
    scales = StoredTensor(
        *("scales", "weight_scale", torch.bfloat16),
        columns=group or 0,
        fill=1,
        loading=loading,
        adopts=True,
    )
    codes = StoredTensor("codes", "weight_packed", torch.int32, columns=8, fill=_ZERO_INT4)
    # The shape of a matrix that is not packed, two numbers for each expert.
    shape = StoredTensor("", "weight_shape", torch.float32, rows=0)
    # How many weights share a scale is known from the number of scales, so groups must be whole.
    return StoredForm("int4", (codes, scales, shape), group=group or 1, ragged=False)


def fp8_blocks(scales: str = "weight_scale_inv") -> StoredForm:
    """FP8 with a scale for each block of 128 x 128 weights."""
    return StoredForm(
        "fp8",
        (
            StoredTensor("codes", "weight", torch.float8_e4m3fn),
            StoredTensor(
                *("scales", scales, torch.float32),
                rows=128,
                columns=128,
                fill=1,
                loading="block",
                adopts=True,
            ),
        ),
        group=128,
    )


def fp8_rows() -> StoredForm:
    """compressed-tensors' FP8 with a scale for each row. Activations are not rounded to FP8."""
    scales = StoredTensor(
        *("scales", "weight_scale", torch.float32),
        columns=0,
        fill=1,
        loading="channel",
        adopts=True,
    )
    return StoredForm("fp8", (StoredTensor("codes", "weight", torch.float8_e4m3fn), scales))


def nvfp4(*, packed: bool) -> StoredForm:
    """NVFP4 of compressed-tensors (`packed`) or ModelOpt. Activations are not rounded to FP4."""
    codes = "weight_packed" if packed else "weight"
    factor = "weight_global_scale" if packed else "weight_scale_2"
    inputs = "input_global_scale" if packed else "input_scale"
    loading = "group" if packed else "block"
    return StoredForm(
        "nvfp4",
        (
            StoredTensor("codes", codes, torch.uint8, columns=2),
            StoredTensor(
                *("scales", "weight_scale", torch.float8_e4m3fn),
                columns=16,
                fill=1,
                loading=loading,
            ),
            StoredTensor("factor", factor, torch.float32, rows=0, fill=1, loading="tensor"),
            StoredTensor("", inputs, torch.float32, rows=0, fill=1, loading="tensor"),
        ),
        group=16,
        divides=packed,
    )


def unquantized(dtype: torch.dtype) -> StoredForm | str:
    """Weights as they are, or why cpumoe has no such format."""
    formats = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype not in formats:
        return f"weights in {str(dtype).removeprefix('torch.')} that are not quantized"
    return StoredForm(formats[dtype], (StoredTensor("codes", "weight", dtype, exact=True),))


class Activation(NamedTuple):
    """What vLLM says about the activation of a layer."""

    name: str  # of its MoEActivation, in capitals
    limit: float | None
    alpha: float | None
    beta: float | None


def activation_of(given: Activation, *, interleaved: bool) -> GLU | str:
    """Returns cpumoe's activation, or why there is none.

    vLLM's SWIGLUOAI has gpt-oss's constants. Its rows of gate and up alternate, which is known of
    gpt-oss's own checkpoints alone.
    """
    limit = given.limit or None
    if given.name == "SWIGLUOAI" and interleaved:
        return SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
    if interleaved or (limit is not None and not math.isfinite(limit)):
        return f"activation {given.name} with limit {limit} and alternating rows"
    if given.name == "SILU":
        return SwiGLU(limit=limit)
    if given.name == "SWIGLUOAI_UNINTERLEAVE":
        alpha = 1.0 if given.alpha is None else given.alpha
        return SwiGLU(alpha=alpha, limit=limit, up_offset=given.beta or 0.0)
    if given.name in ("GELU", "GELU_TANH") and limit is None:
        return GLU(given.name.lower())
    return f"activation {given.name}"
