"""Checkpoints whose dense tensors do not fit the model are refused."""

import logging
import re

import pytest
import tiny_models
import torch
from checkpoint_tools import edit_config, edit_tensors
from cli_tools import refuse
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import cpumoe
from cpumoe.integrations.transformers import CpuExperts, disable, enable, from_pretrained
from cpumoe.integrations.transformers.loading import from_pretrained_by_host

TOKENS = torch.arange(3, 23)[None]
KV_PROJ = "layers.0.attn.wkv"
HOSTS_KV_PROJ = "model.layers.0.self_attn.kv_proj.weight"


@pytest.fixture
def v4(tmp_path):
    return tiny_models.deepseek_v4(tmp_path)


@pytest.fixture
def gpt_oss(tmp_path):
    return tiny_models.gpt_oss(tmp_path)


@pytest.fixture
def host_log():
    """Collects transformers' log."""
    records = []

    class Collect(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Collect()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def edit(folder, name, change):
    tensor = load_file(folder / "model.safetensors")[name]
    edit_tensors(folder, {name: change(tensor)})


def refused(message, folder, load=from_pretrained, **kwargs):
    with pytest.raises(cpumoe.CheckpointError, match=rf"^{re.escape(str(folder))}: {message}"):
        load(folder, **kwargs)


@pytest.mark.parametrize("load", [from_pretrained, from_pretrained_by_host])
@pytest.mark.parametrize(
    ("family", "name", "hosts_name"),
    [
        ("deepseek_v4", "layers.0.ffn.gate.tid2eid", "model.layers.0.mlp.gate.tid2eid"),
        ("deepseek_v4", f"{KV_PROJ}.weight", HOSTS_KV_PROJ),
        ("gpt_oss", "model.layers.1.mlp.router.bias", "model.layers.1.mlp.router.bias"),
        ("kimi", "lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(tmp_path, load, family, name, hosts_name):
    folder = tiny_models.FAMILIES[family].write(tmp_path)
    edit_tensors(folder, {name: None})
    refused(rf"the weights do not fit \w+: missing tensors: 1 \({hosts_name}\); ", folder, load)


def test_of_many_missing_tensors_the_first_are_named_and_all_counted(gpt_oss, host_log):
    names = [n for n in load_file(gpt_oss / "model.safetensors") if n.endswith("o_proj.bias")]
    names += ["model.norm.weight", "model.layers.0.input_layernorm.weight"]
    edit_tensors(gpt_oss, dict.fromkeys(names))
    first = ", ".join(sorted(names)[:3])
    refused(rf".*missing tensors: 5 \({first}, \.\.\.\); check that the download", gpt_oss)
    assert not any("LOAD REPORT" in message for message in host_log)  # the error's one line says it


@pytest.mark.parametrize("name", ["stray.weight", "model.layers.0.self_attn.q_norm.weight"])
def test_a_tensor_that_the_model_has_no_place_for_is_refused(gpt_oss, name):
    edit_tensors(gpt_oss, {name: torch.ones(64)})
    refused(rf".*: tensors unknown to the model: 1 \({name}\)", gpt_oss)


def test_a_tensor_of_another_shape_is_refused_unless_the_host_is_told_to_allow_it(
    gpt_oss, host_log
):
    edit(gpt_oss, "model.norm.weight", lambda tensor: tensor[:32])
    refused(r".*: tensors of another shape: 1 \(model.norm.weight \[32\] for \[64\]\)", gpt_oss)
    refused(r".*another shape", gpt_oss, ignore_mismatched_sizes=False)
    assert not any("LOAD REPORT" in message for message in host_log)
    model = from_pretrained(gpt_oss, ignore_mismatched_sizes=True)
    assert model.model.norm.weight.shape == (64,)
    assert any("LOAD REPORT" in message for message in host_log)


@pytest.mark.parametrize("load", [from_pretrained, from_pretrained_by_host])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_fp8_weight_without_its_scale_is_refused(v4, load, dtype):
    edit_tensors(v4, {f"{KV_PROJ}.scale": None})
    message = rf"FP8 weights without a scale: 1 \({KV_PROJ}\.weight\)"
    refused(message, v4, load, dtype=dtype)
    config = AutoConfig.from_pretrained(v4)
    if load is from_pretrained:  # config.json is not read then
        refused(message, v4, dtype=dtype, config=config)


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.ERROR])
def test_tensors_that_the_host_cannot_convert_are_refused_by_name(v4, verbosity, monkeypatch):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", verbosity)
    edit(v4, f"{KV_PROJ}.scale", lambda scale: scale.view(torch.uint8).repeat(3, 1))
    message = (
        rf"transformers cannot convert tensors: 1 \({HOSTS_KV_PROJ}\): .*\(3, 1\); check that the"
    )
    refused(message, v4)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.kv_scale",
        "model.layers.0.self_attn.q_proj.input_scale",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "mtp.layers.0.eh_proj.weight",
    ],
)
def test_tensors_that_a_model_computes_right_without_may_be_there(gpt_oss, name):
    edit_tensors(gpt_oss, {name: torch.ones(1)})
    assert experts_of(from_pretrained(gpt_oss))


