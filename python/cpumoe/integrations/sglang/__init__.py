"""cpumoe for SGLang: the GPU has attention and some experts, cpumoe computes the other experts.

SGLang hands experts to a module named ``kt_kernel``. `cpumoe.integrations.sglang.kt_kernel` is such
a module. There are two ways to it:

- SGLang finds the plugin ``cpumoe`` by itself; see `cpumoe.integrations.sglang.plugin`.
- The folder `pythonpath` on ``PYTHONPATH`` makes ``import kt_kernel`` find it in every process,
  also in SGLang's fork sglang-kt, which has no plugins.
"""

from pathlib import Path


def pythonpath() -> Path:
    """Returns the folder in which Python finds a package ``kt_kernel`` that is cpumoe's."""
    return Path(__file__).parent / "pythonpath"


__all__ = ["pythonpath"]
