"""`ExpertsOptions`, and its fields as keyword arguments of whatever packs experts."""

import dataclasses
import inspect

import pytest
from checkpoint_tools import write_small
from moe_tools import layer

import cpumoe
from cpumoe import Experts, ExpertsOptions
from cpumoe.options import ExpertsKeywords, with_overrides

FIELDS = [field.name for field in dataclasses.fields(ExpertsOptions)]


def test_every_option_is_a_keyword_and_described():
    assert list(ExpertsKeywords.__annotations__) == FIELDS
    assert all(f"    {name}: " in inspect.getdoc(ExpertsOptions) for name in FIELDS)


def test_keywords_take_precedence():
    options = ExpertsOptions(precision="int8", isa="generic")
    changed = with_overrides(options, {"precision": "bf16"}, "f")
    assert changed == ExpertsOptions(precision="bf16", isa="generic")
    assert with_overrides(options, {}, "f") is options
    assert with_overrides(None, {}, "f") == ExpertsOptions()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("checkpoint"), "v4-flash")


def from_checkpoint(checkpoint, **arguments):
    return Experts.from_checkpoint(checkpoint, 0, progress=False, **arguments)


def from_tensors(_checkpoint, **arguments):
    return Experts.from_tensors(**layer("mxfp4").tensors, **arguments)


@pytest.mark.parametrize("make", [from_checkpoint, from_tensors])
def test_options_and_keywords_reach_the_experts(make, checkpoint):
    with cpumoe.Runtime(1) as runtime:
        options = ExpertsOptions(runtime=runtime, precision="int8", isa="generic")
        experts = make(checkpoint, options=options, precision="bf16")
        assert (experts.runtime, experts.precision, experts.isa) == (runtime, "bf16", "generic")


@pytest.mark.parametrize("make", [from_checkpoint, from_tensors])
def test_an_unknown_keyword_is_named(make, checkpoint):
    message = rf"Experts\.{make.__name__}\(\) got an unexpected keyword argument 'presicion'"
    with pytest.raises(TypeError, match=f"{message}; options are runtime, precision,"):
        make(checkpoint, presicion="int8")


def test_an_option_of_a_model_is_no_keyword(checkpoint):
    options = pytest.importorskip("cpumoe.integrations.transformers").ExpertsOptions()
    with pytest.raises(TypeError, match="unexpected keyword argument 'fp32_router'"):
        from_checkpoint(checkpoint, options=options, fp32_router=False)


def test_options_of_another_type_are_refused(checkpoint):
    with pytest.raises(TypeError, match=r"options: expected cpumoe\.ExpertsOptions, got dict"):
        from_checkpoint(checkpoint, options={"precision": "int8"})


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"precision": "int3"}, ValueError, "precision: expected one of auto, bf16, int8"),
        ({"isa": "avx3"}, ValueError, "avx3"),
        ({"few_token_limit": -1}, ValueError, "few_token_limit: expected 0 or more"),
        ({"few_token_limit": 2.5}, TypeError, "few_token_limit: expected an int, got 2.5"),
    ],
)
def test_values_are_checked_when_options_are_made(values, kind, message):
    with pytest.raises(kind, match=message):
        ExpertsOptions(**values)
    with pytest.raises(kind, match=message):
        dataclasses.replace(ExpertsOptions(), **values)
