"""Models with cpumoe's experts, compared with transformers' dequantized experts."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import tiny_models
import torch
from checkpoint_tools import edit_config, edit_tensors, split_into_shards
from moe_tools import IN_FULL_RUNS, PEAK_MEMORY, output_with_torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
)
from transformers.quantizers import quantizer_mxfp4

import cpumoe
from cpumoe.checkpoint import CheckpointError
from cpumoe.integrations.transformers import (
    CpuExperts,
    ExpertsOptions,
    LanguageModel,
    disable,
    enable,
    from_pretrained,
    use_fp32_routers,
)
from cpumoe.integrations.transformers.host_files import check_path
from cpumoe.integrations.transformers.loading import from_pretrained_by_host

TOKENS = torch.randint(3, 128, (4, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=list(tiny_models.FAMILIES))
def family(request, tmp_path_factory):
    return request.param, write(request.param, tmp_path_factory.mktemp(request.param))


def write(family, folder):
    if family == "kimi":  # transformers does not know the type under its own name
        return tiny_models.kimi(folder, model_type="deepseek_v3")
    return tiny_models.FAMILIES[family].write(folder)


def host(family, folder, dtype):
    """The model as transformers computes it, all weights dense."""
    extra = {}
    if family == "kimi":
        extra["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **extra)
    use_fp32_routers(model)
    # To bf16 there is nothing to do, and `to` would round the rotary frequencies.
    return model.float() if dtype == torch.float32 else model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def greedy(model):
    never = torch.tensor([-1])  # 32 tokens, whatever their values
    return model.generate(TOKENS[:1], max_new_tokens=32, do_sample=False, eos_token_id=never)


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def typical_distance(actual, expected):
    """Median over tokens. Rounding sends a few to other experts, which answer differently."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, CpuExperts)]


@pytest.mark.parametrize("isa", cpumoe.supported_isas())
def test_fp32_logits_and_greedy_tokens_are_the_hosts(family, isa):
    expected = host(*family, torch.float32)
    actual = from_pretrained(family[1], dtype=torch.float32, options=ExpertsOptions(isa=isa))
    assert len(experts_of(actual)) >= 2
    assert all(module.experts.isa == isa for module in experts_of(actual))
    assert distance(logits(actual), logits(expected)) < 1e-5
    assert torch.equal(greedy(actual), greedy(expected))


@pytest.mark.parametrize("isa", cpumoe.supported_isas())
def test_bf16_logits_are_as_near_to_fp32s_as_the_hosts(family, isa):
    truth = logits(host(*family, torch.float32))
    hosts = typical_distance(logits(host(*family, torch.bfloat16)).float(), truth)
    model = from_pretrained(family[1], options=ExpertsOptions(isa=isa))
    assert model.dtype == torch.bfloat16
    assert typical_distance(logits(model).float(), truth) < 1.25 * hosts < 0.1


def test_int8_is_an_option(family):
    # Not every variant rounds many tokens to int8; generic does.
    options = [ExpertsOptions(precision=precision, isa="generic") for precision in ("bf16", "int8")]
    exact = logits(from_pretrained(family[1], dtype=torch.float32, options=options[0]))
    model = from_pretrained(family[1], dtype=torch.float32, options=options[1])
    assert all(module.experts.precision == "int8" for module in experts_of(model))
    assert 1e-4 < typical_distance(logits(model), exact) < 0.1


def test_activation_is_the_modules(family):
    model = from_pretrained(family[1])
    expected = tiny_models.FAMILIES[family[0]].activation
    assert {module.experts.activation for module in experts_of(model)} == {expected}


def test_experts_have_no_parameters(family):
    model = from_pretrained(family[1])
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    assert not any(p.is_meta for p in model.parameters())


def test_enable_reaches_the_hosts_own_loader(family):
    runtime = cpumoe.Runtime(1)
    enable(ExpertsOptions(runtime=runtime))
    try:
        ours = AutoModelForCausalLM.from_pretrained(family[1])
    finally:
        disable()
    assert all(module.experts.runtime is runtime for module in experts_of(ours))
    assert torch.equal(logits(ours), logits(from_pretrained(family[1])))
    assert experts_of(AutoModelForCausalLM.from_pretrained(family[1])) == []


