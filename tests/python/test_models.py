import pytest

from cpumoe.models import MODELS, find_model


@pytest.mark.parametrize(
    "name", ["DeepSeek-V4-Flash", "deepseek-ai/deepseek-v4-flash", " V4-Flash "]
)
def test_found_by_name_and_alias_in_any_case(name):
    assert find_model(name).name == "DeepSeek-V4-Flash"


def test_unknown_model_names_close_and_known_ones():
    message = r"unknown model 'gpt-oss-21b' \(did you mean gpt-oss-20b.*\?\); known models: Deep"
    with pytest.raises(ValueError, match=message):
        find_model("gpt-oss-21b")
    with pytest.raises(ValueError, match=r"unknown model 'zzzzzz'; known models: DeepSeek-"):
        find_model("zzzzzz")


def test_names_are_unique():
    names = [name.lower() for spec in MODELS for name in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))


def test_deepseek_v4_flash_has_its_published_size():
    spec = find_model("v4-flash")
    weights = spec.num_moe_layers * spec.num_experts * spec.expert_params
    assert weights == 43 * 256 * 3 * 4096 * 2048
    assert spec.routed_expert_bytes == pytest.approx(147.2e9, rel=1e-3)
    assert spec.expert_bytes == 3 * 4096 * 2048 * 17 // 32
    assert spec.token_bytes == 43 * 6 * spec.expert_bytes


def test_every_model_has_a_size():
    for spec in MODELS:
        assert spec.routed_expert_bytes > 1e9
        assert 0 < spec.top_k <= spec.num_experts


def test_sizes_agree_with_transformers_defaults():
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    spec = find_model("v4-flash")
    config = auto.AutoConfig.for_model("deepseek_v4")
    assert config.hidden_size == spec.hidden_size
    assert config.moe_intermediate_size == spec.moe_intermediate_size
    assert config.num_hidden_layers == spec.num_hidden_layers
    assert config.n_routed_experts == spec.num_experts
    assert config.num_experts_per_tok == spec.top_k
    assert config.swiglu_limit == spec.activation.limit
    gpt_oss, config = find_model("gpt-oss-120b"), auto.AutoConfig.for_model("gpt_oss")
    assert config.hidden_size == gpt_oss.hidden_size
    assert config.num_hidden_layers == gpt_oss.num_hidden_layers
    assert config.num_local_experts == gpt_oss.num_experts
    assert config.swiglu_alpha == gpt_oss.activation.alpha
    assert config.swiglu_limit == gpt_oss.activation.limit


@pytest.mark.parametrize(
    ("name", "model_type", "intermediate", "experts"),
    [
        ("DeepSeek-V3", "deepseek_v3", "moe_intermediate_size", "n_routed_experts"),
        ("GLM-4.5-Air", "glm4_moe", "moe_intermediate_size", "n_routed_experts"),
        ("MiniMax-M2", "minimax_m2", "intermediate_size", "num_local_experts"),
        ("Mixtral-8x7B", "mixtral", "intermediate_size", "num_local_experts"),
        ("Qwen3-Next-80B-A3B-Instruct", "qwen3_next", "moe_intermediate_size", "num_experts"),
    ],
)
def test_all_sizes_are_transformers_defaults(name, model_type, intermediate, experts):
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    spec, config = find_model(name), auto.AutoConfig.for_model(model_type)
    assert spec.model_type == config.model_type
    assert spec.hidden_size == config.hidden_size
    assert spec.moe_intermediate_size == getattr(config, intermediate)
    assert spec.num_hidden_layers == config.num_hidden_layers
    assert spec.num_experts == getattr(config, experts)
    assert spec.top_k == config.num_experts_per_tok
    assert spec.first_moe_layer == getattr(config, "first_k_dense_replace", 0)
    assert spec.extra["vocab_size"] == config.vocab_size
