"""Dense layers of a transformers model, computed by cpumoe with `ExpertsOptions(dense=...)`."""

import pytest
import tiny_models
import torch
from dense_tools import our_layers
from torch import nn
from transformers import AutoModelForCausalLM

import cpumoe
from cpumoe.integrations.transformers import (
    CpuExperts,
    ExpertsOptions,
    LanguageModel,
    dense,
    disable,
    enable,
    from_pretrained,
)
from cpumoe.integrations.transformers.loading import from_pretrained_by_host
from cpumoe.text.generation import Sampling

TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _tiny_layers_count(monkeypatch):
    monkeypatch.setattr(dense, "_LEAST_BYTES", 0)


@pytest.fixture(scope="module", params=list(tiny_models.FAMILIES))
def folder(request, tmp_path_factory):
    return tiny_models.FAMILIES[request.param].write(tmp_path_factory.mktemp(request.param))


def load(folder, chosen="native", dtype=torch.float32):
    return from_pretrained(folder, options=ExpertsOptions(dense=chosen), dtype=dtype)


def linears(model):
    return {*our_layers(model)}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def test_fp32_logits_and_tokens_are_the_hosts(folder):
    model, host = load(folder), from_pretrained_by_host(folder, dtype=torch.float32)
    done = model.hf_quantizer.dense_layers
    assert linears(model) == set(done.ours)
    assert "lm_head" in done.ours
    grouped = {n for n, m in host.named_modules() if type(m).__name__ == "DeepseekV4GroupedLinear"}
    assert grouped <= linears(model)
    assert any("self_attn" in name for name in done.ours)
    assert relative_error(logits(model), logits(host)) < 1e-5
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **settings), host.generate(TOKENS, **settings))


def test_bf16_logits_are_as_near_to_fp32s_as_the_hosts(folder):
    exact = logits(from_pretrained_by_host(folder, dtype=torch.float32))
    own = relative_error(logits(load(folder, dtype=torch.bfloat16)), exact)
    hosts = relative_error(logits(load(folder, "host", torch.bfloat16)), exact)
    assert own < 1.5 * hosts + 1e-3


def test_every_layer_is_ours_or_has_a_reason(folder):
    model = load(folder)
    done = model.hf_quantizer.dense_layers
    rest = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(done.hosts) == rest
    assert not set(done.ours) & rest
    assert not any(isinstance(m, dense._Watched) for m in model.modules())
    for name in done.ours:
        assert not list(model.get_submodule(name).parameters())


def test_weights_are_rounded_to_a_format_on_request(tmp_path):
    folder = tiny_models.gpt_oss(tmp_path)
    exact = load(folder)
    rounded = load(folder, "fp8")
    assert {m.format for m in rounded.modules() if isinstance(m, cpumoe.Linear)} == {"fp8"}
    assert 1e-4 < relative_error(logits(rounded), logits(exact)) < 0.6


