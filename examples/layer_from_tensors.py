"""Computes an expert layer whose weights are tensors in memory.

The weights are random here. Each matrix is quantized to MXFP4, which is 4.25 bits per weight, or to
another format of `cpumoe.WEIGHT_FORMATS`. The result is compared with a PyTorch reference that
dequantizes the same weights.

    python layer_from_tensors.py [FORMAT]
"""

import sys

import torch

import cpumoe

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K = 8, 256, 128, 5, 2

format = cpumoe.weight_format(sys.argv[1] if len(sys.argv) > 1 else "mxfp4")
gate = cpumoe.QuantizedMatrix(*format.quantize(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 16))
up = cpumoe.QuantizedMatrix(*format.quantize(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 16))
down = cpumoe.QuantizedMatrix(*format.quantize(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / 16))

experts = cpumoe.Experts.from_tensors(gate=gate, up=up, down=down, format=format.name)
print(experts)

hidden_states = torch.randn(TOKENS, HIDDEN)
topk_ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices  # [tokens, top_k]
topk_weights = torch.softmax(torch.randn(TOKENS, TOP_K), dim=-1)

output = experts(hidden_states, topk_ids, topk_weights)  # [tokens, hidden]

expected = cpumoe.reference.experts_forward(
    hidden_states, topk_ids, topk_weights, gate, up, down, format=format.name
)
error = (output - expected).norm() / expected.norm()
print(f"relative error against the reference: {error:.1e}")
