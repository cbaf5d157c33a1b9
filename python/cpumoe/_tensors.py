"""The gate that every tensor passes before C++ is told its address.

C++ reads and writes where it is told to. A tensor may have no memory there (fake, meta, functional
or freed), less memory than its shape says, or values that its memory does not hold (a lazy minus
sign, a class of its own). A result may be one that a tracer records. None of them gets through.

One rule for errors of tensors: TypeError for what kind of tensor it is (class, dtype, device,
layout, memory), ValueError for its shape, strides and values.
"""

from __future__ import annotations

import torch

_Tensor = torch.Tensor
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
_MODES = torch._C._TorchDispatchModeKey
_TRACERS = {
    _MODES.PROXY: "make_fx",
    _MODES.FAKE: "FakeTensorMode",
    _MODES.FUNCTIONAL: "functionalization",
}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state


def address(tensor: torch.Tensor, name: str) -> int:
    """Returns the address of a tensor's first element, having seen that all of it is in memory.

    Args:
        tensor: of any shape, strides and dtype.
        name: the argument's name, for errors.

    Returns:
        The address; 0 for a tensor without elements, and for no other.

    Raises:
        TypeError: see `plain`; also a view with a lazy minus sign.
    """
    start = plain(tensor, name).data_ptr()
    if tensor.is_neg():
        raise TypeError(f"{name}: expected values as memory holds them; pass .resolve_neg()")
    return start


def contiguous(
    tensor: torch.Tensor, name: str, rows: bool = False
) -> tuple[torch.Tensor, int, torch.Size]:
    """Returns a tensor, or a contiguous copy, its address as `address` does, and its shape.

    Args:
        tensor: of any shape, strides and dtype.
        name: the argument's name, for errors.
        rows: whether a matrix may also be one whose rows alone are contiguous.

    Raises:
        TypeError: see `plain`.
    """
    # On the way of each call, where a property of a tensor takes 40 ns: first what is usual.
    if type(tensor) is _Tensor:
        try:
            start = tensor.data_ptr()
            if start and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg():
                offset = tensor.storage_offset()
                end = tensor.nbytes + (offset * tensor.itemsize if offset else 0)
                if tensor.untyped_storage().nbytes() >= end:
                    return tensor, start, tensor.shape
        except RuntimeError:  # it has no storage, or (a nested tensor) no shape
            pass
    tensor = plain(tensor, name)
    if not (rows and tensor.dim() == 2 and tensor.stride(1) == 1):
        tensor = tensor.contiguous()
    return tensor, tensor.data_ptr(), tensor.shape


def new_like(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
    """Returns a new contiguous tensor of a tensor's shape and dtype, and its address.

    Args:
        tensor: a tensor that `contiguous` returned.
        name: what the new tensor depends on, for errors.

    Raises:
        TypeError: what surrounds the call makes tensors without memory, or records them.
    """
    if _dispatch_modes() or _function_modes() or _tracing_state() is not None:
        refuse_tracing(name)
    new = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    try:
        start = new.data_ptr()
    except RuntimeError:
        start = 0
    return new, start or plain(new, name).data_ptr()


def plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Returns a dense CPU tensor whose values are those that its memory holds.

    Args:
        tensor: of any shape, strides and dtype.
        name: the argument's name, for errors.

    Returns:
        The tensor itself. For a subclass (a parameter, say): a `torch.Tensor` that shares its
        memory. For a view with a lazy minus sign: a copy.

    Raises:
        TypeError: no tensor, or one of another device or layout, of a class that decides itself
            what its data are (fake tensors are of one), or without memory: zeros that have none,
            storage that was freed, what `torch.func` transforms.
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


def refuse_tracing(name: str) -> None:
    """Raises TypeError while a tracer records operations: it would take what memory held before.

    Args:
        name: what would be recorded, for the error.
    """
    tracer = _tracer()
    if tracer:
        raise TypeError(
            f"{name}: expected values, but {tracer} is at work, which sees operations of PyTorch "
            f"only; keep cpumoe's experts out of what it traces"
        )


def _tracer() -> str:
    """Who records operations now; a mode that looks on (a default device, a counter) does not."""
    if _tracing_state() is not None:
        return "torch.jit.trace"
    if _dispatch_modes() or _function_modes():
        for mode, name in _TRACERS.items():
            if torch._C._get_dispatch_mode(mode) is not None:
                return name
        before_dispatch = torch._ops._get_dispatch_mode_pre_dispatch
        if before_dispatch(_MODES.PROXY) is not None:  # type: ignore[no-untyped-call]
            return _TRACERS[_MODES.PROXY]
    return ""


def _missing(tensor: torch.Tensor) -> str:
    """Why a dense CPU tensor is not in memory as a whole; empty where it is."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "which torch.func (vmap, grad, jvp) is transforming"
    if torch._is_functional_tensor(tensor):
        return "which is being functionalized"
    if tensor._is_zerotensor():
        return "zeros without any"
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + reach + 1) * tensor.itemsize if tensor.numel() else 0
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
