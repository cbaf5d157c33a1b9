import math

import pytest
import torch

from cpumoe.numerics.swiglu import SwiGLU


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
    swiglu = SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
    torch.testing.assert_close(swiglu(g, u), experts._apply_gate(interleaved))


def test_nan_propagates():
    nan = torch.tensor([math.nan])
    assert SwiGLU(limit=10.0)(nan, torch.ones(1)).isnan().all()
    assert SwiGLU(limit=10.0)(torch.ones(1), nan).isnan().all()


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
    with pytest.raises(ValueError, match=message):
        SwiGLU(**arguments)
