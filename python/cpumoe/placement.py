"""The memory in which a layer's weights lie."""

from __future__ import annotations

from dataclasses import dataclass

from cpumoe import _core


@dataclass(frozen=True)
class Placement:
    """Where the packed weights lie; `Experts.placement` and `Linear.placement` return it.

    A layer has a share of the rows of each matrix in the memory of each node. It takes the nodes of
    the runtime that packs it.

    Attributes:
        nodes: numbers of the NUMA nodes. None: the layer is not divided, and the system chooses its
            memory.
        nbytes: bytes of each node's share when all experts are packed.
        bound: whether the system was told to take each share from its node and to leave it there.
            Otherwise the node's threads were the first to write it, which decides the same unless
            the system moves pages later. Containers may forbid the first way.
        local_share: the part of the pages that lies on its node, 0 to 1. The system is asked about
            up to 4,096 pages of each share. None: it does not answer, or no expert is packed.
    """

    nodes: tuple[int, ...] | None
    nbytes: tuple[int, ...]
    bound: bool
    local_share: float | None

    def __str__(self) -> str:
        """One line that says it in words."""
        if self.nodes is None:
            return "not divided among NUMA nodes"
        how = "bound to them" if self.bound else "by first touch"
        where = ", ".join(map(str, self.nodes))
        local = "unknown" if self.local_share is None else f"{100 * self.local_share:.1f} %"
        return f"NUMA nodes {where}, {how}; pages on their node: {local}"


def placement_of(layer: _core.Layer | _core.LinearLayer) -> Placement:
    """Returns where the engine's layer lies."""
    shares = layer.placement()
    divided = any(share.node >= 0 for share in shares)
    pages = sum(share.pages for share in shares)
    local = sum(share.local for share in shares)
    return Placement(
        nodes=tuple(share.node for share in shares) if divided else None,
        nbytes=tuple(share.nbytes for share in shares),
        bound=divided and all(share.bound or not share.nbytes for share in shares),
        local_share=local / pages if divided and pages else None,
    )
