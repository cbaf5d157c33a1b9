"""Layers of SGLang on streams of CUDA, which a stand-in runs: results, graphs, masks, errors."""

import gc
from pathlib import Path

import pytest
import torch
from fake_gpu import LIBRARY, FakeGpu, FakeGpuStream
from moe_tools import Inputs, output_of, output_with_torch, refused
from sglang_tools import EXPERTS, batch, checkpoint, gpu, loaded, run

from cpumoe.integrations.sglang import wrapper as module

pytestmark = pytest.mark.skipif(
    not LIBRARY or torch.version.cuda is not None,  # PyTorch for CUDA would use the stand-in
    reason="CPUMOE_FAKE_CUDA does not name the stand-in, or PyTorch has loaded CUDA",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("v4"), layers=4)


@pytest.fixture(scope="module")
def shared_device():
    return FakeGpu()


@pytest.fixture
def device(shared_device, monkeypatch):
    streams = {}

    def stream_of(x, handle):
        return streams.setdefault(handle, FakeGpuStream(shared_device, handle))

    shared_device.reset()
    monkeypatch.setattr(module, "stream_of", stream_of)
    yield shared_device
    streams.clear()
    assert shared_device.violation() == ""


@pytest.fixture
def stream(device):
    return device.new_stream()


def on(device, args):
    return Inputs(*(device.to(tensor) for tensor in args))


def call(wrapper, args, stream):
    wrapper.submit_forward(*args, stream)
    return wrapper.sync_forward(args.hidden_states, stream)


def result(device, wrapper, args, stream):
    output = call(wrapper, on(device, args), stream)
    device.synchronize(stream)
    return device.read(output)


