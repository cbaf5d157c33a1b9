"""Checks every tensor before C++ gets its address.

C++ reads and writes at any address that it gets. A tensor may have no memory there (fake, meta,
functional or freed tensors), or less memory than its shape says. Its memory may not hold its values
(a lazy minus sign, a subclass with its own data), or a tracer may record it. This module refuses
all of these.

One rule for errors of tensors: TypeError for what kind of tensor it is (class, dtype, device,
layout, memory), ValueError for its shape, strides and values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor

_Tensor = torch.Tensor
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
_MODES = torch._C._TorchDispatchModeKey
_TRACERS = {
    _MODES.PROXY: "make_fx",
    _MODES.FAKE: "FakeTensorMode",
    _MODES.FUNCTIONAL: "functionalization",
}
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many are active
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state


def _empty_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


# Compiled code makes its tensors with this function. It calls no dispatcher, whose code and tables
# a decoding model has driven out of the caches.
_new_tensor: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = getattr(
    torch._C._dynamo.guards, "_empty_strided_cpu", _empty_strided
)


def address(tensor: torch.Tensor, name: str) -> int:
    """Returns the address of a tensor's first element, and checks that all of it is in memory.

    Args:
        tensor: a tensor of any shape, strides and dtype.
        name: the argument's name, for errors.

    Returns:
        The address; 0 for a tensor without elements, and for no other.

    Raises:
        TypeError: see `plain`. A view with a lazy minus sign is refused, too.
    """
    start = plain(tensor, name).data_ptr()
    if tensor.is_neg():
        raise TypeError(f"{name}: expected a tensor without lazy negation; pass .resolve_neg()")
    return start


def contiguous(
    tensor: torch.Tensor, name: str, rows: bool = False
) -> tuple[torch.Tensor, int, torch.Size]:
    """Returns a tensor, or a contiguous copy of it, with its address and its shape.

    Args:
        tensor: a tensor of any shape, strides and dtype.
        name: the argument's name, for errors.
        rows: whether it is enough that each row of a matrix is contiguous.

    Raises:
        TypeError: see `plain`.
    """
    # The usual case comes first: each call passes here, and a tensor's property takes 40 ns.
    if type(tensor) is _Tensor:
        try:
            start = tensor.data_ptr()
            if start and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
                offset = tensor.storage_offset()
                end = tensor.nbytes + (offset * tensor.itemsize if offset else 0)
                if tensor.untyped_storage().nbytes() >= end:
                    return tensor, start, tensor.shape
        except RuntimeError:  # the tensor has no storage, or no shape if it is nested
            pass
    tensor = plain(tensor, name)
    if not (rows and tensor.dim() == 2 and tensor.stride(1) == 1):
        tensor = tensor.contiguous()
    return tensor, tensor.data_ptr(), tensor.shape


def parameter_address(tensor: torch.Tensor) -> int:
    """Returns the address of a tensor that PyTorch's code may read as well.

    Parameters take a short way, because a decoding model's norms read one in each call.

    Args:
        tensor: a parameter, or another tensor.

    Returns:
        The address of the first element; 0 if the elements do not lie in memory one after the
        other, or if there are none.

    Raises:
        TypeError: see `plain`. Parameters raise none.
    """
    if type(tensor) is not torch.nn.Parameter:
        return contiguous(tensor, "tensor")[1] if tensor.is_contiguous() else 0
    try:
        start = tensor.data_ptr()
        if start and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
            end = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
            return start if tensor.untyped_storage().nbytes() >= end else 0
    except RuntimeError:  # the tensor has no storage
        pass
    return 0


def located(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
    """Returns a tensor whose memory holds its values, as `plain`, and its address.

    Tensors of four dimensions take a short way, because a decoding model calls attention for each
    of its layers.

    Args:
        tensor: a tensor of any shape, strides and dtype.
        name: the argument's name, for errors.

    Raises:
        TypeError: see `plain`.
    """
    if type(tensor) is _Tensor:
        try:
            start = tensor.data_ptr()
            if start and tensor.is_cpu and tensor.dim() == 4 and not tensor.is_neg():
                a, b, c, d = tensor.shape
                by_a, by_b, by_c, by_d = tensor.stride()
                last = (a - 1) * by_a + (b - 1) * by_b + (c - 1) * by_c + (d - 1) * by_d
                end = (tensor.storage_offset() + last + 1) * tensor.itemsize
                if tensor.untyped_storage().nbytes() >= end:
                    return tensor, start
        except RuntimeError:  # the tensor has no storage, or no shape if it is nested
            pass
    tensor = plain(tensor, name)
    return tensor, tensor.data_ptr()


def rows_view(tensor: torch.Tensor, start: int) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Returns a tensor whose rows are contiguous, with its address and its first three strides.

    Args:
        tensor: a tensor of four dimensions that `located` returned.
        start: its address.

    Returns:
        The tensor, or a copy of it, which must live as long as the address is used. The stride of a
        dimension of size 1 is 0, so that it is repeated as often as needed.
    """
    a, b, c, d = tensor.shape
    by_a, by_b, by_c, by_d = tensor.stride()
    if by_d != 1 and d != 1:
        tensor = tensor.contiguous()
        start = tensor.data_ptr()
        by_a, by_b, by_c, _ = tensor.stride()
    return tensor, (
        start,
        0 if a == 1 else by_a,
        0 if b == 1 else by_b,
        0 if c == 1 else by_c,
    )