def test_enable_leaves_other_models_alone(tmp_path):
    weights = tiny_models.without_experts(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    enable()
    try:
        actual = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        disable()
    for name in weights:
        assert torch.equal(actual.get_parameter(name), expected.get_parameter(name))


def test_kimi_loads_under_its_own_name(tmp_path):
    model = from_pretrained(tiny_models.kimi(tmp_path))
    assert model.config.model_type == "kimi_k2"
    assert len(experts_of(model)) == tiny_models.LAYERS - 1  # the first is dense
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_host_computes_the_same_from_its_own_dense_experts(family, tmp_path):
    folder = tiny_models.FAMILIES[family].write(tmp_path)  # each with its own model type
    theirs = from_pretrained_by_host(folder, dtype=torch.float32)
    assert experts_of(theirs) == []
    ours = from_pretrained(folder, dtype=torch.float32, options=ExpertsOptions())
    assert distance(logits(ours), logits(theirs)) < 1e-5


def test_the_hosts_bf16_model_keeps_what_it_has_in_fp32(tmp_path):
    folder = tiny_models.gpt_oss(tmp_path)
    expected = from_pretrained(folder).model.rotary_emb.inv_freq
    actual = from_pretrained_by_host(folder).model.rotary_emb.inv_freq
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_models_without_a_head(tmp_path):
    folder = tiny_models.kimi(tmp_path)
    with torch.no_grad():
        expected = from_pretrained(folder).model(TOKENS).last_hidden_state
        actual = from_pretrained(folder, model_class=AutoModel)(TOKENS).last_hidden_state
    assert torch.equal(actual, expected)


def test_a_config_may_be_given_and_stays_as_it_is(family):
    config = AutoConfig.from_pretrained(family[1])
    before = config.to_dict()
    first, second = (logits(from_pretrained(family[1], config=config)) for _ in range(2))
    assert config.to_dict() == before
    assert torch.equal(first, second)


def test_loading_may_be_reported_on(tmp_path):
    folder = tiny_models.gpt_oss(tmp_path)
    model, report = from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert model.dtype == torch.float32
    assert not report["missing_keys"]


def test_the_checkpoint_may_be_a_folder_of_many_files(family, tmp_path):
    split_into_shards(family[1], tmp_path, 3)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(from_pretrained(family[1])))


def test_revisions_and_tokens_reach_the_config_too(family, monkeypatch):
    seen = {}
    load = AutoConfig.from_pretrained

    def note(path, **kwargs):
        seen.update(kwargs)
        return load(path, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", note)
    origin = {"revision": "abc", "local_files_only": True}
    from_pretrained(family[1], low_cpu_mem_usage=True, **origin)
    assert seen == origin


@pytest.mark.parametrize("fp32", [True, False])
def test_deepseek_v4_routers_are_fp32_unless_told_otherwise(tmp_path, fp32):
    folder = tiny_models.deepseek_v4(tmp_path)
    model = from_pretrained(folder, options=ExpertsOptions(fp32_router=fp32))
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.dtype == (torch.float32 if fp32 else torch.bfloat16)
        _, weights, _ = layer.mlp.gate(*router_arguments(layer.mlp))
        assert weights.dtype == (torch.float32 if fp32 else torch.bfloat16)


def router_arguments(block):
    x = torch.ones(1, 2, tiny_models.HIDDEN, dtype=torch.bfloat16)
    return (x, torch.tensor([[3, 4]])) if block.is_hash else (x,)


def test_loading_again_gives_the_same(family):
    first, second = (logits(from_pretrained(family[1])) for _ in range(2))
    assert torch.equal(first, second)


def test_saving_is_refused(family, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        from_pretrained(family[1]).save_pretrained(tmp_path / "copy")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_training_is_refused(family):
    model = from_pretrained(family[1]).train()
    with pytest.raises(RuntimeError, match=r"cannot train; call model\.eval"):
        model(TOKENS)


def test_unsupported_experts_are_refused_before_loading(tmp_path):
    folder = tiny_models.deepseek_v4(tmp_path)
    edit_config(folder, hidden_act="gelu")
    with pytest.raises(cpumoe.UnsupportedFormatError, match=r"'gelu'.*Supported formats: mxfp4"):
        from_pretrained(folder)
    enable()
    try:
        with pytest.raises(cpumoe.UnsupportedFormatError, match="Supported formats"):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        disable()


def test_unquantized_models_are_refused(tmp_path):
    folder = write("kimi", tmp_path)
    edit_config(folder, quantization_config=None)
    with pytest.raises(cpumoe.UnsupportedFormatError):
        from_pretrained(folder)


def test_a_model_without_experts_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64}))
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(cpumoe.CheckpointError, match="not a Mixture-of-Experts model"):
        from_pretrained(tmp_path)


def test_a_class_without_experts_is_refused(tmp_path):
    folder = tiny_models.kimi(tmp_path)
    config = AutoConfig.from_pretrained(folder, first_k_dense_replace=tiny_models.LAYERS)
    with pytest.raises(ValueError, match="KimiK2ForCausalLM: expected an experts module of trans"):
        from_pretrained(folder, config=config)


