"""Packs one layer's routed experts from a checkpoint, runs them, and reads one expert back.

The weights stay in the checkpoint's own format. Without a path, the checkpoint is the one of the
small DeepSeek-V4 model that comes with cpumoe.

    python layer_of_a_checkpoint.py [path/to/checkpoint]
"""

import sys

import torch

import cpumoe
from cpumoe import embedded

path = sys.argv[1] if len(sys.argv) > 1 else embedded.model_path()

with cpumoe.open_checkpoint(path) as reader:
    layer = reader.layers()[-1]
    experts = cpumoe.Experts.from_checkpoint(reader, layer)
    print(f"layer {layer} of {len(reader.layers())} layers with experts: {experts}")

    hidden_states = torch.randn(4, reader.hidden_size, dtype=torch.bfloat16)
    topk_ids = torch.rand(4, reader.num_experts).topk(reader.top_k).indices
    topk_weights = torch.full(topk_ids.shape, 1 / reader.top_k)
    output = experts(hidden_states, topk_ids, topk_weights)
    print(f"output: {list(output.shape)}, {output.dtype}, norm {output.float().norm():.3f}")

    packed, stored = experts.export(0).gate, reader.expert(layer, 0).gate
    assert torch.equal(packed.codes, stored.codes)
    assert torch.equal(packed.scales, stored.scales)
    print("expert 0 has the checkpoint's own bytes")
