"""A dense layer whose weights stay in their stored format."""

from __future__ import annotations

import math
from typing import Any

import torch
from typing_extensions import Unpack, override

from cpumoe import _core
from cpumoe._base.tensors import (
    address,
    contiguous,
    describe,
    is_recorded,
    modes_are_active,
    new_strided,
    plain,
    refuse_tracing,
)
from cpumoe._engine.arguments import MatrixStack, dense_bias, matrix_view, normalized
from cpumoe._engine.config import engine_precision, few_tokens
from cpumoe._engine.export import new_matrix
from cpumoe._engine.gradients import without_gradients
from cpumoe._engine.linear_op import check_input, new_handle, record_linear
from cpumoe._engine.output import ELEMENTS, Destination
from cpumoe.formats import QuantizedMatrix, weight_format
from cpumoe.numerics.precision import resolve_precision
from cpumoe.options import ExpertsKeywords, ExpertsOptions, with_overrides
from cpumoe.packed_layer import PackedLayer
from cpumoe.placement import Placement, placement_of
from cpumoe.runtime import Runtime, default_runtime

# Formats that hold weights of a dtype as they are.
_OWN_FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16"}

# Dynamo, which is about to trace the call, sees a function that returns True.
_seen_by_dynamo = torch.compiler.is_dynamo_compiling


def own_format(weight: torch.Tensor) -> str | None:
    """Returns the name of a format that holds weights exactly, or None.

    Args:
        weight: a matrix of any dtype, in memory on the CPU. float32 weights have a format if all of
            them are bf16 numbers, or all of them are fp16 numbers.
    """
    if weight.dtype == torch.float32:
        for dtype, name in _OWN_FORMAT.items():
            if torch.equal(weight.to(dtype).float(), weight):
                return name
    return _OWN_FORMAT.get(weight.dtype)


def is_finite(weight: torch.Tensor) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(map(math.isfinite, torch.stack(weight.aminmax()).tolist()))


def stored_weights(
    module: torch.nn.Linear, format: str | None, name: str
) -> tuple[QuantizedMatrix, str]:
    """Returns a module's weights in a format, and the format's name.

    Args:
        module: the module.
        format: the format to which weights are rounded; None: the one that holds them exactly.
        name: what errors call the weights.

    Raises:
        TypeError: no format holds the weights exactly, or they are not in memory on the CPU.
        ValueError: see `Linear.from_module`.
    """
    weight = plain(module.weight.detach(), name).contiguous()
    format = own_format(weight) if format is None else format
    if format is None:
        if not is_finite(weight):
            raise ValueError(f"{name}: expected finite weights, got NaN or infinity")
        raise TypeError(
            f"{name}: expected bfloat16 or float16, or float32 weights that are numbers of one of "
            f"these, got {describe(weight)}; pass format= to round the weights, for example "
            'format="bf16"'
        )
    if format == _OWN_FORMAT.get(weight.dtype):
        return QuantizedMatrix(weight, name=name), format
    return weight_format(format).quantized(weight, name=name), format


