"""Recognising activations, the module in a model, and experts in memory."""

import copy
import math

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, NemotronHConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import cpumoe
from cpumoe import _core
from cpumoe.integrations.transformers import CpuExperts, ExpertsOptions, from_pretrained
from cpumoe.integrations.transformers.activation import module_activation
from cpumoe.integrations.transformers.options import loading_with
from cpumoe.integrations.transformers.swap import swap_experts


def experts_module(module_class, **changes):
    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    )
    config.moe_intermediate_size = 96
    config.swiglu_alpha, config.swiglu_limit = 1.702, 7.0
    for name, value in changes.items():
        setattr(config, name, value)
    config._experts_implementation = "eager"
    return module_class(config).eval()


def quantized_in_place(module):
    """Gives the module random weights that MXFP4 has exactly."""
    fmt = cpumoe.weight_format("mxfp4")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            if not name.endswith("bias"):
                rows = values.transpose(1, 2) if module.is_transposed else values
                rows = fmt.dense(fmt.quantized(rows.contiguous()))
                values = rows.transpose(1, 2) if module.is_transposed else rows
            parameter.copy_(values)
    return module


def routing(tokens=5, experts=4):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, 64, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).topk(2).indices
    return x, ids, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize(
    ("module_class", "changes", "expected"),
    [
        (DeepseekV3Experts, {}, cpumoe.SwiGLU()),
        (DeepseekV4Experts, {"swiglu_limit": 10.0}, cpumoe.SwiGLU(limit=10.0)),
        (DeepseekV4Experts, {"swiglu_limit": 3.5}, cpumoe.SwiGLU(limit=3.5)),
        (GptOssExperts, {}, cpumoe.SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)),
        (
            GptOssExperts,
            {"swiglu_alpha": 1.0, "swiglu_limit": 5.0},
            cpumoe.SwiGLU(alpha=1.0, limit=5.0, up_offset=1.0),
        ),
    ],
)
def test_activations_are_recognised_by_what_they_compute(module_class, changes, expected):
    module = experts_module(module_class, **changes)
    assert module_activation(module) == expected
    with torch.device("meta"):  # where transformers builds models
        assert module_activation(experts_module(module_class, **changes)) == expected


def without_gate(**changes):
    config = NemotronHConfig(
        hidden_size=64,
        moe_intermediate_size=96,
        n_routed_experts=4,
        num_experts_per_tok=2,
        **changes,
    )
    config._experts_implementation = "eager"
    module = NemotronHExperts(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(0.1).bfloat16())
    return module


def test_experts_without_a_gate_are_computed_with_up_as_gate():
    module = without_gate()
    assert module_activation(module) == cpumoe.GLU("relu2", gated=False)
    with torch.no_grad():
        expected = module(*routing())
        module.config._experts_implementation = "cpumoe"
        actual = module(*routing())
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_experts_without_a_gate_are_refused_with_another_activation():
    module = without_gate(mlp_hidden_act="tanh")
    module.config._experts_implementation = "cpumoe"
    message = "^NemotronHExperts: experts without a gate projection are supported only with .*relu2"
    with pytest.raises(ValueError, match=message):
        module_activation(module)
    with pytest.raises(ValueError, match=message):
        module(*routing())


