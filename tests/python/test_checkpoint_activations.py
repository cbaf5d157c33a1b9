"""The activation that config.json says, for every reader."""

import pytest
from checkpoint_tools import edit_config, write_small

from cpumoe import GLU, SwiGLU
from cpumoe.checkpoint import UnsupportedFormatError, open_checkpoint

MODELS = ["kimi-k2", "DeepSeek-V3", "Qwen3-30B-A3B"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, SwiGLU()),
        ("silu", SwiGLU()),
        ("gelu", GLU("gelu")),
        ("gelu_pytorch_tanh", GLU("gelu_tanh")),
        ("relu", GLU("relu")),
        ("relu2", GLU("relu2")),
    ],
)
def test_hidden_act_names_the_function_of_plain_experts(tmp_path, model, name, expected):
    write_small(tmp_path, model)
    edit_config(tmp_path, hidden_act=name)
    reader = open_checkpoint(tmp_path)
    assert (reader.activation, reader.unsupported) == (expected, ())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["quick_gelu", "swigluoai", 7, ["silu"]])
def test_other_functions_are_refused_by_name(tmp_path, model, name):
    write_small(tmp_path, model)
    edit_config(tmp_path, hidden_act=name)
    with pytest.raises(UnsupportedFormatError) as refusal:
        open_checkpoint(tmp_path).check_supported()
    assert f"hidden_act {name!r} is not supported, only 'silu', 'swish', " in str(refusal.value)


@pytest.mark.parametrize("model", ["v4-flash", "gpt-oss-20b"])
def test_families_with_a_formula_of_their_own_have_silu_alone(tmp_path, model):
    write_small(tmp_path, model)
    edit_config(tmp_path, hidden_act="relu")
    message = "hidden_act 'relu' is not supported, only 'silu', 'swish'"
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(tmp_path).check_supported()


@pytest.mark.parametrize(
    ("model_type", "key", "known", "expected"),
    [
        ("gemma4", "hidden_activation", "gelu_pytorch_tanh", GLU("gelu_tanh")),
        ("gemma4", "hidden_activation", "silu", SwiGLU()),
        ("nemotron_h", "mlp_hidden_act", "relu2", GLU("relu2", gated=False)),
        ("minimax_m3_vl", "hidden_act", "swigluoai", SwiGLU(1.702, 7.0, 1.0)),
        ("lfm2_moe", "hidden_act", "silu", SwiGLU()),
    ],
)
def test_families_name_their_function_in_keys_of_their_own(
    tmp_path, model_type, key, known, expected
):
    write_small(tmp_path, "kimi-k2")
    edit_config(tmp_path, model_type=model_type, hidden_act=None)
    edit_config(tmp_path, **{key: known})
    assert open_checkpoint(tmp_path).activation == expected
    edit_config(tmp_path, **{key: "tanh"})
    with pytest.raises(UnsupportedFormatError, match=f"{key} 'tanh' is not supported, only "):
        open_checkpoint(tmp_path).check_supported()


@pytest.mark.parametrize("name", ["silu", "relu2"])
def test_the_activation_of_an_unknown_model_stays_unknown(tmp_path, name):
    write_small(tmp_path, "kimi-k2")
    edit_config(tmp_path, model_type="new_moe", hidden_act=name)
    reader = open_checkpoint(tmp_path)
    assert (reader.activation, reader.unsupported) == (None, ())
