"""A GPU for tests: the stand-in for CUDA's driver library that the C++ tests build.

PyTorch without CUDA has no tensors on a GPU. Here they are CPU tensors whose memory is the
stand-in's, so whoever reads or writes them without the driver ends the process.
"""

from __future__ import annotations

import ctypes
import os

import torch
from typing_extensions import override

from cpumoe import _core
from cpumoe.integrations.sglang.streams import CpuStream

# `tests/run.sh` names the library.
LIBRARY = os.environ.get("CPUMOE_FAKE_CUDA", "")
_MEMORY = 256 << 20


class FakeGpu:
    """The stand-in's functions, for the calling thread."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.fake_cuda_violations.restype = ctypes.c_int64
        self._library.fake_cuda_first_violation.restype = ctypes.c_char_p
        self._library.fake_cuda_host_allocations.restype = ctypes.c_int64
        context = ctypes.c_void_p()
        self._check("cuInit", 0)
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._check("cuCtxSetCurrent", context)
        block = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(_MEMORY))
        self._free, self._end = block.value, block.value + _MEMORY

    def reset(self) -> None:
        """Forgets violations and failures, and delays operations by up to 20 microseconds."""
        self._library.fake_cuda_reset()
        self._library.fake_cuda_delay(ctypes.c_uint64(1), 20)

    def violation(self) -> str:
        """The first use of the driver that a real one forbids; empty: none."""
        return self._library.fake_cuda_first_violation().decode()

    def fail(self, function: str) -> None:
        """Makes the next call of a function fail for lack of memory."""
        self._library.fake_cuda_fail(function.encode(), 1, 2)

    def host_allocations(self) -> int:
        return self._library.fake_cuda_host_allocations()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor on the GPU, also during a capture. Its memory is never freed."""
        new = torch.empty(shape, dtype=dtype)
        if not new.numel():
            return new
        memory = (ctypes.c_uint8 * new.nbytes).from_address(self._free)
        self._free += -(-new.nbytes // 256) * 256
        assert self._free <= self._end
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def to(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.write(self.empty(tensor.shape, tensor.dtype), tensor)

    def write(self, target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        size = ctypes.c_size_t(values.nbytes)
        if values.numel():
            self._check("cuMemcpyHtoD_v2", _pointer(target), _pointer(values), size)
        return target

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        size = ctypes.c_size_t(values.nbytes)
        if values.numel():
            self._check("cuMemcpyDtoH_v2", _pointer(values), _pointer(tensor), size)
        return values

    def new_stream(self) -> int:
        stream = ctypes.c_void_p()
        self._check("cuStreamCreate", ctypes.byref(stream), 1)
        assert stream.value
        return stream.value

    def fill(self, tensor: torch.Tensor, byte: int, stream: int) -> None:
        """Overwrites a tensor in the stream's order."""
        size = ctypes.c_size_t(tensor.nbytes)
        self._check("cuMemsetD8Async", _pointer(tensor), byte, size, ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        self._check("cuStreamSynchronize", ctypes.c_void_p(stream))

    def begin_capture(self, stream: int) -> None:
        self._check("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), 0)

    def end_capture(self, stream: int) -> ctypes.c_void_p:
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        self._check("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        self._check("cuGraphDestroy", graph)
        return ready

    def replay(self, graph: ctypes.c_void_p, stream: int) -> None:
        self._check("cuGraphLaunch", graph, ctypes.c_void_p(stream))

    def _check(self, function: str, *arguments: object) -> None:
        result = getattr(self._library, function)(*arguments)
        assert result == 0, f"{function} failed: {result}"


class FakeGpuStream(CpuStream):
    """A stream of the stand-in, whose tensors look like the CPU's."""

    device = torch.device("cuda", 0)

    def __init__(self, gpu: FakeGpu, handle: int) -> None:
        super().__init__(handle)
        self._gpu = gpu

    @override
    def new_output(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        output = self._gpu.empty(x.shape, x.dtype)
        return output, output.data_ptr()

    @override
    def new_bridge(self, buffer_bytes: int, captured_bytes: int) -> _core.Bridge:
        return _core.Bridge(cuda=True, buffer_bytes=buffer_bytes, captured_bytes=captured_bytes)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