def test_an_unknown_activation_is_refused_by_name():
    class OddExperts(DeepseekV3Experts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.tanh(gate) * up

    with pytest.raises(ValueError, match=r"OddExperts\._apply_gate: cpumoe does not have"):
        module_activation(experts_module(OddExperts))


@pytest.mark.parametrize(
    "gate",
    [
        lambda gate, up: torch.nn.functional.silu(gate).clamp(max=10) * up.clamp(-10, 10),
        lambda gate, up: torch.nn.functional.silu(gate.clamp(max=300)) * up,
        lambda gate, up: torch.nn.functional.silu(gate) * up.clamp(-300_000, 300_000),
        lambda gate, up: gate * torch.sigmoid(1.0001 * gate) * up,
    ],
    ids=["limit after silu", "limit far out", "limit very far out", "slightly other alpha"],
)
def test_an_activation_that_is_nearly_known_is_refused(gate):
    class NearExperts(DeepseekV4Experts):
        def _apply_gate(self, gate_up):
            return gate(*gate_up.chunk(2, dim=-1))

    with pytest.raises(ValueError, match=r"NearExperts\._apply_gate"):
        module_activation(experts_module(NearExperts, swiglu_limit=10.0))


@pytest.mark.parametrize(
    ("hidden_act", "function"),
    [
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
    ],
)
def test_functions_of_other_gated_linear_units_are_recognized(hidden_act, function):
    module = experts_module(DeepseekV3Experts, hidden_act=hidden_act)
    assert module_activation(module) == cpumoe.GLU(function)
    limited = experts_module(DeepseekV4Experts, hidden_act=hidden_act, swiglu_limit=10.0)
    assert module_activation(limited) == cpumoe.GLU(function, limit=10.0)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "tanh"])
def test_another_act_fn_is_refused(hidden_act):
    with pytest.raises(ValueError, match=r"DeepseekV3Experts\._apply_gate"):
        module_activation(experts_module(DeepseekV3Experts, hidden_act=hidden_act))


def test_a_limit_beyond_the_usual_ones_is_seen():
    module = experts_module(DeepseekV4Experts, swiglu_limit=100.0)
    assert module_activation(module) == cpumoe.SwiGLU(limit=100.0)


class Block(torch.nn.Module):
    """The smallest model whose experts module has a usual name."""

    def __init__(self, experts):
        super().__init__()
        layers = torch.nn.ModuleList([torch.nn.Module()])
        layers[0].experts = experts
        self.layers = layers


def test_swapping_checks_the_number_of_experts(tmp_path):
    module = experts_module(DeepseekV4Experts, swiglu_limit=10.0)
    with (
        cpumoe.open_checkpoint(tiny_models.deepseek_v4(tmp_path)) as reader,
        pytest.raises(ValueError, match=r"layers\.0\.experts: the model has 4 experts.* 8"),
    ):
        swap_experts(Block(module), reader)


def test_swapping_refuses_a_norm_after_experts(tmp_path):
    module = experts_module(DeepseekV4Experts, swiglu_limit=10.0, num_local_experts=8)
    module.has_post_expert_norm = True
    module.post_expert_norm = torch.nn.RMSNorm(64)
    with (
        cpumoe.open_checkpoint(tiny_models.deepseek_v4(tmp_path)) as reader,
        pytest.raises(
            ValueError, match="experts have a norm of their outputs, the checkpoint's no norm"
        ),
    ):
        swap_experts(Block(module), reader)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_memory_may_have_a_norm_before_they_are_weighted(dtype):
    module = quantized_in_place(experts_module(DeepseekV3Experts)).to(dtype)
    module.has_post_expert_norm = True
    module.post_expert_norm = torch.nn.RMSNorm(64, eps=1e-6, dtype=dtype)
    x, ids, weights = routing()
    ids[2, 0] = 4  # the host's sentinel, which names no expert
    x = x.to(dtype)
    expected = torch.zeros(5, 64)
    for token, slot in ((t, s) for t in range(5) for s in range(2)):
        expert = int(ids[token, slot])
        if expert < 4:
            gate, up = (module.gate_up_proj[expert].float() @ x[token].float()).chunk(2)
            y = module.down_proj[expert].float() @ (torch.nn.functional.silu(gate) * up)
            expected[token] += weights[token, slot] * torch.nn.functional.rms_norm(
                y, (64,), eps=1e-6
            )
    module.config._experts_implementation = "cpumoe"
    with torch.no_grad():
        actual = module(x, ids, weights)
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (actual - expected).norm() < tolerance * expected.norm()


def test_module_without_weights_says_so():
    module = CpuExperts(3, 4, cpumoe.SwiGLU()).eval()
    assert "not packed" in repr(module)
    with pytest.raises(RuntimeError, match="layer 3: the experts have no weights"):
        module(*routing())