def test_the_host_computes_few_dense_layers_by_default(tmp_path, monkeypatch):
    folder = tiny_models.gpt_oss(tmp_path)
    done = from_pretrained(folder).hf_quantizer.dense_layers
    assert not done.ours
    assert not done.hosts
    monkeypatch.setattr(dense, "_LEAST_TOTAL", 0)
    assert linears(from_pretrained(folder))
    assert not linears(load(folder, "host"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not linears(from_pretrained(folder))
    assert linears(load(folder))


def test_the_trial_counts_no_calls_of_experts(tmp_path):
    model = load(tiny_models.gpt_oss(tmp_path))
    modules = [module for module in model.modules() if isinstance(module, CpuExperts)]
    assert linears(model)
    assert [module.spent.calls for module in modules] == [0] * tiny_models.LAYERS
    logits(model)
    assert [module.spent.calls for module in modules] == [1] * tiny_models.LAYERS


def test_nobody_is_warned_who_asked_for_nothing(tmp_path, monkeypatch, recwarn):
    folder = tiny_models.gpt_oss(tmp_path)
    monkeypatch.setattr(dense, "_LEAST_TOTAL", 0)
    monkeypatch.setattr(dense, "let_model_write", lambda model: 1 / 0)
    done = from_pretrained(folder).hf_quantizer.dense_layers
    assert not done.ours
    assert done.untried == "the model cannot be tried: division by zero"
    assert not [each for each in recwarn if "dense" in str(each.message)]


def test_a_language_model_generates_with_them(tmp_path):
    folder = tiny_models.gpt_oss(tmp_path)
    tiny_models.byte_tokenizer(folder)
    options = ExpertsOptions(dense="native")
    model = LanguageModel.from_pretrained(folder, options=options, dtype=torch.float32)
    host = LanguageModel.from_pretrained(folder, dtype=torch.float32)
    assert linears(model.model)
    results = [m.generate(m.encode("In the"), Sampling(8, 0.0)) for m in (model, host)]
    assert results[0].text == results[1].text


class Model(nn.Module):
    """Reads tokens as the models of transformers do, with one layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 64)
        self.plain = nn.Linear(64, 64)
        self.looked_at = nn.Linear(64, 64)
        self.hooked = nn.Linear(64, 64)
        self.hooked.register_forward_hook(lambda *_: None)
        self.narrow = nn.Linear(64, 40)
        self.after_narrow = nn.Linear(40, 64)
        self.derived = Derived(64, 64)
        self.unreached = nn.Linear(64, 64)
        self.twice = self.also_twice = nn.Linear(64, 64)
        self.tied = nn.Linear(64, 8, bias=False)
        self.tied.weight = self.embedding.weight
        self.bfloat16().requires_grad_(False)

    def forward(self, input_ids, use_cache=False, past_key_values=None):
        x = self.plain(self.embedding(input_ids))
        x = self.also_twice(self.twice(self.hooked(x))) + nn.functional.linear(
            x, self.looked_at.weight
        )
        return self.tied(self.derived(self.after_narrow(self.narrow(x))))


class Derived(nn.Linear):
    pass


def test_a_layer_that_is_more_than_its_product_stays_the_hosts():
    model = Model()
    model.embedding.eval()
    ids = torch.arange(5)[None]
    expected = model(ids)
    done = dense.swap_dense(model, ExpertsOptions(dense="native", progress=False))
    assert done.ours == ["tied", "plain", "narrow", "after_narrow"]
    assert done.hosts == {
        "hooked": "it has hooks",
        "derived": "it is a Derived",
        "looked_at": "the model looks at its weights",
        "unreached": "the tokens of a trial do not reach it",
        "twice": "it has a bias and shares its weights with another module",
        "also_twice": "it has a bias and shares its weights with another module",
    }
    assert relative_error(model(ids), expected) < 2e-2
    assert model.training
    assert not model.embedding.training


def test_a_layer_whose_rows_a_format_cannot_have_stays_the_hosts():
    odd = nn.Linear(33, 64).bfloat16().requires_grad_(False)
    assert not dense._obstacle(odd, dense._users(odd))
    assert dense._unheld(odd, "mxfp4") == "mxfp4 has no rows of 33 weights"
    assert not dense._unheld(odd, "fp8")
    assert not dense._unheld(odd, "native")


def test_a_model_that_cannot_be_tried_stays_as_it_is():
    model = nn.Sequential(nn.Linear(64, 64).bfloat16())
    with pytest.warns(
        RuntimeWarning, match="^dense layers stay transformers': the model cannot be"
    ):
        done = dense.swap_dense(model, ExpertsOptions(dense="native", progress=False))
    assert not done.ours
    assert done.hosts["0"].startswith("the model cannot be tried: ")
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:dense layers stay")
def test_small_and_inexact_layers_stay_the_hosts(monkeypatch):
    monkeypatch.setattr(dense, "_LEAST_BYTES", 64 << 10)
    model = Model()
    model.plain = nn.Linear(256, 256).bfloat16()
    done = dense.swap_dense(model, ExpertsOptions(dense="native", progress=False))
    assert done.hosts["narrow"] == "its weights have only 5120 bytes"
    model = Model().float()
    model.plain.weight.normal_()
    monkeypatch.setattr(dense, "_LEAST_BYTES", 0)
    done = dense.swap_dense(model, ExpertsOptions(dense="native", progress=False))
    assert done.hosts["plain"] == "no format holds its float32 weights exactly"
    assert done.ours == ["tied", "narrow", "after_narrow"]


def test_another_choice_is_refused():
    with pytest.raises(
        ValueError, match=r"^dense: expected host, native or a weight format \(mxfp4"
    ):
        ExpertsOptions(dense="q8")


def test_enable_applies_to_models_with_experts_alone(tmp_path, monkeypatch):
    with_experts = tiny_models.gpt_oss(tmp_path / "gpt_oss")
    without = tmp_path / "qwen2"
    tiny_models.without_experts(without)
    monkeypatch.setattr(dense, "_LEAST_TOTAL", 0)
    try:
        enable()
        assert not linears(AutoModelForCausalLM.from_pretrained(with_experts, dtype=torch.bfloat16))
        enable(ExpertsOptions(dense="native"))
        assert linears(AutoModelForCausalLM.from_pretrained(with_experts, dtype=torch.bfloat16))
        assert not linears(AutoModelForCausalLM.from_pretrained(without, dtype=torch.bfloat16))
    finally:
        disable()


def test_options_for_a_layer_are_options_for_a_model(tmp_path):
    folder = tiny_models.gpt_oss(tmp_path)
    tiny_models.byte_tokenizer(folder)
    options = cpumoe.ExpertsOptions(isa="generic", batch_invariant=True)
    model = LanguageModel.from_pretrained(folder, options=options).model
    for each in (model, from_pretrained(folder, options=options)):
        experts = next(m.experts for m in each.modules() if isinstance(m, CpuExperts))
        assert experts.isa == "generic"
    with pytest.raises(TypeError, match=r"^options: expected ExpertsOptions, got dict$"):
        from_pretrained(folder, options={})
    with pytest.raises(TypeError, match=r"^options: expected ExpertsOptions, got str$"):
        enable("native")


def test_a_packed_head_cannot_be_resized(tmp_path):
    model = load(tiny_models.gpt_oss(tmp_path))
    with pytest.raises(ValueError, match=r"^resize_token_embeddings: the model's head is packed"):
        model.resize_token_embeddings(300)
    assert model.get_input_embeddings().num_embeddings == tiny_models.VOCABULARY


def test_weights_that_are_not_finite_are_named_so():
    model = Model().float()
    with torch.no_grad():
        model.plain.weight[3, 5] = float("nan")
    done = dense.swap_dense(model, ExpertsOptions(dense="native", progress=False))
    assert done.hosts["plain"] == "a weight is NaN or infinite"
