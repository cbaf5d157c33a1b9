"""Computes an expert layer whose weights are tensors in memory.

The weights are random here. Each matrix is quantized to MXFP4, which is 4.25 bits per weight. The
result is compared with a PyTorch reference that dequantizes the same weights.

    python layer_from_tensors.py
"""

import torch

import cpumoe

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K = 8, 256, 128, 5, 2

mxfp4 = cpumoe.weight_format("mxfp4")
gate = cpumoe.QuantizedMatrix(*mxfp4.quantize(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 16))
up = cpumoe.QuantizedMatrix(*mxfp4.quantize(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 16))
down = cpumoe.QuantizedMatrix(*mxfp4.quantize(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / 16))

experts = cpumoe.Experts.from_tensors(gate=gate, up=up, down=down, format="mxfp4")
print(experts)

hidden_states = torch.randn(TOKENS, HIDDEN)
topk_ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices  # [tokens, top_k]
topk_weights = torch.softmax(torch.randn(TOKENS, TOP_K), dim=-1)

output = experts(hidden_states, topk_ids, topk_weights)  # [tokens, hidden]

expected = cpumoe.reference.experts_forward(
    hidden_states, topk_ids, topk_weights, gate, up, down, format="mxfp4"
)
error = (output - expected).norm() / expected.norm()
print(f"relative error against the reference: {error:.1e}")