def test_module_takes_any_leading_dimensions_and_the_hosts_sentinel(tmp_path):
    model = from_pretrained(tiny_models.deepseek_v4(tmp_path), dtype=torch.float32)
    module = model.model.layers[1].mlp.experts
    x, ids, weights = routing(6, tiny_models.EXPERTS)
    expected = module(x, ids, weights)
    assert torch.equal(module(x.view(2, 3, 64), ids, weights).view(6, 64), expected)
    assert module.spent.calls == 2
    assert module.spent.seconds > 0
    nobody = torch.full_like(ids, tiny_models.EXPERTS)
    assert not module(x, nobody, weights).any()


def test_gradients_through_a_model_are_refused(tmp_path):
    model = from_pretrained(tiny_models.gpt_oss(tmp_path), dtype=torch.float32)
    tokens = torch.arange(3, 9)[None]
    logits = model(tokens).logits
    with pytest.raises(RuntimeError, match=r"layers compute no gradients; call them under torch"):
        logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.model.layers[0].parameters())
    module = model.model.layers[1].mlp.experts
    x, ids, weights = routing(6, tiny_models.EXPERTS)
    expected = module(x, ids, weights)
    for states in (x.requires_grad_(), x.requires_grad_().view(2, 3, 64)):
        result = module(states, ids, weights)
        assert torch.equal(result.view(6, 64), expected)
        with pytest.raises(RuntimeError, match="layers compute no gradients"):
            result.sum().backward()
    with torch.no_grad():
        assert not module(x, ids, weights).requires_grad


def test_gradients_of_experts_in_memory_are_refused():
    module = quantized_in_place(experts_module(DeepseekV3Experts))
    module.config._experts_implementation = "cpumoe"
    result = module(*routing())  # its parameters require gradients
    with pytest.raises(RuntimeError, match="layers compute no gradients"):
        result.sum().backward()
    assert not module.requires_grad_(False)(*routing()).requires_grad


@pytest.mark.parametrize("module_class", [DeepseekV3Experts, DeepseekV4Experts, GptOssExperts])
def test_experts_in_memory(module_class):
    module = quantized_in_place(experts_module(module_class))
    arguments = routing()
    with torch.no_grad():
        expected = module(*arguments)
        module.config._experts_implementation = "cpumoe"
        actual = module(*arguments)
    # The best variant may round activations to bf16; see test_transformers_loading for fp32.
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    assert not torch.equal(actual, expected)


def test_experts_in_memory_follow_changed_weights():
    module = quantized_in_place(experts_module(DeepseekV3Experts))
    module.config._experts_implementation = "cpumoe"
    arguments = routing()
    with torch.no_grad():
        first = module(*arguments)
        module.down_proj.mul_(2)
        torch.testing.assert_close(module(*arguments), 2 * first)


def test_experts_in_memory_may_be_made_in_inference_mode():
    arguments = routing()
    expected = quantized_in_place(experts_module(DeepseekV3Experts))
    expected.config._experts_implementation = "cpumoe"
    with torch.inference_mode():
        module = quantized_in_place(experts_module(DeepseekV3Experts))
        module.config._experts_implementation = "cpumoe"
        assert torch.equal(module(*arguments), expected(*arguments))


def test_weights_in_memory_are_not_rounded():
    module = experts_module(DeepseekV3Experts)
    torch.nn.init.normal_(module.gate_up_proj)
    torch.nn.init.zeros_(module.down_proj)
    module.config._experts_implementation = "cpumoe"
    with pytest.raises(
        cpumoe.UnsupportedFormatError,
        match=r"DeepseekV3Experts: .*exactly mxfp4 or bf16 or fp16, got others",
    ):
        module(*routing())


