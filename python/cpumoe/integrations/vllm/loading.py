"""Makes `Experts` of the tensors of a layer that vLLM's loader fills, when they are complete."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any

import torch

from cpumoe.experts import Experts
from cpumoe.experts_builder import ExpertsBuilder
from cpumoe.integrations.vllm.stored import StoredForm, StoredTensor
from cpumoe.numerics.glu import GLU
from cpumoe.options import ExpertsOptions

_PROJECTIONS = ("gate", "up", "down")


class ArrivingExperts:
    """The tensors of one layer's experts in this process.

    vLLM creates the tensors of all layers before it loads the first one. They take memory only when
    they are written. As soon as a layer is complete, this object packs one expert after the other,
    and gives the memory of each back. No more experts than threads are in memory twice.

    Attributes:
        parameters: the tensors, by vLLM's names.
        experts: the packed experts; None: the layer is not complete yet.
    """

    def __init__(
        self,
        form: StoredForm,
        *,
        name: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: GLU,
        has_bias: bool,
        model_dtype: torch.dtype,
        options: Callable[[], ExpertsOptions],
    ) -> None:
        """Makes the tensors.

        Args:
            form: how the experts are stored.
            name: the layer's name, for errors.
            num_experts: experts in this process.
            hidden_size: width of the hidden states.
            intermediate_size: inner width of an expert in this process.
            activation: the activation.
            has_bias: whether there are biases.
            model_dtype: the dtype of hidden states, and of biases unless the checkpoint's is
                another one.
            options: returns how the experts are computed. It is called when they are packed.
        """
        self.experts: Experts | None = None
        self._form = form
        self._name = name
        self._sizes = (num_experts, hidden_size, intermediate_size)
        self._activation = activation
        self._has_bias = has_bias
        self._model_dtype = model_dtype
        self._options = options
        self._kinds: dict[str, StoredTensor] = {}
        self._arrived: dict[str, set[tuple[int, str]]] = {}
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self._memory: dict[str, mmap.mmap] = {}
        for tensor in form.tensors:
            self._make(tensor, 2 if tensor.name == "weight_shape" else 1)
        if has_bias:
            self._make(StoredTensor("bias", "bias", model_dtype, adopts=True), 1)

    def _make(self, tensor: StoredTensor, per_matrix: int) -> None:
        experts, hidden, intermediate = self._sizes
        for stack, matrices, n, k in (
            ("w13", 2, intermediate, hidden),
            ("w2", 1, hidden, intermediate),
        ):
            shape = tensor.shape(experts, max(matrices, per_matrix), n, k)
            if tensor.part == "bias":
                shape = shape[:2]
            name = f"{stack}_{tensor.name}"
            self._kinds[name] = tensor
            data = self._filled(name, shape, tensor.dtype)
            self.parameters[name] = torch.nn.Parameter(data, requires_grad=False)
            if tensor.part:
                self._arrived[name] = set()

    def loading(self, name: str) -> str:
        """Returns vLLM's word for how a rank's shard of a tensor is cut out, or ""."""
        tensor = self._kinds[name]
        return tensor.loading

    def loader(self, name: str, original: Callable[..., Any], local: Callable[[int], int]) -> Any:
        """Returns the function that loads a tensor: vLLM's own, and what follows.

        Args:
            name: the tensor's name.
            original: vLLM's function.
            local: returns an expert's index in this process from that in the model.
        """
        tensor = self._kinds[name]
        if not tensor.part:
            return original

        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str = name,
            shard_id: str | None = None,
            expert_id: int | None = None,
            return_success: bool = False,
        ) -> bool | None:
            index = -1 if expert_id is None else local(expert_id)
            if expert_id is not None and index < 0:  # another rank has it
                return False if return_success else None
            if self.experts is not None:
                raise RuntimeError(
                    f"{self._name}.{name}: expected one load, because packed experts cannot be "
                    f"loaded again; restart vLLM, or set CPUMOE_VLLM=0"
                )
            if loaded_weight.dtype == torch.float8_e8m0fnu and param.dtype == torch.uint8:
                loaded_weight = loaded_weight.view(torch.uint8)  # a copy would convert the numbers
            if tensor.adopts:
                self._adopt(name, param, loaded_weight.dtype)
            if tensor.exact and tensor.dtype != self._model_dtype:
                self._check_exact(name, loaded_weight, tensor.dtype)
            done = original(
                param,
                loaded_weight,
                weight_name,
                shard_id=shard_id,
                expert_id=expert_id,
                return_success=return_success,
            )
            self._arrived[name].add((index, shard_id or ""))
            if self._complete():
                self._pack()
            return done  # type: ignore[no-any-return]

        return load

    def finish(self) -> Experts:
        """Returns the packed experts, after vLLM has loaded all it has.

        A layer into which nothing was loaded is packed as it is: vLLM makes up its weights.

        Raises:
            ValueError: a part of the layer was not loaded.
        """
        if self.experts is None:
            missing = [name for name in self._arrived if not self._has_all(name)]
            if missing and any(self._arrived.values()):
                raise ValueError(
                    f"{self._name}: expected all experts in the checkpoint, got a part of "
                    f"{', '.join(missing)}; the checkpoint is incomplete"
                )
            self._pack()
        assert self.experts is not None
        return self.experts

    def _adopt(self, name: str, param: torch.nn.Parameter, dtype: torch.dtype) -> None:
        """Gives an empty tensor the checkpoint's dtype, so that nothing is rounded."""
        if dtype == param.dtype or not dtype.is_floating_point:
            return
        if self._arrived[name]:
            raise ValueError(
                f"{self._name}.{name}: expected one dtype, got {param.dtype} and {dtype}"
            )
        param.data = self._filled(name, tuple(param.shape), dtype)

    def _filled(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns a tensor of one value. Zeros take no memory before something else is written."""
        count = math.prod(shape)
        # Pages of shared memory, Python's default, could not be given back.
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory[name] = memory
        tensor = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
        fill = self._kinds[name].fill
        return tensor.fill_(fill) if fill else tensor

    def _give_back(self, experts: int) -> None:
        """Gives the memory of the first experts back, as far as it is whole pages."""
        for memory in self._memory.values():
            size = len(memory) * experts // self._sizes[0]
            memory.madvise(mmap.MADV_DONTNEED, 0, size // mmap.PAGESIZE * mmap.PAGESIZE)

    def _check_exact(self, name: str, weights: torch.Tensor, dtype: torch.dtype) -> None:
        """Refuses to round weights of a model that is computed in more digits."""
        if weights.dtype != dtype and not torch.equal(
            weights.to(dtype).to(torch.float32), weights.to(torch.float32)
        ):
            named = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{self._name}.{name}: expected weights that are {named} numbers, as the "
                f"checkpoint's config says, got others; pass --dtype {named} to vLLM, which "
                f"rounds them, or set CPUMOE_VLLM=0"
            )

    def _has_all(self, name: str) -> bool:
        arrived = self._arrived[name]
        if (-1, "") in arrived:
            return True
        experts = {index for index, _ in arrived}
        if len(experts) < self._sizes[0]:
            return False
        halves = {"w1", "w3"} if name.startswith("w13_") else {"w2"}
        whole = {shard for _, shard in arrived} - halves
        return bool(whole) or len(arrived) == len(experts) * len(halves)

    def _complete(self) -> bool:
        return all(map(self._has_all, self._arrived))

    def _pack(self) -> None:
        count, hidden, intermediate = self._sizes
        builder = ExpertsBuilder(
            format=self._form.format,
            num_experts=count,
            hidden_size=hidden,
            intermediate_size=intermediate,
            activation=self._activation,
            has_bias=self._has_bias,
            options=self._options(),
        )
        tensors = {name: parameter.data for name, parameter in self.parameters.items()}
        for expert in range(count):
            for projection in _PROJECTIONS:
                matrix = self._form.matrix(tensors, expert, projection)
                bias = self._form.bias(tensors, expert, projection) if self._has_bias else None
                builder.add(expert, projection, matrix, bias=bias)
            self._give_back(expert + 1 - builder.waiting)
        self.experts = builder.build()
        tensors.clear()
        self._memory.clear()
        for name in self._arrived:
            parameter = self.parameters[name]
            parameter.data = torch.empty(0, dtype=parameter.dtype, device="cpu")
