"""What tests ask of a model whose dense layers cpumoe computes."""

import cpumoe
from cpumoe.integrations.transformers.grouped_dense import GroupedLinear


def our_layers(model):
    """Returns the dense layers that cpumoe computes, by their names."""
    found = {
        n: m for n, m in model.named_modules() if isinstance(m, (cpumoe.Linear, GroupedLinear))
    }
    parts = {id(part) for m in found.values() if isinstance(m, GroupedLinear) for part in m.layers}
    return {name: module for name, module in found.items() if id(module) not in parts}
