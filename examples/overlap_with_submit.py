"""Computes the routed experts while PyTorch computes something else.

`submit` returns at once. Here PyTorch meanwhile computes a shared expert, as many MoE models have
one. On a GPU host this is the time for the GPU's own work.

    python overlap_with_submit.py [path/to/checkpoint]
"""

import sys

import torch

import cpumoe
from cpumoe import embedded

path = sys.argv[1] if len(sys.argv) > 1 else embedded.model_path()

with cpumoe.open_checkpoint(path) as reader:
    experts = cpumoe.Experts.from_checkpoint(reader, reader.layers()[0])
    hidden, top_k = reader.hidden_size, reader.top_k
shared_expert = torch.nn.Sequential(
    torch.nn.Linear(hidden, 2 * hidden), torch.nn.SiLU(), torch.nn.Linear(2 * hidden, hidden)
)

with torch.no_grad():
    x = torch.randn(16, hidden)
    topk_ids = torch.rand(16, experts.num_experts).topk(top_k).indices
    topk_weights = torch.full(topk_ids.shape, 1 / top_k)

    future = experts.submit(x, topk_ids, topk_weights)  # x must not change until the result is read
    shared = shared_expert(x)
    output = shared + future.result()

print(f"{experts}: {len(x)} tokens, output norm {output.norm():.3f}")
assert torch.equal(output, shared + experts(x, topk_ids, topk_weights))
print("submitting and calling give the same bits")
