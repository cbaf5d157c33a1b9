"""Which experts the GPU has: masks, in the forms in which SGLang and its fork state them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex
from weakref import WeakMethod

import torch
from typing_extensions import override

from cpumoe._base.tensors import describe
from cpumoe.integrations.sglang.checks import integer_in


def generate_gpu_experts_masks(activation_freq: torch.Tensor, num_gpu_experts: int) -> torch.Tensor:
    """Places the most frequent experts of all layers on the GPU.

    Args:
        activation_freq: how often each expert is used, ``[layers, experts]``.
        num_gpu_experts: the number of experts for the GPU, of all layers together. A number outside
            the possible range means none or all.

    Returns:
        Bool ``[layers, experts]`` on the CPU; True: the GPU has the expert. Among equally frequent
        experts, those that come first are taken.

    Raises:
        ValueError: `activation_freq` has another number of dimensions.
    """
    if activation_freq.dim() != 2:
        raise ValueError(
            f"activation_freq: expected [layers, experts], got {list(activation_freq.shape)}"
        )
    count = min(max(int(num_gpu_experts), 0), activation_freq.numel())
    order = activation_freq.cpu().flatten().argsort(descending=True, stable=True)
    masks = torch.zeros(activation_freq.numel(), dtype=torch.bool, device="cpu")
    masks[order[:count]] = True
    return masks.view(activation_freq.shape)


# Masks are changed in place outside the host's inference mode, which forbids that for tensors that
# were made in it.
@torch.inference_mode(False)
def gpu_mask(mask: object, num_gpu_experts: object, num_experts: int) -> torch.Tensor:
    """Returns a new bool ``[num_experts]`` on the CPU; True: the GPU has the expert.

    Args:
        mask: the experts of the GPU, as sglang-kt states them.
        num_gpu_experts: the GPU has the first ones, as SGLang states them. None means 0.
        num_experts: number of experts of the layer.

    Raises:
        TypeError, ValueError: a value is wrong, or the two contradict each other.
    """
    count = 0 if num_gpu_experts is None else num_gpu_experts
    count = integer_in(count, "num_gpu_experts", 0, num_experts)
    if mask is None:
        return torch.arange(num_experts, device="cpu") < count
    own = checked_mask(mask, num_experts)
    if count not in (0, int(own.sum())):
        raise ValueError(
            f"gpu_experts_mask has {int(own.sum())} experts, but num_gpu_experts is {count}; pass "
            "one of the two"
        )
    return own


@torch.inference_mode(False)
def checked_mask(mask: object, num_experts: int) -> torch.Tensor:
    """Returns a copy on the CPU of a mask of any device.

    Raises:
        TypeError, ValueError: `mask` is no bool or integer tensor ``[num_experts]``.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype.is_floating_point or mask.is_complex():
        got = describe(mask) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"gpu_experts_mask: expected a bool tensor [{num_experts}], got {got}")
    if tuple(mask.shape) != (num_experts,):
        raise ValueError(f"gpu_experts_mask: expected [{num_experts}], got {list(mask.shape)}")
    return mask.detach().to("cpu", torch.bool, copy=True).contiguous()


class HostsMask(torch.Tensor):
    """A mask as the host sees it: every function of PyTorch that gets it may have changed it.

    A CUDA graph that the host runs after a change makes no call of Python. So what the change asks
    for must happen during the change.
    """

    _changed: WeakMethod[Callable[[], None]]

    @classmethod
    def over(cls, mask: torch.Tensor, changed: Callable[[], None]) -> HostsMask:
        """Returns a tensor that shares the memory of `mask`.

        Args:
            mask: any tensor.
            changed: a method that is called after each function that gets the tensor.
        """
        with torch._C.DisableTorchFunctionSubclass():
            hosts = mask.as_subclass(cls)
        hosts._changed = WeakMethod(changed)
        return hosts

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls a function of PyTorch. Its results are ordinary tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        for given in (*args, *(kwargs or {}).values()):
            changed = given._changed() if isinstance(given, cls) else None
            if changed is not None:
                changed()
        return result

    @override
    def __deepcopy__(self, memo: object) -> torch.Tensor:
        """Returns an ordinary tensor."""
        return self.clone()

    @override
    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickles an ordinary tensor."""
        own: Any = self.detach()
        return own.__reduce_ex__(protocol)
