"""How far two layers are from each other, once what is arbitrary in one of them is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from sharebasis.attention_alignment import align_attention, align_heads_tied
from sharebasis.gauge import Attention, Freedom, Gauge, Identity, Layer, Mlp, Unit
from sharebasis.neuron_alignment import align_neurons, align_neurons_tied
from sharebasis.settings import Alignment

ATTEMPTS = 4
"""Times that an alignment is sought before a unit is left as it is."""
EMPHASIS = 4.0
"""By how much a family weighs more in the next attempt, if this one took it further away."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """How one layer is brought to another."""

    gauges: Mapping[str, Gauge] = field(default_factory=dict)
    """Unit -> what acts on it; a unit that is not here stays as it is."""

    def __call__(self, layer: Layer) -> Layer:
        """Apply it, to the layer that it was found for or to others of its shapes."""
        turned = {
            name: act(unit, self.gauges[name]) if name in self.gauges else unit
            for name, unit in layer.units.items()
        }
        return Layer(turned, layer.rest)


@dataclass(frozen=True, slots=True)
class Distances:
    """Of one pair of layers: family -> Frobenius distance of its normalised weights, in [0, 2].

    0: the same up to a positive factor; √2: orthogonal, as random weights of many numbers are.
    """

    unaligned: Mapping[str, float]
    aligned: Mapping[str, float]
    """No larger than `unaligned`, family by family."""


def distances(a: Layer, b: Layer, freedom: Freedom, alignment: Alignment) -> Distances:
    """Measure what two layers have in common, family by family.

    Args:
        a: is the one that is moved.
        b: stays as it is.
        freedom: of `a`.
        alignment: none, tied or exact.

    Returns:
        Of the families that both have in the same shapes.
    """
    a, b = a.normalised(), b.normalised()
    unaligned = _between(a, b)
    if alignment == "none":
        return Distances(unaligned, unaligned)
    return Distances(unaligned, _between(align(a, b, freedom, alignment)(a), b))


def align(a: Layer, b: Layer, freedom: Freedom, alignment: Alignment) -> Aligned:
    """Find what brings `a` near `b`.

    Every unit's Σ_f ‖g a_f − b_f‖² is made small. No family of a unit ends up further away
    than it was: one that would weighs more in the next attempt, and if attempts run out, the
    unit stays as it is.

    Args: as of `distances`, which normalises both first.
    """
    if alignment == "none":
        return Aligned()
    gauges = {}
    for name, unit in a.units.items():
        other = b.units.get(name)
        if other is not None and _same_shapes(unit, other):
            gauges[name] = _closer(unit, other, _search(unit, other, freedom, alignment))
    return Aligned(gauges)


Search = Callable[[Mapping[str, float]], Gauge]
"""Family -> its weight in the sum; gives the best gauge element."""


def _search(a: Unit, b: Unit, freedom: Freedom, alignment: Alignment) -> Search:
    match a, b:
        case Attention(), Attention():
            if alignment == "exact":
                return lambda emphasis: align_attention(a, b, freedom, emphasis)
            if a.q.shape[1] == a.o.shape[1]:
                return lambda emphasis: align_heads_tied(a, b, emphasis)
        case Mlp(), Mlp():
            if alignment == "exact":
                return lambda emphasis: align_neurons(a, b, freedom.neuron_signs, emphasis)
            return lambda emphasis: align_neurons_tied(a, b, emphasis)
    return lambda emphasis: Identity()


def _closer(a: Unit, b: Unit, search: Search) -> Gauge:
    """What a search finds, if it takes no family further away."""
    before = _unit_distances(a, b)
    emphasis = dict.fromkeys(before, 1.0)
    for _ in range(ATTEMPTS):
        gauge = search(emphasis)
        after = _unit_distances(act(a, gauge), b)
        further = [name for name in before if not after[name] <= before[name]]
        if not further:
            return gauge
        for name in further:
            emphasis[name] *= EMPHASIS
    return Identity()


def act(unit: Unit, gauge: Gauge) -> Unit:
    """Apply a gauge element to a unit of its kind."""
    return gauge(unit)  # type: ignore[arg-type]


def _same_shapes(a: Unit, b: Unit) -> bool:
    return {name: x.shape for name, x in a.families.items()} == {
        name: x.shape for name, x in b.families.items()
    }


def _unit_distances(a: Unit, b: Unit) -> dict[str, float]:
    return {name: float((x - b.families[name]).norm()) for name, x in a.families.items()}


def _between(a: Layer, b: Layer) -> Mapping[str, float]:
    """Family -> distance, of the families that both have in the same shapes."""
    found: dict[str, float] = {}
    others = b.families
    for name, own in a.families.items():
        other = others.get(name, ())
        if [x.shape for x in own] == [x.shape for x in other]:
            pieces = [(x - y).norm() for x, y in zip(own, other, strict=True)]
            found[name] = float(torch.stack(pieces).norm())
    return found