def test_layers_beyond_the_models_are_those_of_multi_token_prediction_or_refused(tmp_path):
    folder = tiny_models.kimi(tmp_path)
    extra = f"model.layers.{tiny_models.LAYERS}.eh_proj.weight"
    edit_tensors(folder, {extra: torch.ones(1)})
    edit_config(folder, num_nextn_predict_layers=0)
    refused(rf".*: tensors unknown to the model: 1 \({extra}\)", folder)
    edit_config(folder, num_nextn_predict_layers=1)
    assert experts_of(from_pretrained(folder))


def test_what_is_tied_need_not_be_in_the_files(gpt_oss):
    edit_config(gpt_oss, tie_word_embeddings=True)
    edit_tensors(gpt_oss, {"lm_head.weight": None})
    model = from_pretrained(gpt_oss)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_part_of_a_model_is_complete_without_the_rest(gpt_oss):
    model = from_pretrained(gpt_oss, model_class=AutoModel)
    assert experts_of(model)
    edit_tensors(gpt_oss, {"model.layers.0.self_attn.stray": torch.ones(1)})
    refused(r".*unknown to the model: 1 \(.*stray\)", gpt_oss, model_class=AutoModel)


def test_a_whole_checkpoint_loads_without_a_warning(v4, host_log):
    from_pretrained(v4)
    assert host_log == []


def test_a_report_may_be_asked_for(gpt_oss):
    model, report = from_pretrained(gpt_oss, output_loading_info=True)
    assert experts_of(model)
    assert not any(report.values())
    edit_tensors(gpt_oss, {"model.norm.weight": None})
    refused(r".*missing tensors: 1", gpt_oss, output_loading_info=True)


def test_enable_leaves_the_hosts_answer_to_missing_tensors(gpt_oss, host_log):
    edit_tensors(gpt_oss, {"model.norm.weight": None})
    enable()
    try:
        model = AutoModelForCausalLM.from_pretrained(gpt_oss)
    finally:
        disable()
    assert experts_of(model)
    assert any("LOAD REPORT" in message for message in host_log)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, CpuExperts)]


@pytest.mark.parametrize("command", ["generate", "eval", "chat", "serve"])
def test_commands_refuse_it_in_one_line(tmp_path, command):
    folder = tiny_models.kimi(tmp_path)
    tiny_models.byte_tokenizer(folder)
    edit_tensors(folder, {"model.norm.weight": None})
    options = {"eval": ["--text", folder / "config.json"], "generate": ["-p", "x"]}
    assert "missing tensors: 1 (model.norm.weight)" in refuse(
        command, folder, *options.get(command, [])
    )
