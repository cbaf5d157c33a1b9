"""Families whose experts are more than a list: a second list for images, a norm of each output."""

import copy
import re

import pytest
import torch

pytest.importorskip("transformers")

import families
from checkpoint_tools import edit_config, write_small
from cli_tools import refuse
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Ernie4_5_VLMoeForConditionalGeneration

import cpumoe
from cpumoe import Experts
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError
from cpumoe.integrations.transformers import CpuExperts, ExpertsOptions, from_pretrained

EMBEDDINGS = torch.randn(1, 12, families.HIDDEN, generator=torch.Generator().manual_seed(1))
OF_IMAGES = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, 0, 0, 1, 0]])


@pytest.fixture(scope="module")
def ernie():
    """A whole tiny model, whose language part is random as in the table of families."""
    part = families.tiny_model("ernie4_5_vl_moe")
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = AutoConfig.for_model(
        "ernie4_5_vl_moe", text_config=part.config.to_dict(), vision_config=vision
    )
    model = Ernie4_5_VLMoeForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(part.state_dict())
    return model


def hidden_states(model, types):
    output = model.model.language_model(
        inputs_embeds=EMBEDDINGS, moe_mm_token_type_ids=types, use_cache=False
    )
    return output.last_hidden_state


def loaded(folder, **options):
    return from_pretrained(
        folder,
        model_class=Ernie4_5_VLMoeForConditionalGeneration,
        dtype=torch.float32,
        options=ExpertsOptions(progress=False, **options),
    )


@torch.no_grad()
def test_tokens_of_images_have_experts_of_their_own(ernie, tmp_path):
    copy.deepcopy(ernie).bfloat16().save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    last = 2 * families.EXPERTS - 1
    assert any(name.endswith(f"layers.2.mlp.experts.{last}.up_proj.weight") for name in names)
    model = loaded(tmp_path)
    ours = [module for module in model.modules() if isinstance(module, CpuExperts)]
    assert [module.experts.intermediate_size for module in ours] == [96, 64, 96, 64]
    ernie.set_experts_implementation("eager")
    text = torch.zeros_like(OF_IMAGES)
    outputs = [hidden_states(ernie, types) for types in (OF_IMAGES, text)]
    assert (outputs[0] - outputs[1]).norm() > 0.1 * outputs[1].norm()
    for types, expected in zip((OF_IMAGES, text), outputs, strict=True):
        assert (hidden_states(model, types) - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_experts_that_were_evicted_are_read_from_their_own_list(ernie, tmp_path):
    copy.deepcopy(ernie).bfloat16().save_pretrained(tmp_path)
    model = loaded(tmp_path)
    before = hidden_states(model, OF_IMAGES)
    masked = torch.ones(families.EXPERTS, dtype=torch.bool)
    for module in model.modules():
        if isinstance(module, CpuExperts):
            module.experts.expert_mask = masked
            module.experts.evict()
            module.experts.expert_mask = None
    assert torch.equal(hidden_states(model, OF_IMAGES), before)


def test_quantized_experts_for_images_are_refused(tmp_path):
    config = families.tiny_model("ernie4_5_vl_moe").config
    folder = write_small(tmp_path, "DeepSeek-V3", layers=1)
    sizes = {"moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": [96, 64]}
    edit_config(folder, model_type=config.model_type, n_routed_experts=None, **sizes)
    with cpumoe.open_checkpoint(folder) as reader:
        assert reader.of_module("layers.3.mlp.text_moe.experts") is reader
        with pytest.raises(UnsupportedFormatError, match="experts for the tokens of images are"):
            reader.of_module("layers.3.mlp.vision_moe.experts")
    edit_config(folder, moe_intermediate_size=[96, 0])
    with pytest.raises(
        CheckpointError, match=r"moe_intermediate_size: expected a positive integer"
    ):
        cpumoe.open_checkpoint(folder)


def test_layers_leave_a_norm_of_outputs_to_their_caller(tmp_path):
    families.tiny_model("muse_spark").bfloat16().save_pretrained(tmp_path)
    norm = "layers.0.mlp.experts.post_expert_norm.weight: a norm of each expert's output is not"
    with pytest.raises(UnsupportedFormatError, match=norm):
        Experts.from_checkpoint(tmp_path, 1)
    assert re.search(norm, refuse("validate", tmp_path))
    experts = Experts.from_checkpoint(tmp_path, 1, activation=cpumoe.SwiGLU())
    assert experts.hidden_size == experts.export(0).down.shape[0]


def test_model_and_files_must_agree_on_the_norm(tmp_path):
    families.tiny_model("muse_spark").bfloat16().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if "post_expert_norm" not in n}
    save_file(tensors, path, {"format": "pt"})
    message = "the model's experts have a norm of their outputs, the checkpoint's no norm"
    with pytest.raises(ValueError, match=message):
        from_pretrained(
            tmp_path,
            model_class=families.language_model("muse_spark"),
            options=ExpertsOptions(progress=False),
        )
