"""The routed experts of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike

import torch
from typing_extensions import Unpack

from cpumoe._base.renamed import with_old_arguments
from cpumoe._base.scalars import boolean, integer
from cpumoe._base.tensors import is_recorded
from cpumoe._engine.arguments import MatrixStack
from cpumoe._engine.custom_op import new_handle, record_call
from cpumoe._engine.output import NEW_TENSOR, Destination, refuse_overlap
from cpumoe._engine.packing import checked_stack
from cpumoe._engine.repetition import Call
from cpumoe._engine.sources import CheckpointSource, InOrder, Source
from cpumoe.checkpoint import ExpertReader, ExpertWeights, open_checkpoint
from cpumoe.formats import weight_format
from cpumoe.future import Future
from cpumoe.numerics.glu import GLU
from cpumoe.numerics.precision import PRECISIONS
from cpumoe.options import ExpertsKeywords, ExpertsOptions, with_overrides
from cpumoe.packed_experts import PackedExperts
from cpumoe.runtime import default_runtime
from cpumoe.statistics import ExpertsStatistics

# Dynamo, which is about to trace the call, sees a function that returns True.
_seen_by_dynamo = torch.compiler.is_dynamo_compiling


class Experts(PackedExperts):
    """The routed experts of one layer, packed for this CPU.

    Make one with `from_checkpoint` or `from_tensors`. A call computes, for every token t with
    hidden state x,

        y[t] = sum_j topk_weights[t, j] * E(topk_ids[t, j])(x)
        E(x) = W_down h + b_down,  h = glu(W_gate x + b_gate, W_up x + b_up)

    Biases are added where the model has them. `GLU` has the formula of glu. The host keeps
    the router, shared experts and any scaling of the weights.

    Weights are always exact. ``precision`` names the lowest precision to which activations (x and
    h) may be rounded; a variant may be more precise. Errors are relative, for random normal data:

    - "auto" (the default): fp32 hidden states keep fp32 accuracy, with an error of about 1e-6. bf16
      and fp16 hidden states are treated as with "bf16". So are fp32 hidden states after
      ``torch.set_float32_matmul_precision("medium")``.
    - "bf16": at least bf16. The error is 1.7e-3 to 2.4e-3 with bf16 output, most of it the rounding
      of the output.
    - "int8": int8 per token and group of 32 columns, which is faster with many tokens. The error is
      1.2e-2, and more where the activation function saturates. Variant amx does this for at most
      six tokens of an expert, and uses bf16 for more.

    Results do not depend on the number of threads. By default, a token's result may depend on how
    many tokens share its experts, because that number chooses the kernel; see ``batch_invariant``
    of `ExpertsOptions`. ``docs/numerics.md`` says what is rounded where, on each variant.
    """

    @with_old_arguments("compute", "fused_tokens", "swiglu")
    def __init__(
        self,
        experts: Iterable[ExpertWeights] | Source,
        *,
        format: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: GLU | None = None,
        has_bias: bool = False,
        expert_mask: torch.Tensor | None = None,
        pack_masked: bool = True,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> None:
        """Packs `num_experts` experts; prefer `from_checkpoint` and `from_tensors`.

        These two describe the arguments. With int4, the first expert decides which dtypes of scales
        the layer takes: bfloat16 alone if it has no other, else all three.
        """
        options = with_overrides(options, overrides, "Experts")
        num_experts = integer(num_experts, "num_experts")
        source = experts if isinstance(experts, Source) else InOrder(experts, num_experts)
        super().__init__(
            source,
            format=format,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=activation,
            has_bias=has_bias,
            expert_mask=expert_mask,
            pack_masked=pack_masked,
            options=options,
        )
        self._handle = new_handle(self)

    @classmethod
    @with_old_arguments("compute", "fused_tokens", "swiglu")
    def from_checkpoint(
        cls,
        path: str | PathLike[str] | ExpertReader,
        layer: int,
        *,
        experts: Sequence[int] | None = None,
        shard: Sequence[int] | None = None,
        activation: GLU | None = None,
        expert_mask: torch.Tensor | None = None,
        pack_masked: bool = True,
        progress: bool | None = None,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> Experts:
        """Packs a layer's experts straight from a checkpoint's mapped files.

        Args:
            path: the checkpoint's folder (config.json and safetensors shards), or a reader from
                `open_checkpoint`, which saves reading the index again for each layer.
            layer: index of the decoder layer.
            experts: the checkpoint's experts that the layer has: expert i of the layer is expert
                ``experts[i]`` of the checkpoint. Repeated ones share one packed copy. Default: all
                experts, in the checkpoint's order.
            shard: rank and number of ranks, for tensor parallelism: each rank packs a part of the
                intermediate features of every expert, as rows of gate and up and columns of down.
                Parts are whole groups of 32 features, and of the weights that share a scale of
                down, so some ranks may have more than others. The results of all ranks add up to
                the layer's; ``out_dtype=torch.float32`` gives them unrounded. The bias of down
                belongs to rank 0, and the others have zeros. `export` gives the shard's bytes of
                the checkpoint. Default: whole experts.
            activation: the activation, a `SwiGLU` or another `GLU`; default: as config.json says.
            expert_mask: bool ``[experts]``; True: the expert is skipped. See `expert_mask`.
            pack_masked: whether masked experts are packed, too. Otherwise they take no memory until
                `pack` or another mask asks for them.
            progress: whether to show a progress bar; default: if standard error is a terminal.
            options: threads, precision, variant and kernels; default: `ExpertsOptions()`.
            **overrides: fields of `ExpertsOptions` by name. They take precedence over `options`.

        Raises:
            FileNotFoundError: the folder or a shard is missing.
            OSError: a shard cannot be read or mapped.
            CheckpointError: the checkpoint is damaged or incomplete (a ValueError).
            UnsupportedFormatError: the experts are in a format that cpumoe does not support, or
                `activation` is None and config.json does not specify it.
            IndexError: the layer has no routed experts, or not those that `experts` names.
            TypeError, ValueError: `ExpertsOptions` refuses a value, or has no field of that name;
                `experts` are no sequence of ints, or none; `shard` names no rank, or there are more
                ranks than groups; `path`, `layer`, `activation`,
                `expert_mask` or `pack_masked` is of another type.
        """
        options = with_overrides(options, overrides, "Experts.from_checkpoint")
        reader = path if isinstance(path, ExpertReader) else open_checkpoint(path)
        try:
            reader.check_layer(layer)  # before memory is asked for
            source = CheckpointSource(reader, layer, experts, progress, shard)
            made = cls(
                source,
                format=reader.layer_format(layer),
                num_experts=len(source.experts),
                hidden_size=reader.hidden_size,
                intermediate_size=len(source.features),
                activation=reader.known_activation() if activation is None else activation,
                has_bias=reader.has_bias,
                expert_mask=expert_mask,
                pack_masked=pack_masked,
                options=options,
            )
            source.settle(keep_reader=reader is path)
            return made
        finally:
            if reader is not path:
                reader.close()

    @classmethod
    @with_old_arguments("compute", "fused_tokens", "swiglu")
    def from_tensors(
        cls,
        *,
        gate: MatrixStack | None = None,
        up: MatrixStack,
        down: MatrixStack,
        format: str,
        activation: GLU | None = None,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        expert_mask: torch.Tensor | None = None,
        pack_masked: bool = True,
        options: ExpertsOptions | None = None,
        **overrides: Unpack[ExpertsKeywords],
    ) -> Experts:
        """Packs experts from tensors in memory. The tensors are not needed afterwards.

        Args:
            gate: codes and scales of the gate projections, a `QuantizedMatrix` or a tuple. Codes
                are uint8 or int8 ``[experts, intermediate, hidden/2]``, with even k in the low
                nibble; int4 codes may be int32 ``[experts, intermediate, hidden/8]``. Scales are
                ``[experts, intermediate, ceil(hidden/32)]``: float8_e8m0fnu or uint8 bytes
                (mxfp4), bfloat16, float16 or float32 (int4). With int4, any multiple of 32
                weights, or a row, may share a scale. A last group may be smaller; with int4, all
                groups are then of 32 * 2^n weights.
                With fp8, codes are float8_e4m3fn ``[experts, intermediate, hidden]``. Its scales
                are float32, bfloat16, float8_e8m0fnu or E8M0 bytes as uint8:
                ``[experts, ceil(intermediate/128), ceil(hidden/128)]`` or
                ``[experts, intermediate, 1]``, and are multiplied.
                With nvfp4, scales are float8_e4m3fn ``[experts, intermediate, ceil(hidden/16)]``,
                and a float32 factor ``[experts]``, which is multiplied, is the third part.
                With bf16 and fp16, one tensor ``[experts, intermediate, hidden]``.
                None for experts without gate projections, with
                ``activation=GLU(..., gated=False)``.
            up: codes and scales of the up projections, shaped like `gate`.
            down: codes ``[experts, hidden, intermediate/2]``, scales ``[..., intermediate/32]``, or
                bf16 or fp16 ``[experts, hidden, intermediate]``; fp8 and nvfp4 likewise.
            format: "mxfp4", "int4", "bf16", "fp16", "fp8" or "nvfp4".
            activation: the activation, a `SwiGLU` or another `GLU`; default: plain ``silu(g) * u``.
            gate_bias: ``[experts, intermediate]`` bf16, fp16 or fp32. Give all three biases or
                none. Experts without gate projections have no such bias.
            up_bias: ``[experts, intermediate]``.
            down_bias: ``[experts, hidden]``.
            expert_mask: see `from_checkpoint`.
            pack_masked: see `from_checkpoint`.
            options: see `from_checkpoint`.
            **overrides: see `from_checkpoint`.

        Raises:
            TypeError: the format does not have a tensor's dtype, or a tensor is not in memory on
                the CPU; a gate is given or missing, unlike `activation` says.
            ValueError: shapes do not fit together, a scale is NaN, or a tensor is not contiguous
                along its last dimension.
        """
        options = with_overrides(options, overrides, "Experts.from_tensors")
        biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
        gated = not isinstance(activation, GLU) or activation.gated
        stack = checked_stack(weight_format(format), gate, up, down, biases, gated=gated)
        experts, hidden, intermediate = stack.sizes
        return cls(
            stack,
            format=format,
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=intermediate,
            activation=activation,
            has_bias=bool(stack.biases),
            expert_mask=expert_mask,
            pack_masked=pack_masked,
            options=options,
        )

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        accumulate: bool = False,
    ) -> torch.Tensor:
        """Computes the weighted sum of each token's experts.

        Experts compute no gradients. If an input requires a gradient, so does the result, and the
        backward pass through it raises RuntimeError.

        ``torch.compile``, ``torch.export`` and tracers record the call as the operator
        ``torch.ops.cpumoe.experts``. Meta and fake tensors give a result like them.

        Args:
            hidden_states: ``[tokens, hidden]`` bf16, fp16 or fp32, on the CPU; tokens may be 0.
            topk_ids: ``[tokens, top_k]`` int32 or int64. The ids -1 and `num_experts` and those of
                masked experts are skipped. A token may name an expert more than once.
            topk_weights: ``[tokens, top_k]`` fp32, bf16 or fp16. They are not normalized.
            out: where the result goes, ``[tokens, hidden]`` bf16, fp16 or fp32. It must be
                contiguous, on the CPU, and apart from the inputs in memory. Default: a new tensor.
                If an argument is refused, `out` is unchanged. After an error of the computation,
                such as an IndexError, its content is undefined.
            out_dtype: the result's dtype, bf16, fp16 or fp32. Default: the dtype of `out`, or that
                of `hidden_states`. Sums are fp32, and are rounded once, to nearest even.
            accumulate: whether the result is added onto `out`, which must then be fp32. The
                sum of the experts is not rounded before the addition, which rounds to fp32.

        Returns:
            `out`, or a new tensor ``[tokens, hidden]``. The row of a token is zero if all its
            experts are skipped; with `accumulate` the row keeps its values.

        Raises:
            TypeError: a tensor has another dtype, device or layout, has no memory (it was freed, or
                only some of the inputs are meta or fake), or torch.func transforms it; an option is
                of another type.
            ValueError: a tensor has another shape, `out` overlaps an input or `expert_mask`, there
                is no `out` to accumulate onto, or a token needs an expert that has no weights in
                memory; see `pack`.
            IndexError: an id is out of range.
            RuntimeError: the runtime is closed, or belongs to the parent of a forked process; an
                input has a tangent of forward-mode differentiation; with `out`, a tensor requires a
                gradient.
        """
        if _seen_by_dynamo():
            return self._record(hidden_states, topk_ids, topk_weights, out, out_dtype, accumulate)
        try:
            call = self._prepare(hidden_states, topk_ids, topk_weights, out, out_dtype, accumulate)
        except TypeError:
            if not is_recorded(hidden_states, topk_ids, topk_weights):
                raise
            return self._record(hidden_states, topk_ids, topk_weights, out, out_dtype, accumulate)
        call.engine.run(*call.addresses)
        return call.output

    def submit(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        accumulate: bool = False,
        copy_inputs: bool = False,
    ) -> Future:
        """Starts a call on the runtime's driver thread, and returns at once.

        Arguments and errors are those of `__call__`, but the future reports an id that is out of
        range. The inputs must stay unchanged until the result is there. With `copy_inputs` they are
        copied before `submit` returns, so that the caller may change them, and `out` may overlap
        them. `expert_mask` is not copied: it is read when the driver thread begins the call.
        Whether gradients are enabled is decided here, not in `Future.result`.
        """
        boolean(copy_inputs, "copy_inputs")
        call = self._prepare(
            hidden_states, topk_ids, topk_weights, out, out_dtype, accumulate, copy_inputs
        )
        owned = (call, self._residency)  # which keeps the mask
        started = call.engine.submit(*call.addresses, owned=owned, copy_inputs=copy_inputs)
        return Future(started, call.output)

    @property
    def handle(self) -> torch.Tensor:
        """Names this layer for ``torch.ops.cpumoe.experts``, which compilers and tracers record.

        The handle, an int64 scalar, is valid in this process for as long as this object lives.
        """
        return self._handle.tensor

    def statistics(self) -> ExpertsStatistics:
        """Returns how much this layer has computed since it was packed.

        Calls that end meanwhile may be counted in some of the numbers only.
        """
        sums = self._layer.statistics()
        return ExpertsStatistics(
            calls=sums.calls,
            seconds=sums.seconds,
            expert_tokens=torch.tensor(sums.expert_tokens, dtype=torch.int64, device="cpu"),
            bytes_read=sums.bytes_read,
        )

    def __repr__(self) -> str:
        """Shows format, sizes, variant and a precision other than the default."""
        precision = "" if self.precision == PRECISIONS[0] else f", precision={self.precision}"
        return (
            f"Experts({self.format}, experts={self.num_experts}, hidden={self.hidden_size}, "
            f"intermediate={self.intermediate_size}, isa={self.isa}{precision})"
        )

    def _record(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        out: torch.Tensor | None,
        out_dtype: torch.dtype | None,
        accumulate: bool,
    ) -> torch.Tensor:
        return record_call(
            self._handle.tensor if _seen_by_dynamo() else self._handle.number,
            self._hidden_size,
            (hidden_states, topk_ids, topk_weights),
            Destination(out, out_dtype, accumulate),
        )

    def _prepare(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        accumulate: bool = False,
        copy_inputs: bool = False,
    ) -> Call:
        if self._residency.mask is not None:
            self._residency.refresh_mask(self._threads())
        destination = NEW_TENSOR
        # A Destination refuses an `accumulate` that is no bool.
        if out is not None or out_dtype is not None or accumulate is not False:
            destination = Destination(out, out_dtype, accumulate, copy_inputs)
        given = (hidden_states, topk_ids, topk_weights)
        runtime = (self._runtime or default_runtime()).core
        call = self._calls.repeat(given, destination, runtime)
        call = call or self._calls.prepare(given, destination, runtime)
        if out is not None and self._residency.mask is not None:
            refuse_overlap(out, self._residency.mask, "expert_mask")
        return call
