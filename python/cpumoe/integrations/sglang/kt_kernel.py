"""The module ``kt_kernel`` as SGLang and its fork sglang-kt call it."""

from cpumoe.integrations.sglang.placement import generate_gpu_experts_masks
from cpumoe.integrations.sglang.wrapper import KTMoEWrapper

__all__ = ["KTMoEWrapper", "generate_gpu_experts_masks"]