@pytest.mark.parametrize("format", cpumoe.formats.WEIGHT_FORMATS)
@pytest.mark.parametrize("module_class", [DeepseekV3Experts, GptOssExperts])
def test_weights_in_memory_are_rounded_to_a_format_that_the_options_name(module_class, format):
    module = experts_module(module_class)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(0.2))
    rounded = copy.deepcopy(module)
    fmt = cpumoe.weight_format(format)
    with torch.no_grad():
        for stack in (rounded.gate_up_proj, rounded.down_proj):
            for matrix in stack.mT if module.is_transposed else stack:
                halves = matrix.split(96) if module.is_concatenated else (matrix[::2], matrix[1::2])
                for rows in (matrix,) if stack is rounded.down_proj else halves:
                    rows.copy_(fmt.dense(fmt.quantized(rows.contiguous())))
        expected = rounded(*routing())
        module.config._experts_implementation = "cpumoe"
        with loading_with(ExpertsOptions(weight_format=format)):
            actual = module(*routing())
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("format", "expert"), [(None, ""), ("int4", ": expert 2, down")])
def test_nan_in_memory_is_named(format, expert):
    module = experts_module(DeepseekV3Experts)
    torch.nn.init.zeros_(module.gate_up_proj)
    torch.nn.init.zeros_(module.down_proj).data[2, 1] = math.nan
    module.config._experts_implementation = "cpumoe"
    message = f"^DeepseekV3Experts{expert}: weights must be finite, got NaN or Inf$"
    with (
        loading_with(ExpertsOptions(weight_format=format)),
        pytest.raises(ValueError, match=message),
    ):
        module(*routing())


def test_a_format_to_round_to_must_be_known_and_concerns_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"weight_format: expected mxfp4, .* or None, got 'int3'"):
        ExpertsOptions(weight_format="int3")
    options = ExpertsOptions(weight_format="int4")
    with pytest.raises(ValueError, match=r"weight_format: expected None, because experts that are"):
        from_pretrained(tmp_path, options=options)


@pytest.mark.parametrize("module_class", [DeepseekV3Experts, DeepseekV4Experts, GptOssExperts])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16_weights_in_memory_are_exact(module_class, dtype):
    module = experts_module(module_class)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(0.1).bfloat16())
    x, ids, weights = routing()
    module = module.to(dtype)
    x = x.to(dtype)
    with torch.no_grad():
        exact = module.double()(x.double(), ids, weights.double())
        module = module.to(dtype)
        module.config._experts_implementation = "cpumoe"
        actual = module(x, ids, weights)
    assert actual.dtype == dtype
    bound = 5e-6 if dtype == torch.float32 else 5e-3
    assert float((actual.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_weights_in_memory_are_exact(dtype):
    module = experts_module(DeepseekV3Experts)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(0.1).half())
    x, ids, weights = routing()
    x = x.float()
    with torch.no_grad():
        exact = module.double()(x.double(), ids, weights.double())
        module = module.to(dtype)
        module.config._experts_implementation = "cpumoe"
        actual = module(x, ids, weights)
    assert float((actual.double() - exact).norm() / exact.norm()) < 5e-6


def test_training_experts_in_memory_is_refused():
    module = quantized_in_place(experts_module(DeepseekV3Experts)).train()
    module.config._experts_implementation = "cpumoe"
    with pytest.raises(RuntimeError, match="cannot train"):
        module(*routing())


def test_batch_invariance_reaches_the_engine(tmp_path, monkeypatch):
    seen = []
    make = _core.MoeConfig

    def note(**config):
        seen.append(config["batch_invariant"])
        return make(**config)

    monkeypatch.setattr(_core, "MoeConfig", note)
    options = ExpertsOptions(batch_invariant=True)
    from_pretrained(tiny_models.gpt_oss(tmp_path), options=options)
    module = quantized_in_place(experts_module(DeepseekV3Experts))
    module.config._experts_implementation = "cpumoe"
    with loading_with(options), torch.no_grad():
        module(*routing())
    assert seen == [True] * (tiny_models.LAYERS + 1)


def test_a_whole_model_in_memory(tmp_path):
    folder = tiny_models.gpt_oss(tmp_path)
    tokens = torch.arange(3, 23)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_experts_implementation("cpumoe")
        actual = model(tokens).logits
        same = from_pretrained(folder, dtype=torch.float32, options=ExpertsOptions())(tokens).logits
    assert torch.equal(actual, same)
    assert float((actual - expected).norm() / expected.norm()) < 1e-5
