"""The weights of a layer's experts: which are in memory, which are masked, and what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from cpumoe import _core
from cpumoe._base.renamed import old_attribute
from cpumoe._base.scalars import boolean, integer
from cpumoe._base.tensors import refuse_tracing
from cpumoe._engine.arguments import layer_scale_type
from cpumoe._engine.calls import Calls
from cpumoe._engine.config import checked_activation, layer_config
from cpumoe._engine.export import MatrixBuffer, copy_into, export_into, new_expert
from cpumoe._engine.packing import ExpertForm
from cpumoe._engine.residency import Residency
from cpumoe._engine.sources import Given, Source
from cpumoe.checkpoint import ExpertWeights
from cpumoe.numerics.glu import GLU
from cpumoe.options import ExpertsOptions
from cpumoe.packed_layer import PackedLayer
from cpumoe.placement import Placement, placement_of
from cpumoe.runtime import Runtime, check_runtime, default_runtime


class PackedExperts(PackedLayer):
    """The packed weights of a layer's experts. `cpumoe.Experts` adds loading and `__call__`."""

    _anew = "make them anew with from_checkpoint or from_tensors"

    def __init__(
        self,
        source: Source,
        *,
        format: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: GLU | None,
        has_bias: bool,
        expert_mask: torch.Tensor | None,
        pack_masked: bool,
        options: ExpertsOptions,
    ) -> None:
        """Packs the experts of `source`; `cpumoe.Experts` describes the arguments."""
        self._activation = checked_activation(activation)
        boolean(pack_masked, "pack_masked")
        config = layer_config(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            activation=self._activation,
            has_bias=has_bias,
            precision=options.precision,
            batch_invariant=options.batch_invariant,
            few_token_limit=options.few_token_limit,
            copy_of=source.copy_of,
        )
        origin = self._choose(format, options.isa, options.precision)
        self._runtime = options.runtime
        self._num_experts = num_experts
        self._hidden_size = hidden_size
        self._intermediate_size = intermediate_size
        dtypes = source.scale_dtypes() if self._format.scales_choose_kernels else ()
        self._layer = _core.Layer(
            isa=self._isa,
            origin=origin,
            format=self._format.name,
            config=config,
            scale_type=layer_scale_type(self._format, dtypes),
            runtime=self.runtime.core,
        )
        self._calls = Calls(self._layer, hidden_size=hidden_size, precision=options.precision)
        self._form = ExpertForm(
            self._format, hidden_size, intermediate_size, self._activation.gated
        )
        self._residency = Residency(self._layer, self._form, num_experts, source)
        self._residency.fill(source, expert_mask, pack_masked, self._threads())

    def export(self, expert_id: int) -> ExpertWeights:
        """Returns an expert's weights as its checkpoint stores them, bit for bit.

        Args:
            expert_id: the expert.

        Returns:
            Codes and scales as in a `QuantizedMatrix`; gate and up ``[intermediate,
            hidden]``, down ``[hidden, intermediate]``; biases in their original dtype, or None.
            Without a gate projection, gate is up.

        Raises:
            TypeError: `expert_id` is not an int.
            IndexError: there is no such expert.
            ValueError: the expert has no weights in memory; see `pack`.
        """
        expert_id = self._checked(expert_id)
        refuse_tracing("export")
        gate, up, down = new_expert(self._layer, self._form, expert_id)
        self.export_into(expert_id, gate=gate if self._form.gated else None, up=up, down=down)
        return ExpertWeights(gate, up, down, **self._residency.biases(expert_id))

    def export_into(
        self,
        expert_id: int,
        *,
        gate: MatrixBuffer | None = None,
        up: MatrixBuffer,
        down: MatrixBuffer,
        intermediate: slice | range | None = None,
        read_missing: bool = False,
    ) -> None:
        """Writes an expert's weights, or a shard of them, into the caller's tensors.

        Each buffer is a `QuantizedMatrix` or a tuple (codes, scales) of tensors on the CPU, for
        example in pinned memory. With nvfp4, a float32 tensor of one element for the factor is the
        third part. Rows may be any distance apart. An address has no size that could
        be checked, so addresses must be made tensors, for example with ``torch.frombuffer``.

        The dtype of the scales says what is written. One of the format's own dtypes gets the
        scales as stored. With mxfp4, bf16 gets the powers of two as numbers, which is exact. The
        least one, 2^-127, is subnormal in bf16, and hosts that flush subnormals read 0. With fp8
        and int4, a dtype that cannot hold the stored scales is refused.

        Args:
            expert_id: the expert.
            gate: codes ``[features, hidden/2]`` and scales ``[features, hidden/32]``, in the shapes
                and dtypes that `Experts.from_tensors` accepts. There may be more scales than the
                expert was packed from. None if experts have no gate projection.
            up: like `gate`.
            down: codes ``[hidden, features/2]`` and scales ``[hidden, features/32]``.
            intermediate: the intermediate features to write: rows of gate and up, columns of down.
                They must be whole groups of 32, and of the weights that share a scale of down. A
                last group of the expert may be smaller.
                With fp8 in blocks, they must begin with a block. Default: all.
            read_missing: whether to read an expert that has no weights in memory from the
                checkpoint that the layer was made from, instead of raising ValueError. That is
                slower.

        Raises:
            TypeError: `expert_id` is not an int, or a buffer has another dtype, device or layout.
            FileNotFoundError, CheckpointError: with `read_missing`, see `pack`.
            IndexError: there is no such expert.
            ValueError: a buffer has another shape, its rows are not contiguous, buffers overlap,
                the features are no whole groups, or the expert has no weights in memory; see
                `pack`.
        """
        expert_id = self._checked(expert_id)
        buffers = {"gate": gate, "up": up, "down": down}
        core, _ = self._threads()
        if not boolean(read_missing, "read_missing"):
            export_into(self._layer, self._form, expert_id, buffers, intermediate, core)
            return
        # A change of the mask in another thread must not evict or pack the expert meanwhile.
        with self._residency.missing(expert_id) as weights:
            if weights is None:
                export_into(self._layer, self._form, expert_id, buffers, intermediate, core)
            else:
                copy_into(weights, self._form, expert_id, buffers, intermediate)

    def _submit_export(
        self, expert_id: int, shards: Sequence[tuple[list[_core.Matrix], int]]
    ) -> _core.SubmittedCall:
        """Lets the runtime write shards of an expert: the matrices of each, and its first feature.

        For integrations whose host names memory by addresses and answers for it. Waiting for the
        result raises ValueError if the expert has no weights in memory.
        """
        core, _ = self._threads()
        return self._layer.submit_unpack(
            runtime=core, expert=self._checked(expert_id), shards=shards, owned=None
        )

    def pack(
        self,
        experts: Iterable[int] | None = None,
        source: Callable[[int], ExpertWeights] | None = None,
    ) -> None:
        """Takes memory again for experts that were evicted or not packed yet.

        Calls continue meanwhile. They wait while a few experts at a time are packed. If an error
        occurs, the experts that have weights and the mask are as before.

        Args:
            experts: the ids of the experts. Those that have weights stay as they are. Default: all
                that are not masked.
            source: returns the weights of the layer's expert of an id. It may make calls, but must
                not pack, mask or evict experts of this layer. Default: the checkpoint that the
                layer was made from, which is opened again if it was closed.

        Raises:
            FileNotFoundError: the checkpoint is gone.
            CheckpointError: the checkpoint has changed or is damaged (a ValueError).
            IndexError: there is no such expert.
            TypeError: `experts` are no ints, `source` is no function, or it returns something else.
            ValueError: there is no source, or its weights do not fit the layer.
            RuntimeError: the runtime is closed, the layer belongs to the parent of a forked
                process, or `source` changes the layer.
        """
        given = None if source is None else Given(source)
        if experts is not None and not isinstance(experts, Iterable):
            raise TypeError(f"experts: expected the ids of experts, got {experts!r}; pass a list")
        self._residency.pack(experts, given, self._threads())

    def evict(self) -> None:
        """Gives the memory of masked experts back to the system.

        `expert_mask` says which experts are masked. A copy that several experts share
        (`from_checkpoint`) is kept until all of them are masked. Evicted experts must be packed
        before calls may need them. Setting `expert_mask` does that; after a change in place, call
        `pack`.

        Raises:
            OSError: the system keeps an expert's memory, for example because it is locked. That
                expert has no weights any more, and experts with greater ids are as before.
            RuntimeError: the layer belongs to the parent of a forked process.
        """
        self._residency.evict()

    @property
    def core(self) -> _core.Layer:
        """The engine's layer, for cpumoe's own integrations."""
        return self._layer

    @property
    def activation(self) -> GLU:
        """The activation of the experts, a `GLU`."""
        return self._activation

    compute = old_attribute("Experts", "compute", "precision")
    swiglu = old_attribute("Experts", "swiglu", "activation")

    @property
    def num_experts(self) -> int:
        """Number of experts of the layer."""
        return self._num_experts

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self._hidden_size

    @property
    def intermediate_size(self) -> int:
        """Inner width of one expert."""
        return self._intermediate_size

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights in memory, without experts that were evicted."""
        return self._layer.packed_bytes()

    @property
    def placement(self) -> Placement:
        """The NUMA nodes in whose memory the weights lie, those of the runtime that packed them."""
        return placement_of(self._layer)

    @property
    def packed_experts(self) -> list[int]:
        """The ids of the experts that have weights in memory, ascending."""
        return self._residency.packed()

    @property
    def runtime(self) -> Runtime:
        """The runtime of calls. Assign another one to change it, None for the shared one."""
        return self._runtime or default_runtime()

    @runtime.setter
    def runtime(self, runtime: Runtime | None) -> None:
        check_runtime(runtime)
        self._runtime = runtime
        self._calls.forget()

    @property
    def expert_mask(self) -> torch.Tensor | None:
        """Bool ``[experts]`` on the CPU. True: the expert is skipped, for example if a GPU has it.

        The tensor is not copied. The next call sees changes that are made in place. Setting another
        mask first packs the experts that it needs, as `pack` does. A call that runs at the same
        time uses either the old mask or the new one. If the setting fails, the old mask stays.
        """
        return self._residency.mask

    @expert_mask.setter
    def expert_mask(self, mask: torch.Tensor | None) -> None:
        self._residency.set_mask(mask, self._threads())

    def _checked(self, expert_id: int) -> int:
        expert_id = integer(expert_id, "expert_id")
        if not 0 <= expert_id < self.num_experts:
            raise IndexError(f"expert_id: expected 0..{self.num_experts - 1}, got {expert_id}")
        return expert_id

    def _threads(self) -> tuple[_core.Runtime, int]:
        runtime = self.runtime
        return runtime.core, runtime.threads
