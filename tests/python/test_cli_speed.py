import pytest
import torch
from checkpoint_tools import SMALL, write_small

import cpumoe
from cpumoe.bandwidth import measure_read_bandwidth, measure_throughput
from cpumoe.layer_weights import LayerWeights


class Clock:
    """Every look at it takes a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def test_throughput_times_calls(tmp_path):
    with cpumoe.open_checkpoint(write_small(tmp_path, "v4-flash")) as reader:
        weights = LayerWeights.from_checkpoint(reader, 0)
    experts = weights.pack("generic", cpumoe.default_runtime())
    result = measure_throughput(experts, 1, 2, seconds=8, clock=Clock())
    assert result.seconds == 1
    assert result.calls >= 5
    assert result.weight_bytes == experts.nbytes * 2 // 3
    assert result.bytes_per_second == result.weight_bytes
    assert result.flops_per_second == 2 * 2 * 3 * SMALL["hidden"] * SMALL["intermediate"]
    assert measure_throughput(experts, 4, 2, seconds=0).weight_bytes == experts.nbytes
    with pytest.raises(ValueError, match=r"top_k: expected 1\.\.3, got 4"):
        measure_throughput(experts, 1, 4)
    with pytest.raises(ValueError, match="tokens"):
        measure_throughput(experts, 0, 1)


def test_read_bandwidth_takes_the_fastest_way():
    threads = torch.get_num_threads()
    result = measure_read_bandwidth(1, buffer_bytes=1 << 20, seconds=0, clock=Clock())
    assert result.bytes_per_second == result.methods[result.method] == result.buffer_bytes
    assert result.threads == 1
    assert torch.get_num_threads() == threads
