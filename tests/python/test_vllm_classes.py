"""Whether an installed vLLM still has what cpumoe's plugin uses, and what the stand-ins imitate.

`bash tests/hosts/vllm.sh` runs this test with vLLM.
"""

import dataclasses
import importlib
import inspect

import pytest
import vllm_tools

pytest.importorskip("vllm", reason="vLLM is not installed; tests/hosts/vllm.sh installs it")

LAYERS = "vllm.model_executor.layers"


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def configs():
    return importlib.import_module("cpumoe.integrations.vllm.configs")


def test_version():
    plugin = importlib.import_module("cpumoe.integrations.vllm")
    assert plugin.why_not("") is None


def test_configurations(configs):
    quantization = importlib.import_module(f"{LAYERS}.quantization")
    before = {name: quantization.get_quantization_config(name) for name in configs.CONFIGS}
    configs.register()
    for name, made in configs.CONFIGS.items():
        assert quantization.get_quantization_config(name) is made
        assert issubclass(made, before[name].__mro__[-3])
        assert parameters(made.get_quant_method) == ["self", "layer", "prefix"]
    fp8 = inspect.getsource(importlib.import_module(f"{LAYERS}.quantization.fp8"))
    for name in ("ignored_layers_match_mode", "store_dtype", "is_checkpoint_fp8_serialized"):
        assert f"self.{name}" in fp8
    compressed = configs.CONFIGS["compressed-tensors"]
    assert callable(compressed.get_scheme_dict)
    assert callable(compressed._add_fused_moe_to_target_scheme_map)
    assert callable(configs.CONFIGS["modelopt_fp4"].is_layer_excluded)
    assert isinstance(inspect.getattr_static(configs._DeepseekV4Base, "expert_dtype"), property)
    assert isinstance(inspect.getattr_static(configs._DeepseekV4Base, "moe_quant_algo"), property)


def test_methods(configs):
    base = importlib.import_module(f"{LAYERS}.fused_moe.fused_moe_method_base").FusedMoEMethodBase
    ours = configs.CpumoeExpertsMethod
    for name in ("apply", "create_weights", "maybe_roundup_sizes", "get_fused_moe_quant_config"):
        assert parameters(getattr(ours, name)) == parameters(getattr(base, name))
    decided = configs.decision.Decision(configs.stored.mxfp4(), None, None)
    assert not ours(None, decided).is_monolithic


def test_experts_that_are_not_quantized(configs):
    configs.register()
    made = importlib.import_module(f"{LAYERS}.fused_moe.unquantized_fused_moe_method")
    ours = configs.unquantized.UnquantizedCpumoeExpertsMethod
    custom_op = importlib.import_module("vllm.model_executor.custom_op")
    assert custom_op.op_registry_oot[made.UnquantizedFusedMoEMethod.__name__] is ours
    assert issubclass(made.UnquantizedFusedMoEMethod, custom_op.CustomOp)
    assert parameters(made.UnquantizedFusedMoEMethod.__init__) == parameters(ours.__init__)
    create = made.UnquantizedFusedMoEMethod.create_weights
    assert parameters(create) == parameters(ours.create_weights)


def test_layers():
    experts = importlib.import_module(f"{LAYERS}.fused_moe").RoutedExperts
    fake = vllm_tools.RoutedExperts
    assert parameters(experts.weight_loader) == parameters(fake.weight_loader)
    source = inspect.getsource(experts)
    for name in ("layer_name", "moe_config", "activation", "quant_method", "local_num_experts"):
        assert f"self.{name}" in source
    assert "apply_router_weight_on_input" in parameters(experts.__init__)
    assert isinstance(experts.expert_map, property)
    assert callable(experts._map_global_expert_id_to_local_expert_id)


def test_settings_of_layers():
    config = importlib.import_module(f"{LAYERS}.fused_moe.config")
    known = {field.name for field in dataclasses.fields(config.FusedMoEConfig)}
    used = ("hidden_dim", "intermediate_size_per_partition", "has_bias", "is_lora_enabled")
    more = ("activation", "in_dtype", "swiglu_limit", "swiglu_alpha", "swiglu_beta")
    assert {*used, *more, "moe_parallel_config"} <= known
    parallel = {field.name for field in dataclasses.fields(config.FusedMoEParallelConfig)}
    assert {"tp_size", "enable_eplb"} <= parallel


def test_words():
    layer = importlib.import_module(f"{LAYERS}.fused_moe.routed_experts")
    words = {word.value for word in layer.FusedMoeWeightScaleSupported}
    assert {"group", "block", "channel", "tensor"} <= words
    activation = importlib.import_module(f"{LAYERS}.fused_moe.activation").MoEActivation
    assert {each.name for each in vllm_tools.MoEActivation} <= {each.name for each in activation}
