"""The name under which SGLang looks for experts on the CPU.

Python finds this package only if the folder above it is on ``PYTHONPATH``.
"""

from cpumoe.integrations.sglang.kt_kernel import KTMoEWrapper, generate_gpu_experts_masks

__all__ = ["KTMoEWrapper", "generate_gpu_experts_masks"]