def test_the_host_does_not_warn_of_what_it_does_not_do(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(quantizer_mxfp4.logger, "warning_once", said.append)
    from_pretrained(tiny_models.gpt_oss(tmp_path))
    assert said == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("load", [from_pretrained, from_pretrained_by_host])
def test_dtype_auto_rounds_nothing(tmp_path, dtype, load):
    folder = tiny_models.kimi(tmp_path)
    name = "model.norm.weight"
    weight = torch.full((tiny_models.HIDDEN,), 1 + 2.0**-7)
    if dtype in ("float16", "float32"):
        weight += 2.0**-10  # more digits than bfloat16 has
    edit_tensors(folder, {name: weight.to(getattr(torch, dtype or "bfloat16"))})
    edit_config(folder, dtype=dtype)
    model = load(folder, dtype="auto")
    assert model.dtype == (torch.bfloat16 if dtype in ("bfloat16", None) else torch.float32)
    assert torch.equal(model.get_parameter(name).float(), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "float16"])
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16 or torch\.float32"):
        from_pretrained(tmp_path, dtype=dtype)


def test_the_old_name_of_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_dtype: this argument is called dtype"):
        from_pretrained(tmp_path, torch_dtype=torch.float32)


@pytest.mark.parametrize("path", ["/no/such/model", "./none", "no such", "../a/b"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"{path}: no such checkpoint folder"):
        from_pretrained(path)


def test_a_mistyped_name_in_a_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^models/typo: no such checkpoint folder; if it"):
        from_pretrained("models/typo")
    check_path("nobody/typo")  # may be on the hub
    check_path("typo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_implementation": "nonsense"}, "attn_implementation"),
        ({"no_such_argument": 3}, "no_such_argument"),
        ({"device_map": "nonsense"}, "device_map"),
    ],
)
@pytest.mark.parametrize("load", [from_pretrained, LanguageModel.from_pretrained])
def test_a_mistake_in_an_argument_is_no_fault_of_the_checkpoint(load, tmp_path, arguments, message):
    folder = tiny_models.gpt_oss(tmp_path)
    tiny_models.byte_tokenizer(folder)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        load(folder, **arguments)
    assert not isinstance(caught.value, CheckpointError)


def test_a_class_that_loads_nothing_is_no_fault_of_the_checkpoint(tmp_path):
    with pytest.raises(AttributeError, match="from_pretrained"):
        from_pretrained(tiny_models.gpt_oss(tmp_path), model_class=int)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(NotADirectoryError, match="expected a checkpoint folder, got a file"):
        from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("options", [{"precision": "int3"}, {"isa": "avx3"}])
def test_mistaken_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match=r"int3|avx3"):
        ExpertsOptions(**options)


@pytest.mark.parametrize("name", ["fp32_router", "progress"])
def test_switches_are_bools(name):
    with pytest.raises(TypeError, match=f"^{name}: expected a bool, got 'no'$"):
        ExpertsOptions(**{name: "no"})


def test_a_forced_variant_is_read_where_experts_name_none(tmp_path):
    script = """
import sys
from cpumoe.integrations.transformers import ExpertsOptions, from_pretrained
from_pretrained(sys.argv[1], options=ExpertsOptions(isa="generic"))
try:
    from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "CPUMOE_ISA": "sse9"}
    folder = str(tiny_models.kimi(tmp_path))
    assert output_with_torch(script, folder, env=environment).startswith("CPUMOE_ISA=sse9: unknown")


def test_damage_is_reported_by_name(tmp_path):
    folder = tiny_models.deepseek_v4(tmp_path)
    edit_tensors(folder, {"layers.3.ffn.experts.0.w2.scale": None})
    with pytest.raises(cpumoe.CheckpointError, match=r"layers\.3\.ffn\.experts\.0\.w2\.scale"):
        from_pretrained(folder)


PEAK_OF_LOADING = """
import json, sys
import torch
from cpumoe.integrations.transformers import CpuExperts, from_pretrained

from_pretrained(sys.argv[1])  # allocates what only the first load needs
with PeakMemory() as peak:
    model = from_pretrained(sys.argv[2])
packed = sum(m.experts.nbytes for m in model.modules() if isinstance(m, CpuExperts))
rest = sum(p.nbytes for p in model.parameters())
print(json.dumps([peak.bytes - peak.before, packed, rest]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_never_allocates_dense_experts(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    tiny_models.deepseek_v4(small)
    tiny_models.deepseek_v4(large, hidden=512, inner=512, experts=32)
    script = PEAK_MEMORY + PEAK_OF_LOADING
    peak, packed, rest = json.loads(output_with_torch(script, str(small), str(large)))
    dense = packed * 16 / 4.25
    assert packed > 60e6
    assert peak < 1.1 * packed + 2 * rest + 16e6 < 0.6 * dense


@IN_FULL_RUNS  # test_docs.py runs one of them, in a process that has imported transformers
def test_the_hosts_own_commands_run_with_cpumoe():
    command = [sys.executable, "-m", "cpumoe.integrations.transformers", "version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == metadata.version("transformers")
