"""Wrong uses of the module ``kt_kernel``, each with its error."""

import pytest
import torch
from moe_tools import refused
from sglang_tools import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    arguments,
    batch,
    checkpoint,
    gpu,
    loaded,
    run,
)

from cpumoe.integrations.sglang import checkpoint as checkpoint_module
from cpumoe.integrations.sglang.checkpoint import Method
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper
from cpumoe.integrations.sglang.streams import CudaStream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("v4"))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"method": "AMXINT4"},
            ValueError,
            "method: expected one of MXFP4, RAWINT4, FP8, FP8_PERCHANNEL, BF16, NVFP4, which are "
            "the formats that cpumoe computes, got 'AMXINT4'; pass --kt-method and a checkpoint in "
            "that format",
        ),
        (
            {"method": "RAWINT4"},
            ValueError,
            "method: expected MXFP4, because the experts of FOLDER are mxfp4, got RAWINT4; pass "
            "--kt-method MXFP4",
        ),
        (
            {"num_experts": EXPERTS + 1},
            ValueError,
            f"num_experts: expected {EXPERTS}, as the checkpoint has, got {EXPERTS + 1}; pass "
            "--disable-shared-experts-fusion, because a fused shared expert would be computed as "
            "a routed one, and no --ep-num-redundant-experts",
        ),
        (
            {"hidden_size": 2 * HIDDEN},
            ValueError,
            f"hidden_size: expected {HIDDEN}, as the checkpoint FOLDER has, got {2 * HIDDEN}; "
            "--kt-weight-path must be the experts of the model that runs",
        ),
        (
            {"moe_intermediate_size": INTERMEDIATE // 2},
            ValueError,
            f"moe_intermediate_size: expected {INTERMEDIATE}, as the checkpoint FOLDER has, got "
            f"{INTERMEDIATE // 2}; --kt-weight-path must be the experts of the model that runs",
        ),
        (
            {"layer_idx": 2},
            IndexError,
            "layer_idx: layer 2 has no routed experts in FOLDER; layers 0..1 have; layers of a "
            "draft model must stay on the GPU, which SGLang's plugin of cpumoe and sglang-kt see "
            "to",
        ),
        (
            {"num_gpu_experts": EXPERTS + 1},
            ValueError,
            f"num_gpu_experts: expected 0 to {EXPERTS}, got {EXPERTS + 1}",
        ),
        (
            {"gpu_experts_mask": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            f"gpu_experts_mask: expected [{EXPERTS}], got [3]",
        ),
        (
            {"gpu_experts_mask": gpu(1, 2), "num_gpu_experts": 3},
            ValueError,
            "gpu_experts_mask has 2 experts, but num_gpu_experts is 3; pass one of the two",
        ),
        (
            {"gpu_experts_mask": torch.zeros(EXPERTS)},
            TypeError,
            f"gpu_experts_mask: expected a bool tensor [{EXPERTS}], got float32 [{EXPERTS}]",
        ),
        (
            {"mode": "sft"},
            ValueError,
            "mode: expected 'inference', got 'sft'; cpumoe does not train, so leave out "
            "--kt-expert-lora-path",
        ),
        (
            {"swiglu_limit": 7.0},
            ValueError,
            "swiglu_limit: expected 10.0, as the checkpoint FOLDER has, got 7.0; "
            "--kt-weight-path must be the experts of the model that runs",
        ),
        (
            {"num_experts": 2**70},
            ValueError,
            f"num_experts: expected 1 to 65536, got {2**70}",
        ),
        (
            {"chunked_prefill_size": 10**12},
            ValueError,
            "chunked_prefill_size: expected at most 262144, because page-locked memory must have "
            "room for so many tokens, got 1000000000000; pass a smaller --chunked-prefill-size",
        ),
        (
            {"numa_nodes": 5},
            TypeError,
            "numa_nodes: expected a list of ints or None, got 5",
        ),
        (
            {"swiglu_alpha": 1.702},
            ValueError,
            "swiglu_alpha: expected none, as the checkpoint FOLDER has, got 1.702; "
            "--kt-weight-path must be the experts of the model that runs",
        ),
        (
            {"cpuinfer_threads": 0},
            ValueError,
            "cpuinfer_threads: expected at least 1, got 0",
        ),
        (
            {"max_deferred_experts_per_token": -1},
            ValueError,
            "max_deferred_experts_per_token: expected at least 0, got -1",
        ),
        (
            {"weight_path": None},
            TypeError,
            "weight_path: expected a folder, got None; pass --kt-weight-path",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_the_remedy(folder, changes, kind, message):
    with refused(kind, message.replace("FOLDER", str(folder))):
        KTMoEWrapper(**arguments(folder, **changes))


def test_a_format_without_a_method_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "METHODS", {"RAWINT4": Method("int4")})
    message = (
        f"{folder}: expected experts in int4, which are the formats that cpumoe computes for "
        "SGLang, got mxfp4"
    )
    with refused(ValueError, message):
        KTMoEWrapper(**arguments(folder, method="RAWINT4"))


def test_a_missing_folder_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        KTMoEWrapper(**arguments(folder, weight_path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("slots", "kind", "message"),
    [
        (torch.arange(EXPERTS + 1), ValueError, f"expected [{EXPERTS}], got [{EXPERTS + 1}]"),
        (torch.arange(EXPERTS).float(), TypeError, f"expected an int tensor [{EXPERTS}], got "),
        (list(range(EXPERTS)), TypeError, f"expected an int tensor [{EXPERTS}], got list"),
        (
            torch.arange(1, EXPERTS + 1),
            ValueError,
            f"slot {EXPERTS - 1}: expected an expert from 0 to {EXPERTS - 1}, got {EXPERTS}",
        ),
    ],
)
def test_a_wrong_map_is_refused(folder, slots, kind, message):
    wrapper = KTMoEWrapper(**arguments(folder))
    with pytest.raises(kind) as caught:
        wrapper.load_weights(slots)
    assert str(caught.value).startswith(f"physical_to_logical_map: {message}")


def test_calls_before_the_weights_are_refused(folder):
    wrapper = KTMoEWrapper(**arguments(folder))
    message = "layer 0: submit_forward: expected load_weights to be called first"
    with refused(RuntimeError, message):
        wrapper.submit_forward(*batch(1), None)


def test_sync_without_submit_is_refused(folder):
    wrapper = loaded(folder)
    message = (
        "layer 0: sync_forward: expected a submit_forward before it on the same thread, got none"
    )
    with refused(RuntimeError, message):
        wrapper.sync_forward(batch(1).hidden_states, None)
    args = batch(2)
    run(wrapper, args)
    with refused(RuntimeError, message):
        wrapper.sync_forward(args.hidden_states, None)


def test_sync_without_submit_names_the_stream_of_a_gpu(folder):
    layer = loaded(folder)._layer
    message = (
        "layer 0: sync_forward: expected a submit_forward before it on the same stream, got none"
    )
    with refused(RuntimeError, message):
        CudaStream(torch.device("cuda", 0), 7).sync(layer, batch(1).hidden_states)


def test_sync_of_another_shape_is_refused(folder):
    wrapper = loaded(folder)
    wrapper.submit_forward(*batch(2), None)
    message = (
        f"layer 0: sync_forward: expected torch.bfloat16 [2, {HIDDEN}], as submit_forward got, "
        f"got torch.bfloat16 [3, {HIDDEN}]"
    )
    with refused(ValueError, message):
        wrapper.sync_forward(batch(3).hidden_states, None)


def test_tensors_of_no_known_device_are_refused(folder):
    wrapper = loaded(folder)
    x, ids, weights = (tensor.to("meta") for tensor in batch(2))
    message = "hidden_states: expected a tensor on the CPU or on a GPU of CUDA, got device meta"
    with refused(TypeError, message):
        wrapper.submit_forward(x, ids, weights, 0)


def test_tensors_and_stream_belong_together(folder):
    wrapper = loaded(folder)
    message = (
        "cuda_stream: expected 0 or None with CPU tensors, got 140001; pass tensors of the "
        "stream's device"
    )
    with refused(ValueError, message):
        wrapper.submit_forward(*batch(2), 140001)


def test_all_tensors_are_on_the_streams_device():
    stream = CudaStream(torch.device("meta"), 7)
    assert stream.dense(torch.empty(2, 3, device="meta"), "topk_ids")[1] == 0
    message = (
        "topk_ids: expected a dense tensor on meta, where the hidden states are, got layout "
        "torch.strided on cpu"
    )
    with refused(TypeError, message):
        stream.dense(torch.empty(2, 3), "topk_ids")
    with refused(TypeError, "topk_ids: expected a torch.Tensor, got NoneType"):
        stream.dense(None, "topk_ids")
