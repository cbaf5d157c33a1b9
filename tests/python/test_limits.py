"""The machine's limits are measured. Their values are not checked."""

import pytest

import cpumoe
from cpumoe import _core
from cpumoe.measure.limits import measure_dot_peak, measure_read_bandwidth


@pytest.fixture(scope="module")
def runtime():
    with cpumoe.Runtime(1) as runtime:
        yield runtime


def test_read_bandwidth(runtime):
    result = measure_read_bandwidth(runtime, buffer_bytes=(1 << 20) + 1, seconds=0)
    assert result.buffer_bytes == 2 << 20  # rounded up
    assert result.bytes_per_second > 0
    assert (result.isa, result.threads) == (cpumoe.supported_isas()[-1], 1)


@pytest.mark.parametrize("isa", cpumoe.supported_isas())
def test_dot_peak(runtime, isa):
    for fmt in cpumoe.WEIGHT_FORMATS:
        for name in ("bf16", "int8"):
            peak = measure_dot_peak(runtime, isa, fmt, name, seconds=0)
            assert peak is not None
            assert peak.macs_per_second > 0
            assert (peak.isa, peak.format, peak.precision, peak.threads) == (isa, fmt, name, 1)
    assert measure_dot_peak(runtime, isa, "mxfp4", "auto") is None


def test_work_is_shared_and_counted():
    with cpumoe.Runtime(1) as one:
        loop = "generic", "isa", "mxfp4", _core.Precision.BF16
        macs, seconds = _core.run_dots(one.core, *loop, 1, 10)
        more, _ = _core.run_dots(one.core, *loop, 3, 20)
    assert more == 6 * macs > 0
    assert seconds > 0


def test_refusals(runtime):
    with pytest.raises(ValueError, match="unknown ISA"):
        measure_dot_peak(runtime, "sse9", "mxfp4", "bf16")
    with pytest.raises(ValueError, match='unknown weight format "fp3"'):
        measure_dot_peak(runtime, "generic", "fp3", "bf16")
    with pytest.raises(ValueError, match="bytes: must be positive, got 0"):
        _core.MemoryBuffer(runtime.core, 0)
    closed = cpumoe.Runtime(1)
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        measure_read_bandwidth(closed, buffer_bytes=1)
