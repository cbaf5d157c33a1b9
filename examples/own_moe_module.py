"""A PyTorch module of one's own: a router in PyTorch, experts in cpumoe.

`Experts` is no parameter and has no gradient, so the module keeps it as a plain attribute. Without
a path, the experts are those of the small model that comes with cpumoe. The router is random.

    python own_moe_module.py [path/to/checkpoint]
"""

import sys

import torch
from torch import nn

import cpumoe
from cpumoe import embedded


class MixtureOfExperts(nn.Module):
    """Routes each token to its `top_k` most probable experts."""

    def __init__(self, experts: cpumoe.Experts, top_k: int) -> None:
        """Takes packed experts; makes a router for them."""
        super().__init__()
        self.router = nn.Linear(experts.hidden_size, experts.num_experts, bias=False)
        self.experts = experts
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps hidden states ``[..., hidden]`` to hidden states of the same shape."""
        tokens = x.flatten(0, -2)
        probabilities = self.router(tokens).softmax(-1, dtype=torch.float32)
        topk_weights, topk_ids = probabilities.topk(self.top_k)
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        return self.experts(tokens, topk_ids, topk_weights).view_as(x)


path = sys.argv[1] if len(sys.argv) > 1 else embedded.model_path()
with cpumoe.open_checkpoint(path) as reader:
    experts = cpumoe.Experts.from_checkpoint(reader, reader.layers()[0])
    module = MixtureOfExperts(experts, reader.top_k)

with torch.inference_mode():
    x = torch.randn(2, 7, experts.hidden_size)  # [batch, tokens, hidden]
    print(f"{module}\n{list(x.shape)} -> {list(module(x).shape)}")