def new_like(
    tensor: torch.Tensor, name: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, int]:
    """Returns a new contiguous tensor of a tensor's shape, and its address.

    Args:
        tensor: a tensor that `contiguous` returned.
        name: the name of `tensor`, for errors.
        dtype: the dtype of the new tensor; default: that of `tensor`.

    Raises:
        TypeError: a mode or tracer around the call makes new tensors without memory, or records
            operations.
    """
    if modes_are_active():
        refuse_tracing(name)
    new = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    try:
        start = new.data_ptr()
    except RuntimeError:
        start = 0
    return new, start or plain(new, name).data_ptr()


def plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Returns a dense CPU tensor whose memory holds its values.

    Args:
        tensor: a tensor of any shape, strides and dtype.
        name: the argument's name, for errors.

    Returns:
        The tensor itself; for a subclass, such as a parameter, a `torch.Tensor` that shares its
        memory; for a view with a lazy minus sign, a copy.

    Raises:
        TypeError: `tensor` is no tensor, is on another device, has another layout, or is of a class
            that manages its own data (as fake tensors do). It may also be without memory: zeros
            that have none, freed storage, a tensor that `torch.func` transforms.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    kind = type(tensor)
    if kind is not _Tensor:
        if kind.__torch_dispatch__ is not _NO_DISPATCH:
            raise TypeError(f"{name}: expected a torch.Tensor with memory, got {kind.__name__}")
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(_Tensor)
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "torch.nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: expected a dense tensor, got layout {layout}; pass .to_dense()")
    if not tensor.is_cpu:
        raise TypeError(
            f"{name}: expected a CPU tensor, got device {tensor.device}; move it with .cpu()"
        )
    missing = _missing(tensor)
    if missing:
        raise TypeError(f"{name}: expected a tensor with memory, got {describe(tensor)}, {missing}")
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the addresses of a tensor's first byte and of the byte behind its last.

    Args:
        tensor: a tensor of any shape and strides that `plain` returned.
    """
    start = tensor.data_ptr()
    return start, start + reach(tensor)


def reach(tensor: torch.Tensor) -> int:
    """Returns the bytes from a tensor's first to its last element; 0 if it has none."""
    if not tensor.numel():
        return 0
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


def start_in_memory(tensor: torch.Tensor, nbytes: int, itemsize: int) -> int:
    """Returns the address of a tensor that has memory, 0 for other tensors and other objects.

    Args:
        tensor: any object. Subclasses of tensors and nested tensors count as other objects.
        nbytes: the `reach` that the tensor should have.
        itemsize: the size that its elements should have, in bytes.
    """
    if type(tensor) is not _Tensor or tensor.is_nested:
        return 0
    try:
        start = tensor.data_ptr()
        end = tensor.storage_offset() * itemsize + nbytes
        return start if tensor.untyped_storage().nbytes() >= end else 0
    except RuntimeError:  # the tensor has no storage
        return 0


def new_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """Returns a new tensor and its address. No mode or tracer may be active."""
    new = _new_tensor(shape, strides, dtype)
    return new, new.data_ptr()


def modes_are_active() -> bool:
    """Whether a mode or a tracer around the call may see operations or change tensors."""
    return bool(dispatch_modes() or _function_modes() or _tracing_state() is not None)


def refuse_tracing(name: str) -> None:
    """Raises TypeError while a tracer records operations.

    A tracer does not see what C++ writes, and would record the memory's previous content.

    Args:
        name: what would be recorded, for the error.
    """
    tracer = _tracer()
    if tracer:
        raise TypeError(
            f"{name}: {tracer} cannot record cpumoe's layers, only operations of PyTorch; keep "
            "these layers out of the traced code"
        )


def is_recorded(*tensors: torch.Tensor) -> bool:
    """Whether somebody follows operations on these tensors instead of their values.

    That is a tracer around the call, or a mode whose tensors have no memory. Transforms of
    torch.func outside of a tracer do not count. FakeTensorMode takes no tensors with memory.

    Args:
        tensors: all tensor arguments of an operation.
    """
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return False
    without_values = all(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)
    return without_values or _tracer() not in ("", _TRACERS[_MODES.FAKE])


def _tracer() -> str:
    """Returns the name of the active tracer, if any. A mode that only observes is none."""
    if _tracing_state() is not None:
        return "torch.jit.trace"
    if dispatch_modes() or _function_modes():
        for mode, name in _TRACERS.items():
            if torch._C._get_dispatch_mode(mode) is not None:
                return name
        before_dispatch = torch._ops._get_dispatch_mode_pre_dispatch
        if before_dispatch(_MODES.PROXY) is not None:  # type: ignore[no-untyped-call]
            return _TRACERS[_MODES.PROXY]
    return ""


def _missing(tensor: torch.Tensor) -> str:
    """Returns why a dense CPU tensor is not wholly in memory; empty if it is."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "which torch.func (vmap, grad, jvp) is transforming"
    if torch._is_functional_tensor(tensor):
        return "which is being functionalized"
    if tensor._is_zerotensor():
        return "zeros that have none"
    extent = reach(tensor)
    end = tensor.storage_offset() * tensor.itemsize + extent if extent else 0
    available = tensor.untyped_storage().nbytes()
    if available < end:
        return f"whose storage was freed or cut: it has {available} of {end} bytes"
    return "whose storage has no address" if end and not tensor.data_ptr() else ""


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe(tensor: torch.Tensor) -> str:
    """Returns ``"float32 [4096, 64]"``, the way errors name a tensor."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
