"""Compiled models: no graph breaks at experts, and tokens are those of the same model eager."""

import os

import pytest
import tiny_models
import torch
from test_transformers_experts import experts_module, quantized_in_place, routing
from torch._dynamo.utils import counters
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from cpumoe import embedded
from cpumoe.integrations.transformers import CpuExperts, from_pretrained


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    counters.clear()


class Recording:
    """A backend that keeps the graphs, and runs them as they are."""

    def __init__(self):
        self.operators = []

    def __call__(self, graph, _):
        self.operators += [node.target for node in graph.graph.nodes]
        return graph.forward

    @property
    def experts(self):
        return self.operators.count(torch.ops.cpumoe.experts)


def greedy(model, prompt, tokens, **options):
    ids = torch.tensor([prompt])
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options
    )


def test_a_compiled_model_writes_the_same_tokens(capsys):
    model = from_pretrained(embedded.model_path())
    prompt = (0, 1146, 265, 1803, 1251)
    expected = greedy(model, prompt, 3)
    backend = Recording()
    model.compile(fullgraph=True, dynamic=True, backend=backend)
    actual = greedy(model, prompt, 3)
    layers = sum(isinstance(module, CpuExperts) for module in model.modules())
    graphs = counters["stats"]["unique_graphs"]
    with capsys.disabled():
        print(f"\n{graphs} graphs, {sum(counters['graph_break'].values())} graph breaks")
    assert torch.equal(actual, expected)
    assert not counters["graph_break"]
    assert backend.experts == graphs * layers


@pytest.mark.skipif("CPUMOE_TEST_INDUCTOR" not in os.environ, reason="minutes; see tests/full.sh")
def test_a_model_compiled_by_inductor_writes_the_same_tokens():
    # In bf16, Inductor rounds less often than eager code.
    model = from_pretrained(embedded.model_path(), dtype=torch.float32)
    expected = greedy(model, (0, 1146, 265, 1803, 1251), 3)
    model.compile(fullgraph=True, dynamic=True)
    assert torch.equal(greedy(model, (0, 1146, 265, 1803, 1251), 3), expected)
    assert not counters["graph_break"]


def test_a_compiled_model_with_a_static_cache_writes_the_same_tokens(tmp_path):
    model = from_pretrained(tiny_models.gpt_oss(tmp_path))
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = greedy(model, range(3, 9), 8, **options)
    model.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(greedy(model, range(3, 9), 8, **options), expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the prompt's and a token's


@pytest.fixture
def module(tmp_path):
    return from_pretrained(tiny_models.deepseek_v4(tmp_path)).model.layers[1].mlp.experts


def test_calls_of_compiled_code_are_counted(module):
    x, *routed = routing(6, tiny_models.EXPERTS)
    function = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = module(x, *routed)
        before = module.spent
        assert torch.equal(function(x.view(2, 3, 64), *routed).view(6, 64), expected)
    assert module.spent.calls == before.calls + 1
    assert module.spent.seconds > before.seconds


def test_gradients_through_a_compiled_module_are_refused(module):
    x, *routed = routing(6, tiny_models.EXPERTS)
    function = torch.compile(module, fullgraph=True, backend="aot_eager")
    result = function(x.requires_grad_(), *routed)
    with pytest.raises(RuntimeError, match="layers compute no gradients"):
        result.sum().backward()


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_can_be_exported(module, strict):
    arguments = routing(6, tiny_models.EXPERTS)
    program = torch.export.export(module, arguments, strict=strict).module()
    assert torch.equal(program(*arguments), module(*arguments))


def test_a_module_takes_meta_tensors(module):
    arguments = [tensor.to("meta") for tensor in routing(6, tiny_models.EXPERTS)]
    assert module(*arguments).is_meta


def in_memory():
    module = quantized_in_place(experts_module(DeepseekV3Experts))
    module.config._experts_implementation = "cpumoe"
    return module


def test_compiled_experts_in_memory_follow_changed_weights():
    module, arguments = in_memory(), routing()
    function = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = function(*arguments)
        assert torch.equal(first, module(*arguments))
        module.down_proj.mul_(2)
        torch.testing.assert_close(function(*arguments), 2 * first)


def test_modules_in_memory_keep_their_own_weights():
    arguments = routing()
    modules = [in_memory(), in_memory()]
    function = torch.compile(lambda module, *given: module(*given), backend="aot_eager")
    with torch.no_grad():
        modules[1].down_proj.mul_(2)
        for module in modules:
            assert torch.equal(function(module, *arguments), module(*arguments))


def test_several_modules_in_memory_share_a_graph():
    modules, (x, *routed) = [in_memory(), in_memory(), in_memory()], routing()

    def call(states):
        for module in modules:
            states = states + module(states, *routed)
        return states

    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        modules[1].down_proj.mul_(2)
        assert torch.equal(function(x), call(x))


def test_gradients_of_compiled_experts_in_memory_are_refused():
    module, arguments = in_memory(), routing()
    result = torch.compile(module, backend="aot_eager")(*arguments)
    with pytest.raises(RuntimeError, match="layers compute no gradients"):
        result.sum().backward()


@pytest.mark.parametrize("strict", [False, True])
def test_experts_in_memory_can_be_exported(strict):
    module, arguments = in_memory(), routing()
    with torch.no_grad():
        program = torch.export.export(module, arguments, strict=strict).module()
        assert torch.equal(program(*arguments), module(*arguments))
