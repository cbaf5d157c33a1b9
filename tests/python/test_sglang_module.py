"""The module ``kt_kernel`` that SGLang calls: every call of its contract, without SGLang."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_tools import edit_config
from moe_tools import Inputs, refused
from node_tools import made_up_nodes
from sglang_tools import (
    EXPERTS,
    arguments,
    assert_close,
    batch,
    checkpoint,
    gpu,
    loaded,
    oracle,
    run,
)

import cpumoe
from cpumoe import SwiGLU
from cpumoe.integrations.sglang import pythonpath
from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper

ID_DTYPES = pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("v4"))


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("kimi"), "kimi-k2")


# --- constructor -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, 0, 3, EXPERTS])
def test_sglang_says_how_many_experts_the_gpu_has(folder, count):
    wrapper = loaded(folder, num_gpu_experts=count)
    args = batch(16)
    mask = gpu(*range(count or 0))
    assert torch.equal(wrapper.gpu_experts_mask, mask)
    assert wrapper.num_gpu_experts == (count or 0)
    assert_close(run(wrapper, args), oracle(folder, args, mask=mask))


@pytest.mark.parametrize("mask", [None, gpu(), gpu(1, 6), gpu(*range(EXPERTS)), gpu(0).int()])
def test_the_fork_says_which_experts_the_gpu_has(folder, mask):
    wrapper = loaded(
        folder, gpu_experts_mask=mask, numa_nodes=None, swiglu_limit=0.0, swiglu_alpha=0.0
    )
    args = batch(16)
    expected = gpu() if mask is None else mask.bool()
    assert_close(run(wrapper, args), oracle(folder, args, mask=expected))


@pytest.mark.parametrize(
    "odd",
    [
        {"cpuinfer_threads": None},
        {"threadpool_count": 8},
        {"threadpool_count": None},
        {"numa_nodes": [0]},
        {"chunked_prefill_size": None},
        {"chunked_prefill_size": -1},
        {"max_deferred_experts_per_token": None},
        {"gpu_experts_mask": gpu(2), "num_gpu_experts": 0},
        {"method": "mxfp4"},
        {"cpu_save": True, "mode": "inference"},
    ],
    ids=str,
)
def test_odd_values_are_tolerated(folder, odd):
    wrapper = loaded(folder, **odd)
    args = batch(4)
    assert_close(run(wrapper, args), oracle(folder, args, mask=wrapper.gpu_experts_mask))


@pytest.mark.filterwarnings("ignore:Runtime. . threads requested:RuntimeWarning")
@pytest.mark.parametrize(
    ("numa_nodes", "threads", "expected"),
    [([1], 1, (1,)), ([1, 0, 1], 3, (0, 1)), ((), 2, (0, 1)), (None, 2, (0, 1))],
)
def test_experts_are_on_the_nodes_that_the_fork_names(
    folder, numa_nodes, threads, expected, monkeypatch, tmp_path
):
    made_up_nodes(monkeypatch, tmp_path, [2, 1])
    monkeypatch.setattr("cpumoe.integrations.sglang.wrapper._runtimes", {})
    odd = {"numa_nodes": numa_nodes, "cpuinfer_threads": threads, "threadpool_count": 2}
    wrapper = loaded(folder, **odd)
    assert wrapper._runtime.nodes == expected
    assert KTMoEWrapper(**arguments(folder, **odd))._runtime is wrapper._runtime
    args = batch(4)
    assert_close(run(wrapper, args), oracle(folder, args))
    message = (
        "numa_nodes: Runtime: nodes: expected nodes whose CPUs and memory this process may use, "
        "[0, 1]; got [5]; change --kt-numa-nodes"
    )
    with refused(ValueError, message):
        KTMoEWrapper(**arguments(folder, numa_nodes=[5]))


def test_int4_experts_are_called_rawint4(kimi):
    wrapper = loaded(kimi, num_gpu_experts=2)
    args = batch(16)
    assert_close(run(wrapper, args), oracle(kimi, args, mask=gpu(0, 1)))


def test_a_mask_is_copied(folder):
    mask = gpu(1)
    wrapper = loaded(folder, gpu_experts_mask=mask)
    mask[:] = True
    assert torch.equal(wrapper.gpu_experts_mask, gpu(1))


def test_layers_share_threads_and_the_checkpoints_index(folder):
    first, second = (KTMoEWrapper(**arguments(folder, layer_idx=i)) for i in (0, 1))
    assert first._runtime is second._runtime
    assert first._reader is second._reader


# --- the activation --------------------------------------------------------------------------


def limited(tmp_path, **config):
    edit_config(checkpoint(tmp_path), **config)
    return tmp_path


def test_the_checkpoint_has_the_swiglu_limit(tmp_path):
    folder = limited(tmp_path, swiglu_limit=0.05)
    args = batch(16)
    result = run(loaded(folder), args)
    assert_close(result, oracle(folder, args, activation=SwiGLU(limit=0.05)))
    unlimited = oracle(folder, args, activation=SwiGLU())
    assert (result.double() - unlimited).norm() > 0.05 * unlimited.norm()


def test_the_caller_has_the_swiglu_limit(tmp_path):
    folder = checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "swiglu_limit": None}))
    args = batch(16)
    wrapper = loaded(folder, swiglu_limit=0.05, swiglu_alpha=0.0)
    assert_close(run(wrapper, args), oracle(folder, args, activation=SwiGLU(limit=0.05)))


def test_the_caller_has_alpha_if_the_checkpoint_does_not_know_it(tmp_path):
    folder = checkpoint(tmp_path, "kimi-k2")
    edit_config(folder, model_type="new_moe")
    args = batch(16)
    activation = SwiGLU(alpha=1.702, limit=0.05, up_offset=1.0)
    wrapper = loaded(folder, swiglu_limit=0.05, swiglu_alpha=1.702)
    assert_close(run(wrapper, args), oracle(folder, args, activation=activation))


def test_a_closed_runtime_is_replaced(folder):
    first, second = (KTMoEWrapper(**arguments(folder, cpuinfer_threads=2)) for _ in range(2))
    assert first._runtime is second._runtime
    first._runtime.close()
    args = batch(4)
    assert_close(run(loaded(folder, cpuinfer_threads=2), args), oracle(folder, args))


def test_an_unknown_model_has_the_hosts_activation(tmp_path):
    folder = checkpoint(tmp_path, "kimi-k2")
    edit_config(folder, model_type="new_moe", swiglu_limit=0.05)
    args = batch(16)
    assert_close(run(loaded(folder), args), oracle(folder, args, activation=SwiGLU(limit=0.05)))


# --- slots -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slots", [[3, 1, 7, 0, 6, 2, 5, 4], [3, 3, 3, 0, 1, 2, 0, 0]], ids=["permuted", "redundant"]
)
def test_slots_hold_the_experts_of_the_map(folder, slots):
    wrapper = loaded(folder, slots=torch.tensor(slots), num_gpu_experts=2)
    args = batch(32)
    assert_close(run(wrapper, args), oracle(folder, args, mask=gpu(0, 1), slots=slots))


def test_redundant_slots_share_memory(folder):
    all_experts = loaded(folder)._layer.experts.nbytes
    redundant = loaded(folder, slots=torch.tensor([3, 3, 3, 3, 1, 1, 1, 1]))
    assert redundant._layer.experts.nbytes == all_experts // 4


def test_no_map_means_the_checkpoints_order(folder):
    wrapper = KTMoEWrapper(**arguments(folder))
    wrapper.load_weights(None)
    args = batch(4)
    assert_close(run(wrapper, args), oracle(folder, args))


# --- calls -----------------------------------------------------------------------------------


@ID_DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 3, 64, 300, 4096])
def test_any_number_of_tokens(folder, tokens, ids):
    wrapper = loaded(folder, num_gpu_experts=3)
    x, topk_ids, weights = batch(tokens)
    args = Inputs(x, topk_ids.to(ids), weights)
    assert_close(run(wrapper, args), oracle(folder, args, mask=gpu(0, 1, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_inputs_dtype(folder, dtype):
    args = batch(8, dtype=dtype)
    result = run(loaded(folder), args)
    assert result.dtype == dtype
    assert_close(result, oracle(folder, args))


@ID_DTYPES
def test_foreign_ids_are_skipped(folder, ids):
    wrapper = loaded(folder)
    x, topk_ids, weights = batch(16)
    topk_ids = topk_ids.to(ids)
    topk_ids[::2, 0] = -1
    topk_ids[1::2, 1] = EXPERTS
    topk_ids[3::4, 2] = 2**31 - 1
    topk_ids[5] = -(2**31)
    args = Inputs(x, topk_ids, weights)
    result = run(wrapper, args)
    assert_close(result, oracle(folder, args))
    assert not result[5].any()


def test_inputs_may_be_overwritten_after_submit(folder):
    wrapper = loaded(folder)
    args = batch(300)
    expected = oracle(folder, args)
    for _ in range(8):
        own = Inputs(*(tensor.clone() for tensor in args))
        wrapper.submit_forward(*own, 0)
        own.hidden_states.fill_(torch.nan)
        own.topk_ids.fill_(-1)
        own.topk_weights.fill_(torch.nan)
        assert_close(wrapper.sync_forward(own.hidden_states, 0), expected)


def test_layers_may_be_submitted_before_others_are_waited_for(folder):
    wrappers = [loaded(folder, layer_idx=layer) for layer in (0, 1)]
    args = batch(64)
    for wrapper in wrappers:
        wrapper.submit_forward(*args, None)
    for layer, wrapper in reversed(list(enumerate(wrappers))):
        result = wrapper.sync_forward(args.hidden_states, None)
        assert_close(result, oracle(folder, args, layer=layer))


def test_a_third_layer_between_submit_and_sync_takes_the_place_of_the_first(folder):
    first, second, third = (loaded(folder) for _ in range(3))
    args = batch(8)
    expected = oracle(folder, args)
    for wrapper in (first, second, third):
        wrapper.submit_forward(*args, None)
    for wrapper in (third, second):
        assert_close(wrapper.sync_forward(args.hidden_states, None), expected)
    with pytest.raises(RuntimeError, match=r"layer 0: sync: .* two layers were called after it"):
        first.sync_forward(args.hidden_states, None)
    assert_close(run(first, args), expected)


def test_forward_is_submit_and_sync(folder):
    args = batch(5)
    assert_close(loaded(folder).forward(*args, 0), oracle(folder, args))


def test_a_call_that_nobody_waited_for_is_forgotten(folder):
    wrapper = loaded(folder)
    wrapper.submit_forward(*batch(7), None)
    args = batch(5, seed=1)
    assert_close(run(wrapper, args), oracle(folder, args))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            {"topk_weights": torch.ones(4, 2)},
            ValueError,
            "expected [4, 3] like topk_ids, got [4, 2]",
        ),
        ({"topk_ids": torch.ones(4, 3)}, TypeError, "topk_ids: expected int32 or int64"),
        ({"topk_ids": [[1, 2, 3]] * 4}, TypeError, "topk_ids: expected a torch.Tensor, got list"),
        ({"hidden_states": torch.ones(4, 32)}, ValueError, "hidden_states: expected [tokens, 64]"),
        ({"hidden_states": torch.ones(5, 64)}, ValueError, "topk_ids: expected [5, top_k]"),
        ({"hidden_states": None}, TypeError, "hidden_states: expected a torch.Tensor"),
    ],
)
def test_an_error_leaves_the_layer_usable(folder, wrong, kind, message):
    wrapper = loaded(folder)
    args = batch(4)
    with pytest.raises(kind, match=re.escape(message)):
        wrapper.submit_forward(*replace(args, **wrong), None)
    assert_close(run(wrapper, args), oracle(folder, args))


def test_submit_can_be_made_to_wait(folder, monkeypatch):
    monkeypatch.setenv("KT_FORCE_SYNC_SUBMIT", "1")
    wrapper = loaded(folder)
    args = batch(300)
    wrapper.submit_forward(*args, None)
    assert wrapper._layer.experts.statistics().calls == 1
    assert_close(wrapper.sync_forward(args.hidden_states, None), oracle(folder, args))


def test_weights_can_be_loaded_again(folder):
    wrapper = loaded(folder)
    slots = [1, 0, 2, 3, 4, 5, 6, 7]
    wrapper.load_weights(torch.tensor(slots))
    args = batch(9)
    assert_close(run(wrapper, args), oracle(folder, args, slots=slots))


def test_the_hosts_settings_do_not_matter(folder):
    """SGLang loads with a default device of its own, and calls in inference mode."""
    with torch.device("meta"), torch.inference_mode():
        wrapper = loaded(folder, slots=torch.arange(EXPERTS, device="cpu"), num_gpu_experts=2)
    args = batch(32)
    with torch.device("meta"), torch.inference_mode():
        result = run(wrapper, args)
    assert_close(result, oracle(folder, args, mask=gpu(0, 1)))
    wrapper.gpu_experts_mask.copy_(gpu(5))
    with torch.device("meta"), torch.no_grad():
        result = run(wrapper, args)
    assert_close(result, oracle(folder, args, mask=gpu(5)))


def test_capture_batch_sizes_are_remembered():
    KTMoEWrapper.set_capture_batch_sizes([1, 2, 8])
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 2, 8]
    KTMoEWrapper.set_capture_batch_sizes([])
    KTMoEWrapper.clear_buffer_cache()


# --- ways in ---------------------------------------------------------------------------------


def test_a_folder_on_pythonpath_makes_the_module_importable():
    package = str(Path(cpumoe.__file__).parents[1])
    path = os.pathsep.join([str(pythonpath()), package])
    script = (
        "import kt_kernel; from kt_kernel import KTMoEWrapper, generate_gpu_experts_masks; "
        "print(KTMoEWrapper.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["cpumoe.integrations.sglang.wrapper"]


def test_no_module_of_the_package_is_called_kt_kernel_by_itself():
    top = {path.name for path in Path(cpumoe.__file__).parents[1].iterdir()}
    assert "kt_kernel" not in top
    assert "kt_kernel.py" not in top
    assert "__init__.py" not in {path.name for path in pythonpath().iterdir()}
