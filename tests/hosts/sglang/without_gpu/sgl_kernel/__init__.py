"""Stands in for SGLang's kernels, which have no build for CPUs. Using one is an error."""

__version__ = "0.4.10"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}")

    return absent
