"""``attn_implementation="cpumoe"``: attention of transformers' models, masks, and the KV cache."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import families
from tiny_models import FAMILIES
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    sliding_window_causal_mask_function,
)
from transformers.models.mixtral import modeling_mixtral

import cpumoe
from cpumoe.integrations.transformers import ExpertsOptions, from_pretrained
from cpumoe.integrations.transformers.attention import swap_attention
from cpumoe.integrations.transformers.kv_cache import (
    CACHE,
    GrowingLayer,
    GrowingWindowLayer,
    growing_cache,
)
from cpumoe.integrations.transformers.plain_mask import PlainMask, plain_or_whole_mask
from cpumoe.integrations.transformers.prompt_reading import read_prompt

PROMPT = torch.arange(3, 43)[None]  # longer than the windows of the tiny models
OPTIONS = ExpertsOptions()


def logits(model, ids=PROMPT, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def mixtral(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "max_position_embeddings": 512,
        "sliding_window": None,
        "attn_implementation": "eager",
    }
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **changes})).eval()


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", ["deepseek_v3", "flint", "gpt_oss", "qwen3_moe", "phimoe"])
def test_logits_and_tokens_are_the_hosts(family):
    model = families.tiny_model(family).eval()
    prompts = torch.cat((PROMPT, PROMPT.flip(1)))
    seen = torch.ones_like(prompts)
    seen[0, :7] = 0
    padded = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    choice = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = logits(model), logits(model, prompts, **padded)[seen.bool()]
    tokens = model.generate(prompts, attention_mask=seen, **choice)
    done = swap_attention(model, OPTIONS)
    assert len(done.ours) == len([n for n, _ in model.named_modules() if n.endswith("self_attn")])
    assert not done.hosts
    assert relative(logits(model), expected[0]) < 1e-5
    assert relative(logits(model, prompts, **padded)[seen.bool()], expected[1]) < 1e-5
    for cache in (None, growing_cache(model)):
        written = model.generate(prompts, attention_mask=seen, **{CACHE: cache}, **choice)
        assert torch.equal(written, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_gives_attention_to_cpumoe_on_request(family, tmp_path):
    FAMILIES[family].write(tmp_path)
    loaded = {
        attention: from_pretrained(
            tmp_path,
            options=ExpertsOptions(attention=attention, progress=False),
            dtype=torch.float32,
        )
        for attention in ("host", "native")
    }
    assert not loaded["host"].hf_quantizer.attention_modules.ours
    assert loaded["native"].hf_quantizer.attention_modules.ours
    assert relative(logits(loaded["native"]), logits(loaded["host"])) < 1e-5


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ValueError, match=r"^attention: expected host or native, got 'sdpa'"):
        ExpertsOptions(attention="sdpa")


def scaled(compute, module, q, k, v, mask, **settings):
    settings["scaling"] *= 1.01
    return compute(module, q, k, v, mask, **settings)


def shifted(compute, module, q, k, v, mask, **settings):
    return compute(module, q, k, v, mask + torch.arange(k.shape[2]) * 0.01, **settings)


def unmasked(compute, module, q, k, v, mask, **settings):
    return compute(module, q, k, v, torch.zeros_like(mask), **settings)


def other_groups(compute, module, q, k, v, mask, **settings):
    return compute(module, q, k.flip(1), v.flip(1), mask, **settings)


def louder(compute, module, q, k, v, mask, **settings):
    return 1.01 * compute(module, q, k, v, mask, **settings)[0], None


def normed(compute, module, q, k, v, mask, **settings):
    return compute(module, torch.nn.functional.normalize(q), k, v, mask, **settings)


def biased(compute, module, q, k, v, mask, **settings):
    return compute(module, q, k, v + 0.01, mask, **settings)


def broken(compute, module, q, k, v, mask, **settings):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    "change", [scaled, shifted, unmasked, other_groups, louder, normed, biased]
)
def test_attention_that_computes_something_else_stays_the_hosts(change, monkeypatch):
    original = modeling_mixtral.eager_attention_forward

    def changed(module, q, k, v, mask, **settings):
        return change(original, module, q, k, v, mask, **settings)

    monkeypatch.setattr(modeling_mixtral, "eager_attention_forward", changed)
    model = mixtral()
    expected = logits(model)
    done = swap_attention(model, OPTIONS)
    assert not done.ours
    assert set(done.hosts.values()) == {"its attention computes something else"}
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model), expected)


def test_a_model_that_cannot_be_tried_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(modeling_mixtral, "eager_attention_forward", broken)
    model = mixtral()
    done = swap_attention(model, OPTIONS)
    assert list(done.hosts) == ["model"]
    assert model.config._attn_implementation == "eager"


def test_arguments_that_may_change_attention_keep_the_host(monkeypatch):
    model = mixtral()
    forward = modeling_mixtral.MixtralAttention.forward
    monkeypatch.setattr(
        modeling_mixtral.MixtralAttention,
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs, indices=torch.ones(1)),
    )
    assert swap_attention(model, OPTIONS).hosts == {"model": "it takes indices"}
    model.set_attn_implementation("cpumoe")
    with pytest.raises(ValueError, match=r"^MixtralAttention: expected arguments .* it takes ind"):
        logits(model)


def test_a_model_that_asks_for_its_attention_stays_the_hosts():
    model = families.tiny_model("deepseek_v32").eval()
    assert swap_attention(model, OPTIONS).hosts == {"model": "it asks which attention it has"}


def test_what_cpumoe_does_not_compute_is_the_hosts():
    model = mixtral()
    expected = logits(model, output_attentions=True)
    weights = model(input_ids=PROMPT, output_attentions=True).attentions
    model.zero_grad()
    model(input_ids=PROMPT).logits.sum().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    swap_attention(model, OPTIONS)
    assert torch.equal(logits(model, output_attentions=True), expected)
    outputs = model(input_ids=PROMPT, output_attentions=True)
    assert torch.equal(outputs.attentions[1], weights[1])
    model.zero_grad()
    model(input_ids=PROMPT).logits.sum().backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, gradient)


def test_gradients_of_sinks_are_the_hosts():
    model = families.tiny_model("gpt_oss").eval().requires_grad_(False)
    sinks = model.model.layers[0].self_attn.sinks.requires_grad_()
    model(input_ids=PROMPT).logits.sum().backward()
    gradient, sinks.grad = sinks.grad, None
    assert swap_attention(model, OPTIONS).ours
    model(input_ids=PROMPT).logits.sum().backward()
    torch.testing.assert_close(sinks.grad, gradient)


def test_gradients_of_a_mask_are_the_hosts():
    model = mixtral().requires_grad_(False)
    mask = torch.randn(1, 1, PROMPT.shape[1], PROMPT.shape[1]).requires_grad_()
    model(input_ids=PROMPT, attention_mask=mask).logits.sum().backward()
    gradient, mask.grad = mask.grad, None
    swap_attention(model, OPTIONS)
    model(input_ids=PROMPT, attention_mask=mask).logits.sum().backward()
    torch.testing.assert_close(mask.grad, gradient)


def test_compiled_attention_is_the_hosts():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="eager")).eval()
    expected = logits(model, use_cache=False)
    assert swap_attention(model, OPTIONS).ours
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(logits(compiled, use_cache=False), expected) < 1e-5


def test_packed_sequences_do_not_see_each_other():
    model = mixtral()
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    expected = logits(model, position_ids=positions, use_cache=False)
    swap_attention(model, OPTIONS)
    assert relative(logits(model, position_ids=positions, use_cache=False), expected) < 1e-5


def test_options_choose_threads_and_variant():
    runtime = cpumoe.Runtime(threads=1)
    model = mixtral()
    assert swap_attention(model, ExpertsOptions(runtime=runtime, isa="generic")).ours
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        logits(model)


MASKS = [
    (causal_mask_function, None, 5, 5, 0, 0),
    (causal_mask_function, None, 1, 9, 8, 0),
    (causal_mask_function, None, 4, 9, 5, 0),
    (sliding_window_causal_mask_function(4), 4, 12, 12, 0, 0),
    (sliding_window_causal_mask_function(4), 4, 3, 6, 10, 7),
    (sliding_window_causal_mask_function(40), 40, 12, 12, 0, 0),
]


@pytest.mark.parametrize(("function", "size", "q", "kv", "q_offset", "kv_offset"), MASKS)
def test_plain_masks_become_whole_where_they_are_used(function, size, q, kv, q_offset, kv_offset):
    arguments = {
        "batch_size": 2,
        "q_length": q,
        "kv_length": kv,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "dtype": torch.bfloat16,
    }
    mask = plain_or_whole_mask(**arguments, local_size=size)
    expected = eager_mask(**arguments)
    assert isinstance(mask, PlainMask)
    assert mask.window == (size or 0)
    assert (mask.shape, mask.dtype, mask.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    assert mask._whole is None
    assert torch.equal(mask[:, :, 1:], expected[:, :, 1:])
    assert torch.equal(torch.cat((expected, mask), 3), torch.cat((expected, expected), 3))
    assert type(mask + 1) is torch.Tensor


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_function": chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))},
        {"mask_function": lambda b, h, q, k: (k <= q) & (k != 3), "local_size": None},
        {"attention_mask": torch.arange(12)[None] > 1},
        {"allow_is_causal_skip": False},
        {"use_vmap": True},
        {"q_offset": 1},
        {"q_offset": torch.tensor(0)},
        {"device": torch.device("meta")},
    ],
)
def test_other_masks_are_whole(changes):
    window = sliding_window_causal_mask_function(4)
    arguments = {
        "batch_size": 1,
        "q_length": 12,
        "kv_length": 12,
        "mask_function": window,
        "local_size": 4,
        **changes,
    }
    mask = plain_or_whole_mask(**arguments)
    assert type(mask) is torch.Tensor
    if not mask.is_meta:
        assert torch.equal(mask, eager_mask(**arguments))


def states(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, 4, generator=rng), torch.randn(2, 3, tokens, 5, generator=rng)


@pytest.mark.parametrize(
    ("ours", "hosts"),
    [
        (GrowingLayer, DynamicLayer),
        (lambda: GrowingWindowLayer(20), lambda: DynamicSlidingWindowLayer(20)),
        (lambda: GrowingWindowLayer(2), lambda: DynamicSlidingWindowLayer(2)),
    ],
)
def test_the_cache_holds_what_the_hosts_holds(ours, hosts):
    mine, theirs = ours(), hosts()
    rooms = set()
    for i, tokens in enumerate([1, 30, *[1] * 300, 600, *[1] * 50]):
        for actual, expected in zip(
            mine.update(*states(tokens, i)), theirs.update(*states(tokens, i)), strict=True
        ):
            assert torch.equal(actual, expected)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        rooms.add(mine.keys.untyped_storage().data_ptr())
        if i == 100:
            for layer in (mine, theirs):
                layer.reorder_cache(torch.tensor([1, 0]))
    assert len(rooms) < 20


def test_a_cropped_cache_goes_on():
    mine, theirs = GrowingLayer(), DynamicLayer()
    for layer in (mine, theirs):
        layer.update(*states(50))
        layer.crop(-8)
    for actual, expected in zip(mine.update(*states(3)), theirs.update(*states(3)), strict=True):
        assert torch.equal(actual, expected)
    mine.reset()
    assert torch.equal(mine.update(*states(2))[0], states(2)[0])


def test_a_cache_of_inference_mode_serves_other_modes():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(5))
    keys, _ = layer.update(*states(1))
    assert keys.shape[2] == 6
    keys, _ = layer.update(*(state.requires_grad_() for state in states(1)))
    assert keys.requires_grad


def test_models_get_a_growing_cache():
    kinds = [type(layer) for layer in growing_cache(families.tiny_model("gpt_oss")).layers]
    assert set(kinds) == {GrowingLayer, GrowingWindowLayer}
    assert isinstance(growing_cache(mixtral()), DynamicCache)


class Largest(TorchDispatchMode):
    """Notes the most bytes that a new tensor takes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_a_prompt_of_32k_tokens_takes_no_quadratic_memory():
    tokens = 32 << 10
    model = mixtral(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2 * tokens,
    )
    assert swap_attention(model, OPTIONS).ours
    with torch.inference_mode(), Largest() as largest:
        cache = read_prompt(model, [5] * (tokens + 1))
    assert cache.get_seq_length() == tokens
    assert 0 < largest.nbytes < 256 * tokens  # a mask alone would take 2048 bytes per key
