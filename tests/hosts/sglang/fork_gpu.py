"""Experts "on the GPU" in PyTorch, in sglang-kt's layouts, because its kernels need a GPU.

A layout is a class with sglang-kt's own shapes of weights. `fill` copies the checkpoint's experts
into them, as sglang-kt's weight loader does.
"""

import torch

from cpumoe import weight_format

HIDDEN, INTERMEDIATE = 256, 128


class GpuExperts:
    """Computes the experts of a layer that the GPU has."""

    limit = None

    def create_moe_runner(self, layer, config):
        self.scaling, self.limit = config.routed_scaling_factor, config.swiglu_limit

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, dispatched):
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        x, (weights, ids, _) = dispatched.hidden_states, dispatched.topk_output
        result = torch.zeros(x.shape)
        for expert in range(len(getattr(layer, self.names[0]))):
            tokens, slots = torch.where(ids == expert)
            gate_up, down = self.dense(layer, expert)
            gate, up = (x[tokens].float() @ gate_up.T).chunk(2, dim=-1)
            if self.limit:
                gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            y = (torch.nn.functional.silu(gate) * up) @ down.T
            result.index_add_(0, tokens, y * weights[tokens, slots, None])
        return StandardCombineInput(hidden_states=result.to(x.dtype))

    def fill(self, layer, slots, experts):
        for index, slot in enumerate(slots):
            weights = experts[slot]
            gate, up, down = weights.gate, weights.up, weights.down
            gate_up = torch.cat([gate.codes, up.codes]), torch.cat([gate.scales, up.scales])
            for name, tensor in zip(self.names, (*gate_up, down.codes, down.scales), strict=True):
                getattr(layer, name)[index] = self.stored(name, tensor)


class Mxfp4Experts(GpuExperts):
    """Layout of DeepSeek-V4's experts; `create_weights` is sglang-kt's own."""

    format = "mxfp4"
    names = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, **_):
        from sglang.srt.layers.quantization.mxfp4_deepseek import DeepSeekMxfp4MoEMethod

        DeepSeekMxfp4MoEMethod.create_weights(
            self, layer, num_experts, hidden_size, intermediate_size_per_partition, None
        )

    def stored(self, name, tensor):
        scales = name.endswith("scale_inv")
        return tensor.view(torch.float8_e8m0fnu).float() if scales else tensor.view(torch.int8)

    def dense(self, layer, expert):
        tensors = [getattr(layer, name)[expert] for name in self.names]
        return [
            weight_format(self.format).dequantize(
                codes.view(torch.uint8), scales.to(torch.float8_e8m0fnu)
            )
            for codes, scales in (tensors[:2], tensors[2:])
        ]


# sglang-kt recognises MXFP4 by this name.
Mxfp4Experts.__name__ = "DeepSeekMxfp4MoEMethod"


class Int4Experts(GpuExperts):
    """Layout of INT4 experts for the Marlin kernel: k comes first, eight codes in an int32.

    The kernel also has an order of its own within a matrix, which only a GPU can make. sglang-kt's
    functions for it are replaced by functions that leave the order as it is.
    """

    format = "int4"
    names = ("w13_weight_packed", "w13_weight_scale", "w2_weight_packed", "w2_weight_scale")
    num_bits, packed_factor, group_size, actorder = 4, 8, 32, None

    @staticmethod
    def replace_kernels(host):
        host.gptq_marlin_repack = lambda packed, perm, k, n, bits: packed
        host.marlin_permute_scales = lambda scales, k, n, group_size: scales

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, **_):
        sizes = ((hidden_size, 2 * intermediate_size_per_partition),)
        sizes += ((intermediate_size_per_partition, hidden_size),)
        tensors = []
        for k, n in sizes:
            tensors.append(torch.zeros(num_experts, k // self.packed_factor, n, dtype=torch.int32))
            scales = torch.ones(num_experts, k // self.group_size, n, dtype=torch.bfloat16)
            tensors.append(scales)
        for name, tensor in zip(self.names, tensors, strict=True):
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def process_weights_after_loading(self, layer):
        # The kernel's shape.
        for name, k, n in (
            ("w13_weight_packed", HIDDEN, 2 * INTERMEDIATE),
            ("w2_weight_packed", INTERMEDIATE, HIDDEN),
        ):
            packed = getattr(layer, name)
            packed.data = packed.data.reshape(len(packed), k // 16, 2 * n)

    def stored(self, name, tensor):
        return (tensor.view(torch.int32) if name.endswith("packed") else tensor).T

    def dense(self, layer, expert):
        matrices = []
        for packed, scales in (self.names[:2], self.names[2:]):
            stored = getattr(layer, scales)[expert]
            rows = getattr(layer, packed)[expert].reshape(-1, stored.shape[1]).T.contiguous()
            codes, scales = rows.view(torch.uint8), stored.T.contiguous()
            matrices.append(weight_format(self.format).dequantize(codes, scales))
        return matrices
