"""A module of it that sglang-kt imports by name."""

from sgl_kernel import __getattr__  # noqa: F401
