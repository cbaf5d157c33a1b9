import dataclasses
import math

import pytest
import torch

from cpumoe.numerics.glu import GLU, SwiGLU


def test_plain_is_silu_times_up():
    g, u = torch.randn(2, 100, dtype=torch.float64)
    torch.testing.assert_close(SwiGLU()(g, u), torch.nn.functional.silu(g) * u)


def test_limit_clamps_gate_above_and_up_on_both_sides():
    g = torch.tensor([-50.0, 50.0, 1.0, 1.0])
    u = torch.tensor([1.0, 1.0, -50.0, 50.0])
    expected = torch.nn.functional.silu(torch.tensor([-50.0, 10.0, 1.0, 1.0]))
    expected = expected * torch.tensor([1.0, 1.0, -10.0, 10.0])
    torch.testing.assert_close(SwiGLU(limit=10.0)(g, u), expected)


def test_agrees_with_gpt_oss_of_transformers():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = modeling.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_local_experts=1, num_hidden_layers=1
    )
    experts = modeling.GptOssExperts(config)
    g, u = 5 * torch.randn(2, 4, 100)
    interleaved = torch.stack((g, u), -1).flatten(-2)
    activation = SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
    torch.testing.assert_close(activation(g, u), experts._apply_gate(interleaved))


FUNCTIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda g: torch.relu(g) ** 2,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_pytorchs(function):
    g, u = 3 * torch.randn(2, 100, dtype=torch.float64)
    expected = FUNCTIONS[function](g) * u
    torch.testing.assert_close(GLU(function)(g, u), expected)
    expected = FUNCTIONS[function](g.clamp(max=2.0)) * (u.clamp(-2.0, 2.0) + 1)
    torch.testing.assert_close(GLU(function, limit=2.0, up_offset=1.0)(g, u), expected)


SOFTCAPPED = GLU("softcapped_silu", gate_cap=4.0, up_cap=25.0)


def test_soft_caps_bound_the_linear_factors():
    g, u = 30 * torch.randn(2, 100, dtype=torch.float64)
    capped_g, capped_u = 4 * torch.tanh(g / 4), 25 * torch.tanh(u / 25)
    torch.testing.assert_close(SOFTCAPPED(g, u), capped_g * torch.sigmoid(g) * capped_u)


@pytest.mark.parametrize("glu", [*map(GLU, FUNCTIONS), SwiGLU(alpha=1.702), SOFTCAPPED], ids=str)
def test_gate_error_bounds_the_change_of_the_gate(glu):
    g = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    for size in (1e-6, 0.01, 0.3, 2.0):
        error = torch.full_like(g, size)
        bound = glu.gate_error(g, error) * (1 + 1e-9) + 1e-15
        for moved in (-size, -size / 3, size / 2, size):
            assert ((glu.gate(g + moved) - glu.gate(g)).abs() <= bound).all()


def test_nan_propagates():
    nan = torch.tensor([math.nan])
    for glu in (SwiGLU(limit=10.0), SOFTCAPPED, *map(GLU, FUNCTIONS)):
        assert glu(nan, torch.ones(1)).isnan().all()
        assert glu(torch.ones(1), nan).isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": math.nan}, "alpha must be positive and finite, got nan"),
        ({"limit": -1.0}, "limit must be positive and finite, or None for no clamp, got -1.0"),
        ({"limit": math.inf}, "limit must be positive and finite"),
        ({"up_offset": math.inf}, "up_offset must be finite, got inf"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^SwiGLU: {message}"):
        SwiGLU(**arguments)


@pytest.mark.parametrize("name", ["alpha", "limit", "up_offset"])
@pytest.mark.parametrize("value", ["10", [1.0]])
def test_values_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(TypeError, match=f"^SwiGLU: {name} must be a number, got "):
        SwiGLU(**{name: value})


def test_unknown_functions_and_their_gains_are_refused():
    expected = "silu, gelu, gelu_tanh, relu, relu2, softcapped_silu, got 'tanh'"
    with pytest.raises(ValueError, match=f"^GLU: function must be one of {expected}$"):
        GLU("tanh")
    with pytest.raises(ValueError, match=r"^GLU: alpha must be 1 for gelu_tanh, got 2\.0$"):
        GLU("gelu_tanh", alpha=2.0)
    with pytest.raises(ValueError, match=r"^GLU: up_cap must be positive and finite, got None$"):
        GLU("softcapped_silu", gate_cap=4.0)
    with pytest.raises(ValueError, match=r"^GLU: gate_cap must be None for relu, got 4\.0$"):
        GLU("relu", gate_cap=4.0)


def test_swiglu_prints_and_changes_as_it_is_made():
    activation = SwiGLU(limit=10.0)
    assert repr(activation) == "SwiGLU(alpha=1.0, limit=10.0, up_offset=0.0)"
    assert dataclasses.replace(activation, alpha=2.0) == SwiGLU(2.0, 10.0)
    assert dataclasses.asdict(activation)["function"] == "silu"
