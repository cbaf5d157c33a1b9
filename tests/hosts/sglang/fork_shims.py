"""What sglang-kt's wrapper of experts needs of a GPU, and how a machine without one stands in.

Importing this module changes PyTorch for the process. Nothing of sglang-kt itself is changed.
"""

from contextlib import nullcontext

import torch


class Stream:
    """A CUDA stream. Work on the CPU is done when its call returns, so all streams are in order."""

    cuda_stream = 0  # cpumoe's module takes it as "no stream of a GPU"

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass


class Event:
    """A CUDA event, which has always happened already."""

    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


# sglang-kt asks for it while it is imported, to choose kernels that this test does not use.
torch.cuda.get_device_capability = lambda device=None: (8, 0)
# The wrapper starts the CPU's experts on a stream of their own, and copies others to the GPU.
torch.cuda.Stream = Stream
torch.cuda.Event = Event
torch.cuda.stream = lambda stream: nullcontext()
torch.cuda.current_stream = lambda device=None: Stream()
# The wrapper waits for the GPU before the CPU's experts are loaded.
torch.cuda.synchronize = lambda device=None: None
# The wrapper tells CUDA's allocator which stream uses the result. PyTorch refuses that on the CPU.
torch.Tensor.record_stream = lambda tensor, stream: None