class Linear(PackedLayer, torch.nn.Module):
    """A dense layer ``y = x W^T + b`` for inference, in place of `torch.nn.Linear`.

    The weights are packed for this CPU, in the format in which they are stored. They are in memory
    once and serve one token as well as many. Make a layer with `from_module` or `from_tensors`.

    The layer has no parameters: no dtype or device to move to, no entry in a state dict, no
    gradients. Weights are always exact. ``precision`` says how activations may be rounded, as for
    `cpumoe.Experts`.
    """

    _anew = "make it anew with from_module or from_tensors"

    def __init__(
        self,
        weight: MatrixStack,
        *,
        format: str,
        bias: torch.Tensor | None = None,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> None:
        """Packs a matrix; prefer `from_module` and `from_tensors`, which describe the arguments."""
        super().__init__()
        options = with_overrides(options, overrides, "Linear")
        origin = self._choose(format, options.isa, options.precision)
        matrix = normalized(self._format, weight, "weight", stacked=False)
        n, k = matrix.shape
        self._sizes = n, k
        self._runtime = options.runtime
        self._bias = dense_bias(bias, n)
        floats = None if self._bias is None else self._bias.float().contiguous()
        self._layer = _core.LinearLayer(
            runtime=self.runtime.core,
            isa=self._isa,
            origin=origin,
            format=self.format,
            matrix=matrix_view(matrix, matrix.name),
            bias=0 if floats is None else address(floats, "bias"),
            precision=engine_precision(options.precision),
            batch_invariant=options.batch_invariant,
            few_token_limit=few_tokens(options.few_token_limit),
        )
        self._call: tuple[object, _core.LinearCall | None] = (None, None)
        self._handle = new_handle(self)

    @classmethod
    def from_module(
        cls,
        module: torch.nn.Linear,
        *,
        format: str | None = None,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> Linear:
        """Packs the weights of a `torch.nn.Linear`, which is not needed afterwards.

        Args:
            module: the layer, on the CPU.
            format: a weight format, such as "mxfp4", to which the weights are rounded. Default: the
                weights as they are, in bfloat16 or float16, or in float32 if all of them are
                numbers of one of these.
            options: threads, precision, variant and kernels; default: `ExpertsOptions()`.
            **overrides: fields of `ExpertsOptions` by name. They take precedence over `options`.

        Raises:
            TypeError: `module` is another kind of module, or of a derived class; its weights need a
                `format`, or are not on the CPU.
            ValueError: a weight is NaN or infinite, the format is unknown, in_features is odd and
                the format has 4 bits, or the module has hooks.
        """
        if type(module) is not torch.nn.Linear:
            raise TypeError(
                f"module: expected exactly a torch.nn.Linear, got {type(module).__name__}, which "
                "may compute something else; for its weights alone there is from_tensors"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError("module: expected no hooks, which would be lost; remove them first")
        matrix, format = stored_weights(module, format, "module.weight")
        options = with_overrides(options, overrides, "Linear.from_module")
        return cls(matrix, format=format, bias=module.bias, options=options)

    @classmethod
    def from_tensors(
        cls,
        weight: MatrixStack,
        *,
        format: str,
        bias: torch.Tensor | None = None,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> Linear:
        """Packs a matrix from tensors in memory. The tensors are not needed afterwards.

        Args:
            weight: the parts of a matrix ``[out_features, in_features]`` in a weight format: a
                `QuantizedMatrix`, a tuple of its parts, or a tensor for a format without scales.
                `Experts.from_tensors` lists the parts of each format; here they have no dimension
                ``experts``.
            format: "mxfp4", "int4", "bf16", "fp16", "fp8" or "nvfp4".
            bias: ``[out_features]`` bf16, fp16 or fp32; default: none.
            options: see `from_module`.
            **overrides: see `from_module`.

        Raises:
            TypeError: the format does not have a tensor's dtype, or a tensor is not in memory on
                the CPU.
            ValueError: shapes do not fit together, a scale is NaN, or a tensor is not contiguous
                along its last dimension.
        """
        options = with_overrides(options, overrides, "Linear.from_tensors")
        return cls(weight, format=format, bias=bias, options=options)

    @override
    def forward(self, input: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Computes ``input W^T + b``. Sums are fp32, and are rounded once, to nearest even.

        ``torch.compile``, ``torch.export`` and tracers record the call as the operator
        ``torch.ops.cpumoe.linear``. Meta and fake tensors give a result like them.

        Args:
            input: ``[..., in_features]`` bf16, fp16 or fp32, on the CPU.
            out_dtype: the result's dtype, bf16, fp16 or fp32. Default: that of `input`, under
                autocast as well.

        Returns:
            ``[..., out_features]``, contiguous. If `input` requires a gradient, so does the result,
            and the backward pass through it raises RuntimeError.

        Raises:
            TypeError: `input` has another dtype, device or layout, or no memory; torch.func
                transforms it; `out_dtype` is another dtype.
            ValueError: the last dimension of `input` is not in_features.
            RuntimeError: the runtime is closed, or belongs to the parent of a forked process;
                `input` has a tangent of forward-mode differentiation.
        """
        if _seen_by_dynamo():
            return self._record(self._handle.tensor, input, out_dtype)
        try:
            return self.compute(input, out_dtype)
        except TypeError:
            if not is_recorded(input):
                raise
            return self._record(self._handle.number, input, out_dtype)

    def _record(
        self, handle: torch.Tensor | int, input: torch.Tensor, out_dtype: torch.dtype | None
    ) -> torch.Tensor:
        return record_linear(handle, (self.in_features, self.out_features), input, out_dtype)

    def compute(self, given: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Does what `forward` does, without hooks and tracers, for the operator."""
        x, start, shape = contiguous(given, "input", True)
        n, k = self._sizes
        check_input(x, k)
        if out_dtype is None:
            out_dtype = x.dtype
        else:
            Destination(dtype=out_dtype).check()
        if modes_are_active():
            refuse_tracing("input")
        tokens = x.numel() // k
        output, output_start = new_strided((tokens, n), (n, 1), out_dtype)
        stride = x.stride(0) if len(shape) == 2 else k
        self._engine_call(x.dtype, out_dtype).run(start, stride, tokens, output_start, n)
        if len(shape) != 2:
            output = output.view(*shape[:-1], n)
        return without_gradients(output, given)

    def _engine_call(self, dtype: torch.dtype, out_dtype: torch.dtype) -> _core.LinearCall:
        runtime = self.runtime.core
        fp32_as_bf16 = (
            dtype == torch.float32 and resolve_precision(self._precision, dtype) == "bf16"
        )
        properties = (runtime, dtype, out_dtype, fp32_as_bf16)
        kept, call = self._call
        if call is None or kept != properties:
            call = _core.LinearCall(
                runtime=runtime,
                layer=self._layer,
                input_dtype=ELEMENTS[dtype],
                output_dtype=ELEMENTS[out_dtype],
                fp32_as_bf16=fp32_as_bf16,
            )
            self._call = (properties, call)
        return call

    def export(self) -> QuantizedMatrix:
        """Returns the weights as they were stored, bit for bit, in new tensors."""
        refuse_tracing("export")
        matrix = new_matrix(self._format, *self._sizes, self._layer.scales)
        self._layer.unpack(runtime=self.runtime.core, matrix=matrix_view(matrix, "weight"))
        return matrix

    @property
    def in_features(self) -> int:
        """Elements of a token's input."""
        return self._sizes[1]

    @property
    def out_features(self) -> int:
        """Elements of a token's result."""
        return self._sizes[0]

    @property
    def handle(self) -> torch.Tensor:
        """What ``torch.ops.cpumoe.linear`` takes for this layer, an int64 scalar.

        The handle is valid in this process for as long as this object lives.
        """
        return self._handle.tensor

    @property
    def bias(self) -> torch.Tensor | None:
        """A copy of the bias ``[out_features]``, in the dtype that was given, or None."""
        return None if self._bias is None else self._bias.clone()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, the bias included."""
        return self._layer.nbytes

    @property
    def placement(self) -> Placement:
        """The NUMA nodes in whose memory the weights lie, those of the runtime that packed them."""
        return placement_of(self._layer)

    @property
    def runtime(self) -> Runtime:
        """The threads that compute."""
        return self._runtime or default_runtime()

    @override
    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "weight: a cpumoe.Linear has no such tensor, because its weights are packed; "
                "export() returns them"
            )
        return super().__getattr__(name)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"{name}: the weights of a cpumoe.Linear are packed and cannot be changed; "
                f"{self._anew}"
            )
        if name in ("in_features", "out_features"):
            raise AttributeError(
                f"{name}: the size of a cpumoe.Linear is that of its packed weights and cannot be "
                f"changed; {self._anew}"
            )
        super().__setattr__(name, value)

    @override
    def extra_repr(self) -> str:
        """Returns what ``repr`` says of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._bias is not None}, format={self.format}, isa={self.isa}"
        )
