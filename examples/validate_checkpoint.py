"""Checks one layer of a checkpoint on every kernel variant that this CPU can run.

Each variant's output is compared with a PyTorch reference in float64. An error must stay within the
bound that follows from the roundings of a correct kernel. The exit code is 1 if a check fails, so
that scripts can rely on it. `cpumoe validate` checks more cases, on the command line.

    python validate_checkpoint.py [path/to/checkpoint]
"""

import sys

import torch

import cpumoe
from cpumoe import embedded

path = sys.argv[1] if len(sys.argv) > 1 else embedded.model_path()
TOKENS = 8
failed = False

with cpumoe.open_checkpoint(path) as reader:
    if reader.unsupported:
        sys.exit(f"{path}: {'; '.join(reader.unsupported)}")
    layer = reader.layers()[0]
    weights = [reader.expert(layer, index) for index in range(reader.num_experts)]
    hidden_states = torch.randn(TOKENS, reader.hidden_size).bfloat16()
    topk_ids = torch.rand(TOKENS, reader.num_experts).topk(reader.top_k).indices
    call = (hidden_states, topk_ids, torch.rand(topk_ids.shape))
    expected, bound = cpumoe.reference.experts_forward_with_bound(
        *call,
        gate=[expert.gate for expert in weights],
        up=[expert.up for expert in weights],
        down=[expert.down for expert in weights],
        format=reader.format,
        activation=reader.known_activation(),
        gate_bias=[expert.gate_bias for expert in weights],
        up_bias=[expert.up_bias for expert in weights],
        down_bias=[expert.down_bias for expert in weights],
    )
    for isa in cpumoe.supported_isas():
        output = cpumoe.Experts.from_checkpoint(reader, layer, isa=isa)(*call)
        worst = ((output - expected).abs() / bound).max()
        failed |= not worst <= 1  # NaN fails, too
        print(f"{isa:12} largest error: {worst:.0%} of its bound")

sys.exit(failed)
