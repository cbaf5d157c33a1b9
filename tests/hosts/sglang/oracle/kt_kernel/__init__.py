"""A plain kt_kernel: what SGLang must generate, with and without deferral.

It is slow and computes in fp32, one expert and one (token, expert) pair at a time.
"""

import torch

from cpumoe import open_checkpoint, weight_format

__all__ = ["KTMoEWrapper", "generate_gpu_experts_masks"]


def generate_gpu_experts_masks(activation_freq, num_gpu_experts):
    raise NotImplementedError


class KTMoEWrapper:
    # The sum of the experts that the last layer deferred.
    deferred = None

    def __init__(self, *, layer_idx, num_experts, weight_path, num_gpu_experts, **others):
        self.layer, self.num_experts, self.path = layer_idx, num_experts, weight_path
        self.gpu = num_gpu_experts or 0
        self.max_deferred = others["max_deferred_experts_per_token"] or 0

    @staticmethod
    def set_capture_batch_sizes(sizes):
        pass

    def load_weights(self, physical_to_logical):
        reader = open_checkpoint(self.path)
        fmt = weight_format(reader.format)
        self.experts = []
        for expert in physical_to_logical.tolist():
            weights = reader.expert(self.layer, expert)
            matrices = (weights.gate, weights.up, weights.down)
            self.experts.append([fmt.dequantize(m.codes, m.scales) for m in matrices])

    def submit_forward(self, x, ids, weights, stream):
        now = self.runs_now(ids, weights)
        total, later = torch.zeros(x.shape), torch.zeros(x.shape)
        for token, slot in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
            expert = int(ids[token, slot])
            if not self.gpu <= expert < self.num_experts:
                continue
            gate, up, down = self.experts[expert]
            row = x[token].float()
            y = down @ (torch.nn.functional.silu(gate @ row) * (up @ row))
            (total if expert in now else later)[token] += y * float(weights[token, slot])
        if KTMoEWrapper.deferred is not None:
            total += KTMoEWrapper.deferred
        KTMoEWrapper.deferred = later if self.max_deferred else None
        self.result = total.to(x.dtype)

    def runs_now(self, ids, weights):
        """The experts that a token has among its greatest weights, all but the deferred ones."""
        kept = ids.shape[1] - self.max_deferred
        now = set()
        for row, values in zip(ids.tolist(), weights.tolist(), strict=True):
            order = sorted(range(len(row)), key=lambda slot, values=values: -values[slot])
            now |= {row[slot] for slot in order[:kept]}
        return now

    def sync_forward(self, x, stream):
        return self.result
