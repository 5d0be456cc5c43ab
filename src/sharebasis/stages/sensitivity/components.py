"""What attention and MLPs make of the error when the whole draft is in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sharebasis.architecture.groups import Group
from sharebasis.residual.sites import BRANCHES, Branch, Sites
from sharebasis.stages.attribute.error_attribution import Component
from sharebasis.stages.sensitivity.corrections import Cell


def branches(sites: Sites) -> Callable[[Group], Branch | None]:
    """Whether a group belongs to attention or to the MLP, as far as that can be told."""
    known: dict[str, Branch] = {}
    for layer in sites.layers:
        known |= {**layer.readers, **layer.writers}

    def branch(group: Group) -> Branch | None:
        part = group.parts[0]
        if part.sublayer.expert is not None:
            return "mlp"
        return BRANCHES.get(part.family) or known.get(part.sublayer.name)

    return branch


def made(
    components: Iterable[Component], cells: Sequence[Cell], layers: Sequence[int]
) -> Sequence[float]:
    """The divergence that the components of every cell make, nats a prediction.

    Args:
        components: of an attribution.
        cells: of the kinds attn and mlp.
        layers: the number of every layer that the attribution counts from 0.
    """
    sums = [0.0] * len(cells)
    for one in components:
        if one.layer is None:
            continue
        kind = "mlp" if one.label.endswith("MLP") else "attn"
        for i, cell in enumerate(cells):
            first, last = cell.layers
            if cell.kind == kind and first <= layers[one.layer] <= last:
                sums[i] += one.made["kl"]
    return sums