def on_the_cpu(folder, args, **options):
    """What the same call gives without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "stream_of", ON_THE_CPU)
        return run(loaded(folder, **options), args)


ON_THE_CPU = module.stream_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_results_are_those_of_the_cpu(folder, device, stream, dtype, ids):
    wrapper = loaded(folder, num_gpu_experts=2, chunked_prefill_size=40)
    for tokens in (0, 1, 7, 40, 130):  # 130 are computed in several parts
        x, topk_ids, weights = batch(tokens, dtype=dtype, seed=tokens)
        args = Inputs(x, topk_ids.to(ids), weights)
        expected = on_the_cpu(folder, args, num_gpu_experts=2, chunked_prefill_size=40)
        actual = result(device, wrapper, args, stream)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


def test_inputs_may_be_overwritten_in_the_streams_order(folder, device, stream):
    wrapper = loaded(folder)
    args = batch(9)
    own = on(device, args)
    wrapper.submit_forward(*own, stream)
    for tensor in own:
        device.fill(tensor, 0xFF, stream)
    output = wrapper.sync_forward(own.hidden_states, stream)
    device.synchronize(stream)
    assert torch.equal(device.read(output), on_the_cpu(folder, args))


def passes(wrappers, args, stream):
    return [call(wrapper, args, stream) for wrapper in wrappers]


def layers(folder, **options):
    return [loaded(folder, layer_idx=index, **options) for index in range(4)]


@pytest.mark.parametrize("deferred", [0, 2])
def test_graphs_compute_with_the_inputs_of_their_time(folder, device, stream, deferred):
    wrappers = layers(folder, max_deferred_experts_per_token=deferred)
    own = on(device, batch(5))
    passes(wrappers, own, stream)  # allocates what the stream needs
    allocations = device.host_allocations()
    device.begin_capture(stream)
    outputs = passes(wrappers, own, stream)
    graph = device.end_capture(stream)
    other = device.new_stream()
    for seed in range(6):
        args = batch(5, seed=seed)
        device.synchronize(other)
        for target, values in zip(own, args, strict=True):
            device.write(target, values)
        device.replay(graph, other)
        device.synchronize(other)
        replayed = [device.read(output) for output in outputs]
        eager = passes(wrappers, on(device, args), stream)
        device.synchronize(stream)
        assert all(torch.equal(a, device.read(b)) for a, b in zip(replayed, eager, strict=True))
    assert device.host_allocations() == allocations


def test_layers_with_streams_of_their_own_hand_on_what_they_defer(folder, device):
    wrappers = layers(folder, max_deferred_experts_per_token=2)
    args = batch(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "stream_of", ON_THE_CPU)
        expected = passes(wrappers, args, None)
    for wrapper, output in zip(wrappers, expected, strict=True):
        stream = device.new_stream()  # sglang-kt orders its streams by events
        assert torch.equal(result(device, wrapper, args, stream), output)


def test_a_graph_sees_a_change_of_the_mask(folder, device, stream):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1, 2, 3))
    args = batch(16)
    own = on(device, args)
    call(wrapper, own, stream)
    device.begin_capture(stream)
    output = call(wrapper, own, stream)
    graph = device.end_capture(stream)
    for mask in (gpu(4, 5), gpu(), gpu(*range(EXPERTS)), gpu(0, 7)):
        wrapper.gpu_experts_mask.copy_(mask)
        device.replay(graph, stream)
        device.synchronize(stream)
        assert torch.equal(device.read(output), on_the_cpu(folder, args, gpu_experts_mask=mask))
        assert wrapper._layer.experts.packed_experts == [i for i in range(EXPERTS) if not mask[i]]


def test_the_mask_may_change_during_a_capture(folder, device, stream):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1))
    args = batch(16)
    own = on(device, args)
    eager = call(wrapper, own, stream)  # may still need the experts that it was submitted with
    device.begin_capture(stream)
    wrapper.gpu_experts_mask.copy_(gpu(6, 7))
    output = call(wrapper, own, stream)
    graph = device.end_capture(stream)
    device.replay(graph, stream)
    device.synchronize(stream)
    for tensor, mask in ((eager, gpu(0, 1)), (output, gpu(6, 7))):
        assert torch.equal(device.read(tensor), on_the_cpu(folder, args, gpu_experts_mask=mask))


def test_a_call_has_the_mask_of_its_submit(folder, device, stream):
    wrapper = loaded(folder, gpu_experts_mask=gpu(0, 1))
    args = batch(30)
    outputs = []
    for mask in (gpu(0, 1), gpu(5), gpu(0, 1, 2), gpu()):
        wrapper.gpu_experts_mask.copy_(mask)
        outputs.append((mask, call(wrapper, on(device, args), stream)))
    device.synchronize(stream)
    for mask, output in outputs:
        expected = on_the_cpu(folder, args, gpu_experts_mask=mask)
        assert torch.equal(device.read(output), expected)


def test_a_captured_call_needs_one_before_it(folder, device, stream):
    wrapper = loaded(folder)
    own = on(device, batch(2))
    device.begin_capture(stream)
    message = (
        "layer 0: submit: a stream's first call needs memory, which cannot be allocated during a "
        "capture; make a call on this stream, or call prepare, before the capture begins"
    )
    with refused(RuntimeError, message):
        wrapper.submit_forward(*own, stream)
    device.end_capture(stream)


def test_a_failed_replay_gives_nan_and_its_error_at_the_next_call(folder, device, stream):
    wrapper = loaded(folder)
    args = batch(3)
    own = on(device, args)
    call(wrapper, own, stream)
    device.begin_capture(stream)
    output = call(wrapper, own, stream)
    graph = device.end_capture(stream)
    device.synchronize(stream)
    experts = wrapper._layer.experts
    experts.expert_mask = gpu(*range(EXPERTS))
    experts.evict()
    for _ in range(2):
        device.replay(graph, stream)
    device.synchronize(stream)
    assert device.read(output).isnan().all()
    message = "^layer 0: a call of 3 tokens has failed, and its output is NaN: .* no weights"
    with pytest.raises(RuntimeError, match=message):
        wrapper.submit_forward(*own, stream)
    assert torch.equal(result(device, wrapper, args, stream), on_the_cpu(folder, args))


@pytest.mark.parametrize("function", ["cuMemHostAlloc", "cuMemcpyAsync", "cuLaunchHostFunc"])
def test_a_refusal_of_the_driver_leaves_the_layer_usable(folder, device, stream, function):
    wrapper = loaded(folder)
    args = batch(3)
    device.fail(function)
    message = f"layer 0: CUDA: {function} failed: CUDA_ERROR_OUT_OF_MEMORY (2)"
    with refused(RuntimeError, message):
        wrapper.submit_forward(*on(device, args), stream)
    assert torch.equal(result(device, wrapper, args, stream), on_the_cpu(folder, args))


def test_page_locked_memory_is_freed_with_the_models_last_layer(folder, device, stream):
    gc.collect()
    before = device.host_allocations()
    wrappers = layers(folder)
    passes(wrappers, on(device, batch(3)), stream)
    assert device.host_allocations() == before + 4
    del wrappers
    gc.collect()
    assert device.host_allocations() == before


def test_weights_that_graphs_use_are_replaced_with_a_warning(folder, device, stream, caplog):
    wrapper = loaded(folder)
    own = on(device, batch(3))
    call(wrapper, own, stream)
    wrapper.load_weights()
    call(wrapper, own, stream)
    assert not caplog.records
    device.begin_capture(stream)
    call(wrapper, own, stream)
    device.end_capture(stream)
    wrapper.load_weights()
    assert [record.message for record in caplog.records] == [
        "layer 0: load_weights: CUDA graphs that captured calls of the earlier weights must not "
        "run any more; capture them again"
    ]


def test_submit_can_be_made_to_wait(folder, device, stream, monkeypatch):
    monkeypatch.setenv("KT_FORCE_SYNC_SUBMIT", "1")
    wrapper = loaded(folder)
    wrapper.submit_forward(*on(device, batch(30)), stream)
    assert wrapper._layer.experts.statistics().calls == 1


ENDS_DURING_CALLS = """
import os
import sys

