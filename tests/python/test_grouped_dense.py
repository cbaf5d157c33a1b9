"""Dense layers of derived classes that multiply each part of their input by a matrix of its own."""

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import cpumoe
from cpumoe.formats import WEIGHT_FORMATS, stacked_rows, weight_format
from cpumoe.integrations.transformers import ExpertsOptions, dense
from cpumoe.integrations.transformers.grouped_dense import (
    GroupedLinear,
    groups_of,
    pack_groups,
    split_rows,
)

GROUPS, ROWS, WIDTH = 4, 128, 192


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Grouped(nn.Linear):
    """What DeepSeek-V4 has, in other words."""

    def __init__(self, groups=GROUPS, rows=ROWS, width=WIDTH, **kwargs):
        super().__init__(width, groups * rows, **{"bias": False, **kwargs})
        self.parts, self.answer = groups, 42

    def forward(self, x):
        weight = self.weight.unflatten(0, (self.parts, -1))
        return torch.einsum("...gk,gnk->...gn", x, weight)


def changed(change):
    """A class whose result is changed."""

    class Changed(Grouped):
        def forward(self, x):
            return change(super().forward(x), x)

    return Changed


def test_groups_of_modules():
    assert groups_of(nn.Linear(3, 4)) == 1
    assert groups_of(Grouped()) == GROUPS
    assert groups_of(DeepseekV4GroupedLinear(WIDTH, GROUPS * ROWS, GROUPS)) == GROUPS
    with torch.device("meta"):
        assert groups_of(Grouped()) == GROUPS


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y * 1.001,
        lambda y, x: y + 1e-3,
        lambda y, x: y.relu(),
        lambda y, x: y.flip(-2),
        lambda y, x: y.flatten(-2),
        lambda y, x: y + x.mean(),
        lambda y, x: y.half(),
        lambda y, x: y / x.norm(),
        lambda y, x: (y, x),
        lambda y, x: y * float("nan"),
        lambda y, x: 1 / 0,
    ],
)
def test_another_formula_is_refused(change):
    assert groups_of(changed(change)()) == 0


def test_other_parts_are_refused():
    assert groups_of(Grouped(bias=True)) == 0
    module = Grouped()
    module.scale = nn.Parameter(torch.ones(1))
    assert groups_of(module) == 0
    module = Grouped()
    module.register_buffer("mask", torch.ones(1))
    assert groups_of(module) == 0

    class Derived(nn.Linear):
        pass

    assert groups_of(Derived(4, 8)) == 0


def test_a_trial_leaves_the_module_as_it_was():
    module = Grouped()
    before, weight = dict(vars(module)), module.weight
    assert groups_of(module) == GROUPS
    assert vars(module) == before
    assert module.weight is weight


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_results_and_export(name):
    kind = weight_format(name)
    matrix = kind.quantized(random(GROUPS * ROWS, WIDTH))
    layer = pack_groups(matrix, GROUPS, format=name, bias=None, options=cpumoe.ExpertsOptions())
    assert isinstance(layer, GroupedLinear)
    assert layer.format == name
    weight = kind.dense(matrix).unflatten(0, (GROUPS, ROWS))
    for lead in ((), (3,), (2, 5), (1, 1), (0,)):
        x = random(*lead, GROUPS, WIDTH)
        expected = torch.einsum("...gk,gnk->...gn", x, weight)
        actual = layer(x)
        assert actual.shape == expected.shape
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    exported = layer.export()
    for part in ("codes", "scales", "factor"):
        one, other = getattr(exported, part), getattr(matrix, part)
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one.float(), other.float()))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_rows_of_several_matrices(name):
    kind = weight_format(name)
    whole = kind.quantized(random(128 + 256 + 7, 192))
    stacked = stacked_rows([whole[:128], whole[128:384], whole[384:]])
    assert torch.equal(kind.dense(stacked), kind.dense(whole))
    assert stacked_rows([whole, kind.quantized(random(128, 64))]) is None


def test_rows_that_no_matrix_has_as_they_are():
    fp8, nvfp4, int4 = (weight_format(name) for name in ("fp8", "nvfp4", "int4"))
    weights = random(130, 256)
    by_block = fp8.quantized(weights)
    assert stacked_rows([by_block, by_block]) is None  # the last block has two rows
    assert stacked_rows([by_block[:128], by_block]).shape == (258, 256)
    assert stacked_rows([by_block[:128], fp8.quantized(weights, 256)]) is None
    assert stacked_rows([nvfp4.quantized(weights), nvfp4.quantized(weights * 3)]) is None
    assert stacked_rows([int4.quantized(weights), int4.quantized(weights, 64)]) is None
    half = int4.quantized(weights, scale_dtype=torch.float16)
    assert stacked_rows([int4.quantized(weights), half]) is None


def test_matrices_that_share_a_scale():
    assert split_rows(weight_format("fp8").quantized(random(384, 128)), 2) is None
    assert len(split_rows(weight_format("fp8").quantized(random(64, 128)), 2)) == 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, GROUPS * WIDTH)
        self.grouped, self.other = Grouped(), changed(lambda y, x: y + 1)()
        self.bfloat16().requires_grad_(False)

    def forward(self, input_ids, use_cache=False, past_key_values=None):
        x = self.embedding(input_ids).unflatten(-1, (GROUPS, WIDTH))
        return self.grouped(x) + self.other(x)


def test_a_models_grouped_layers_become_cpumoes():
    model = Model()
    model.train(False)
    ids = torch.arange(5)[None]
    expected = model(ids)
    done = dense.swap_dense(model, ExpertsOptions(dense="native", progress=False))
    assert done.ours == ["grouped"]
    assert done.hosts == {"other": "it is a Changed"}
    assert isinstance(model.grouped, GroupedLinear)
    assert type(model.other).__name__ == "Changed"
    assert not list(model.grouped.parameters())
    assert (model(ids) - expected).norm() <= 1e-2 * expected.norm()
