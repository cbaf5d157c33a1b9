"""Old names of arguments, attributes and options work and warn."""

import importlib
import json

import pytest
import torch
from checkpoint_tools import write_small
from cli_tools import run
from moe_tools import inputs, layer

from cpumoe import GLU, Experts, SwiGLU, find_model, open_checkpoint, reference
from cpumoe._base.renamed import with_old_arguments
from cpumoe.text.generation import Sampling


@with_old_arguments("compute")
def takes_precision(*, precision="auto"):
    return precision


@with_old_arguments("fused_tokens")
def takes_limit(*, few_token_limit=None):
    return few_token_limit


def test_an_old_name_warns_where_it_is_written():
    with pytest.warns(FutureWarning, match="compute is now called precision") as caught:
        assert takes_precision(compute="int8") == "int8"
    assert caught[0].filename == __file__


def test_a_value_by_an_old_name_arrives():
    with pytest.warns(FutureWarning, match="fused_tokens is now called few_token_limit"):
        assert takes_limit(fused_tokens=0) == 0


def test_references_take_old_arguments():
    weights = layer("mxfp4", hidden=64, intermediate=32)
    call = (*inputs(weights, tokens=2), weights.gate, weights.up, weights.down)
    with pytest.warns(FutureWarning, match="compute is now called precision"):
        old = reference.error_bound(*call, format="mxfp4", compute="int8")
    assert torch.equal(old, reference.error_bound(*call, format="mxfp4", precision="int8"))


def test_an_old_option_is_not_new_to_commands_without_it():
    result = run("info", "--compute", "int8")
    assert result.exit_code == 2
    assert "--compute" in result.stderr
    assert "is now called" not in result.stderr


def test_old_and_new_name_together_are_refused():
    with pytest.raises(TypeError, match=r"takes_precision\(\) got both precision and compute"):
        takes_precision(precision="auto", compute="int8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("checkpoint"), "v4-flash")


@pytest.mark.parametrize(
    ("old", "new"),
    [({"compute": "int8"}, {"precision": "int8"}), ({"fused_tokens": 0}, {"few_token_limit": 0})],
)
def test_experts_take_old_arguments(old, new, checkpoint):
    with pytest.warns(FutureWarning, match=f"{next(iter(old))} is now called {next(iter(new))}"):
        experts = Experts.from_checkpoint(checkpoint, 0, progress=False, **old)
    expected = Experts.from_checkpoint(checkpoint, 0, progress=False, **new)
    assert experts.precision == expected.precision
    with pytest.warns(FutureWarning, match=r"Experts\.compute is now called Experts\.precision"):
        assert experts.compute == experts.precision


def test_the_activation_by_its_old_name(checkpoint):
    glu = GLU("gelu")
    with pytest.warns(FutureWarning, match="swiglu is now called activation"):
        experts = Experts.from_checkpoint(checkpoint, 0, progress=False, swiglu=glu)
    with pytest.warns(FutureWarning, match=r"Experts\.swiglu is now called Experts\.activation"):
        assert experts.swiglu == experts.activation == glu
    weights = layer("mxfp4", hidden=64, intermediate=32)
    call = (*inputs(weights, tokens=2), weights.gate, weights.up, weights.down)
    with pytest.warns(FutureWarning, match="swiglu is now called activation"):
        old = reference.experts_forward(*call, format="mxfp4", swiglu=glu)
    assert torch.equal(old, reference.experts_forward(*call, format="mxfp4", activation=glu))


def test_what_readers_and_models_know_of_the_activation_by_its_old_name(checkpoint):
    with open_checkpoint(checkpoint) as reader:
        with pytest.warns(FutureWarning, match=r"ExpertReader\.activation") as caught:
            assert reader.swiglu == reader.activation
        assert caught[0].filename == __file__
        with pytest.warns(FutureWarning, match=r"ExpertReader\.known_activation"):
            assert reader.known_swiglu() == reader.activation
    with pytest.warns(FutureWarning, match=r"ModelSpec\.activation"):
        assert find_model("v4-flash").swiglu == SwiGLU(limit=10.0)


def test_inspect_has_the_old_field_of_the_activation(checkpoint):
    for model in (checkpoint, "v4-flash"):
        document = json.loads(run("inspect", model, "--json").stdout)
        assert document["swiglu"] == document["activation"]
        assert document["activation"]["limit"] == 10


def test_options_take_old_arguments():
    options = pytest.importorskip("cpumoe.integrations.transformers").ExpertsOptions
    with pytest.warns(FutureWarning, match="compute is now called precision") as caught:
        made = options(compute="int8")
    assert caught[0].filename == __file__
    assert made == options(precision="int8")
    with pytest.warns(FutureWarning, match=r"ExpertsOptions\.precision"):
        assert made.compute == "int8"


@pytest.mark.parametrize("arguments", [("--compute", "int8"), ("--compute=int8",)])
def test_commands_take_old_options(arguments, checkpoint):
    result = run("validate", checkpoint, "--isa", "generic", "--tokens", 1, *arguments)
    assert result.exit_code == 0
    assert "int8" in result.stdout
    assert "warning: --compute is now called --precision" in result.stderr


def test_the_module_of_text_generation():
    old = importlib.import_module("cpumoe.generation")
    with pytest.warns(FutureWarning, match=r"now called cpumoe\.text\.generation"):
        assert old.Sampling is Sampling
    with pytest.raises(AttributeError):
        _ = old.nothing