sys.path.insert(0, sys.argv[3])

import torch
from fake_gpu import FakeGpu, FakeGpuStream
from sglang_tools import batch, loaded

from cpumoe.integrations.sglang import wrapper as module

gpu = FakeGpu()
gpu.reset()
streams = {}
on_the_cpu = module.stream_of


def stream_of(x, handle):
    if handle is None:
        return on_the_cpu(x, handle)
    return streams.setdefault(handle, FakeGpuStream(gpu, handle))


module.stream_of = stream_of
layers = [loaded(sys.argv[1], layer_idx=i, max_deferred_experts_per_token=1) for i in (0, 1)]
stream = gpu.new_stream()
args = batch(20)
own = [gpu.to(tensor) for tensor in args]


def call(layer):
    layer.submit_forward(*own, stream)
    return layer.sync_forward(own[0], stream)


call(layers[0])
gpu.begin_capture(stream)
call(layers[0])
graph = gpu.end_capture(stream)
for _ in range(50):
    call(layers[0])
    gpu.replay(graph, stream)
layers[1].submit_forward(*args, None)
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        for handle, tensors in ((stream, own), (None, list(args))):
            try:
                layers[0].submit_forward(*tensors, handle)
                layers[0].sync_forward(tensors[0], handle)
            except RuntimeError as error:
                assert "do not exist after fork()" in str(error), error
            else:
                os._exit(1)
        del layers
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    gpu.synchronize(stream)
    assert torch.isfinite(gpu.read(call(layers[0]))).all()
print("end")
"""


@pytest.mark.parametrize("way", ["exit", "fork"])
def test_a_process_may_exit_or_fork_during_calls(folder, way):
    tests = str(Path(__file__).parent)
    run = output_of if way == "exit" else output_with_torch
    assert run(ENDS_DURING_CALLS, str(folder), way, tests) == "end"
