"""Defines operators that PyTorch's compilers and tracers record."""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "cpumoe"


def define(
    schema: str, compute: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> torch.library.Library:
    """Defines an operator for tensors on every device.

    Args:
        schema: name, arguments and result.
        compute: what the operator does.
        fake: returns a tensor like the result, without values, from tensors without values.

    Returns:
        What PyTorch forgets the operator with. More implementations may be added to it.
    """
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    torch.library.register_kernel(name, "CompositeExplicitAutograd", compute, lib=library)
    torch.library.register_fake(name, fake, lib=library)
    return library
