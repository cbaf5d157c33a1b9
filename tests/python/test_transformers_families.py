"""Families whose activation is recognized by evaluation, not by a list of types."""

import json

import pytest
import tiny_models
import torch
from checkpoint_tools import edit_config, edit_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

import cpumoe
from cpumoe.checkpoint.activations import PLAIN_MODEL_TYPES
from cpumoe.formats import weight_format
from cpumoe.integrations.transformers import CpuExperts, ExpertsOptions, from_pretrained

OPTIONS = ExpertsOptions(isa="generic", progress=False)
TOKENS = torch.arange(3, 43)[None]
# Families differ in the names of blocks, projections and sizes in config.json.
FAMILIES = ["afmoe", "cohere2_moe", "ernie4_5_moe", "minimax", "phimoe"]


def both(folder, dequantizing):
    """The model with cpumoe's experts, and the host's, whose weights the config dequantizes."""
    ours = from_pretrained(folder, dtype=torch.float32, options=OPTIONS)
    assert sum(isinstance(module, CpuExperts) for module in ours.modules()) >= 2
    hosts = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=dequantizing
    )
    return ours, hosts.float()


def check_logits(ours, hosts):
    with torch.no_grad():
        actual, expected = (model(TOKENS).logits for model in (ours, hosts))
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def by_host_dequantized(folder):
    """The host's model of a checkpoint's weights, which become bf16."""
    tensors = load_file(folder / "model.safetensors")
    changes = {}
    for stem in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
        codes, divisor = tensors[f"{stem}_packed"], tensors.get(f"{stem}_global_scale")
        fmt = weight_format("int4" if divisor is None else "nvfp4")
        weight = fmt.dequantize(codes.view(torch.uint8), tensors[f"{stem}_scale"])
        changes |= {name: None for name in tensors if name.startswith(f"{stem}_")}
        changes[stem] = (weight if divisor is None else weight / divisor).bfloat16()
    edit_tensors(folder, changes)
    edit_config(folder, quantization_config=None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "stored"),
    [(family, "pack-quantized") for family in FAMILIES]
    + [("qwen3_moe", "mxfp4-pack-quantized"), ("phimoe", "mxfp4-pack-quantized")]
    + [("qwen3_moe", "float-quantized"), ("phimoe", "float-quantized")],
)
def test_quantized_experts_compute_as_the_hosts_dequantized_ones(tmp_path, family, stored):
    folder = tiny_models.int4_moe(tmp_path, family, stored=stored)
    check_logits(*both(folder, CompressedTensorsConfig(dequantize=True)))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "glm4_moe", "minimax_m2"])
def test_blocks_of_fp8_compute_as_the_hosts_dequantized_ones(tmp_path, family):
    if family == "deepseek_v3":
        folder = tiny_models.kimi(tmp_path, model_type=family, stored="fp8")
    else:
        folder = tiny_models.int4_moe(tmp_path, family, stored="fp8")
    ours, hosts = both(folder, FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128)))
    assert next(m for m in ours.modules() if isinstance(m, CpuExperts)).experts.format == "fp8"
    check_logits(ours, hosts)


# The host cannot load layers without quantized experts, and ignores NVFP4's factors.
@pytest.mark.parametrize(
    ("stored", "kept", "formats"),
    [
        ("pack-quantized", 1, ["int4", "bf16"]),
        ("nvfp4-pack-quantized", 0, ["bf16", "nvfp4"]),
        ("nvfp4-pack-quantized", None, ["nvfp4", "nvfp4"]),
    ],
)
def test_experts_compute_as_those_of_a_dequantized_checkpoint(tmp_path, stored, kept, formats):
    folder = tiny_models.int4_moe(tmp_path, "qwen3_moe", stored=stored, kept=kept)
    ours = from_pretrained(folder, dtype=torch.float32, options=OPTIONS)
    experts = [module.experts for module in ours.modules() if isinstance(module, CpuExperts)]
    assert [each.format for each in experts[:2]] == formats
    check_logits(ours, by_host_dequantized(folder))


@pytest.mark.parametrize("stored", ["pack-quantized", "nvfp4-pack-quantized"])
def test_experts_without_a_gate_compute_as_those_of_a_dequantized_checkpoint(tmp_path, stored):
    folder = tiny_models.int4_moe(tmp_path, "nemotron_h", stored=stored)
    ours = from_pretrained(folder, dtype=torch.float32, options=OPTIONS)
    experts = [module.experts for module in ours.modules() if isinstance(module, CpuExperts)]
    assert {each.format for each in experts} == {"nvfp4" if "nvfp4" in stored else "int4"}
    check_logits(ours, by_host_dequantized(folder))


def test_fp8_with_one_scale_per_matrix_computes_as_the_hosts_dequantized_one(tmp_path):
    folder = tiny_models.int4_moe(tmp_path, "qwen3_moe", stored="fp8")
    tensors = load_file(folder / "model.safetensors")
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    edit_tensors(folder, {name: tensors[name][0, 0] for name in scales})
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, "weight_block_size": None})
    check_logits(*both(folder, FineGrainedFP8Config(dequantize=True, weight_block_size=None)))


def test_the_reader_alone_does_not_guess_the_activation_of_an_unknown_model(tmp_path):
    folder = tiny_models.int4_moe(tmp_path, FAMILIES[0])
    assert "new_moe" not in PLAIN_MODEL_TYPES
    edit_config(folder, model_type="new_moe")
    with pytest.raises(
        cpumoe.UnsupportedFormatError, match="model_type 'new_moe'; pass activation="
    ):
        cpumoe.Experts.from_checkpoint(folder, 1)


def test_exact_gelu_computes_as_the_hosts(tmp_path):
    folder = tiny_models.int4_moe(tmp_path, "phimoe")
    edit_config(folder, hidden_act="gelu")
    ours, hosts = both(folder, CompressedTensorsConfig(dequantize=True))
    experts = next(module.experts for module in ours.modules() if isinstance(module, CpuExperts))
    assert experts.activation == cpumoe.GLU("gelu")
    check_logits(ours, hosts)


def test_another_activation_is_refused(tmp_path):
    folder = tiny_models.int4_moe(tmp_path, "phimoe")
    edit_config(folder, hidden_act="quick_gelu")
    with pytest.raises(cpumoe.UnsupportedFormatError, match="hidden_act 'quick_gelu' is"):
        from_pretrained(folder)


def test_a_config_without_a_model_type_is_not_guessed_at_by_the_path(tmp_path):
    folder = tiny_models.int4_moe(
        tmp_path / "phimoe", "phimoe"
    )  # transformers would find it in the folder
    edit_config(folder, model_type=None)
    with pytest.raises(cpumoe.CheckpointError, match=r"expected a model_type, .*'original'"):
        from_pretrained(folder)
