"""Calls on streams, as Python makes them. There is no driver here: the tensors are the CPU's."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moe_tools import inputs, layer, output_of, refused

from cpumoe import Runtime, _core

WEIGHTS = layer("mxfp4")
DTYPES = {
    torch.bfloat16: _core.DType.BF16,
    torch.float16: _core.DType.FP16,
    torch.float32: _core.DType.FP32,
}


@pytest.fixture(scope="module")
def experts():
    with Runtime(2) as runtime:
        yield WEIGHTS.pack(runtime=runtime)


def make_call(experts, dtype=torch.bfloat16, *, tokens=5, **options):
    fixed = {
        "input_dtype": DTYPES[dtype],
        "output_dtype": DTYPES[dtype],
        "top_k": 2,
        "ids_are_64_bit": True,
    }
    size = _core.stream_buffer_bytes(hidden_size=WEIGHTS.hidden, tokens=tokens, **fixed)
    bridge = _core.Bridge(cuda=False, buffer_bytes=size, captured_bytes=size)
    engine = {"runtime": experts.runtime.core, "layer": experts._layer}
    return _core.StreamCall(bridge=bridge, **engine, **fixed, **options)


def submit(call, batch, output, stream=0):
    x, ids, weights = batch
    addresses = (ids.data_ptr(), weights.data_ptr(), output.data_ptr())
    call.submit(stream, x.data_ptr(), x.stride(0), len(x), *addresses)


def output_of_call(call, batch, stream=0):
    output = torch.full_like(batch.hidden_states, float("nan"))
    submit(call, batch, output, stream)
    call.sync(stream)
    return output


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_gives_the_bits_of_a_call_without_a_stream(experts, dtype):
    call = make_call(experts, dtype)
    for stream, tokens in ((0, 5), (7, 1), (0, 0)):
        batch = inputs(WEIGHTS, tokens, dtype=dtype)
        assert torch.equal(output_of_call(call, batch, stream), experts(*batch))


def test_inputs_may_change_after_submit(experts):
    batch = inputs(WEIGHTS, 5)
    expected = experts(*batch)
    output = torch.empty_like(batch.hidden_states)
    call = make_call(experts)
    submit(call, batch, output)
    for tensor in batch:
        tensor.fill_(99)
    call.sync(0)
    assert torch.equal(output, expected)


def test_a_job_that_fails_gives_nan_and_its_error(experts):
    call = make_call(experts)
    batch = inputs(WEIGHTS, 5)
    good = batch.topk_ids.clone()
    batch.topk_ids[1, 0] = 77
    output = torch.zeros_like(batch.hidden_states)
    submit(call, batch, output)
    message = r"^a call of 5 tokens has failed, and its output is NaN: topk_ids\[1, 0\]: .* got 77$"
    with pytest.raises(RuntimeError, match=message):
        call.sync(0)
    assert output.isnan().all()
    call.raise_error()
    batch.topk_ids.copy_(good)
    assert torch.equal(output_of_call(call, batch), experts(*batch))


def test_unknown_ids_can_be_skipped(experts):
    call = make_call(experts, skip_unknown_ids=True)
    batch = inputs(WEIGHTS, 5)
    batch.topk_ids[1, 0] = -1
    expected = experts(*batch)
    batch.topk_ids[1, 0] = 77
    assert torch.equal(output_of_call(call, batch), expected)


def test_the_mask_may_change_and_lives_as_long_as_the_call(experts):
    mask = torch.zeros(WEIGHTS.num_experts, dtype=torch.bool)
    call = make_call(experts, mask=mask.data_ptr(), mask_owner=mask)
    batch = inputs(WEIGHTS, 5)
    assert torch.equal(output_of_call(call, batch), experts(*batch))
    mask.fill_(True)
    assert not output_of_call(call, batch).any()
    owner = weakref.ref(mask)
    del mask
    gc.collect()
    assert owner() is not None
    del call
    gc.collect()
    assert owner() is None


def test_threads_may_use_streams_of_their_own(experts):
    call = make_call(experts)
    batches = [inputs(WEIGHTS, 5, seed=seed) for seed in range(20)]

    def make_calls(stream):
        return [output_of_call(call, batch, stream) for batch in batches]

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(make_calls, range(3)))
    expected = [experts(*batch) for batch in batches]
    for outputs in results:
        assert all(map(torch.equal, outputs, expected))


def test_wrong_uses_are_refused(experts):
    call = make_call(experts)
    batch = inputs(WEIGHTS, 5)
    output = torch.empty_like(batch.hidden_states)
    message = "sync: this layer has no call on this stream, or two layers were called after it; "
    with refused(RuntimeError, message + "call submit first, on the same stream"):
        call.sync(0)
    with refused(ValueError, "output: expected an address, got a null pointer"):
        call.submit(0, 64, WEIGHTS.hidden, 1, 64, 64, 0)
    with refused(ValueError, "deferred_experts: expected 0 to top_k (2), got 3"):
        make_call(experts, deferred_experts=3)
    submit(call, batch, output)
    del call  # nobody fetches the output


NO_DRIVER = """
from cpumoe import _core
try:
    _core.Bridge(cuda=True, buffer_bytes=1, captured_bytes=1)
except RuntimeError as error:
    print(error, end="")
"""


# In a process of its own, because other tests load a stand-in for the driver.
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch may have loaded CUDA")
def test_cuda_must_be_in_use():
    assert output_of(NO_DRIVER) == (
        "CUDA: this process has not loaded libcuda.so.1; use the GPU first, e.g. with "
        "torch.cuda.init(), or pass CPU tensors"
    )
