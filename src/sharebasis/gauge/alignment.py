"""How far two layers are from each other, once what is arbitrary in one of them is removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sharebasis.config.analyse import Alignment
from sharebasis.gauge.attention import align_attention, align_heads_tied
from sharebasis.gauge.neurons import align_neurons, align_neurons_tied
from sharebasis.gauge.units import Attention, Freedom, Gauge, Identity, Layer, Mlp, Unit

ATTEMPTS = 4
"""Times that an alignment is sought, of all heads and then of heads that stay in place, before
a unit is left as it is."""
EMPHASIS = 4.0
"""By how much a family weighs more in the next attempt, if this one took it further away."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """How one layer is brought to another."""

    gauges: Mapping[str, Gauge] = field(default_factory=dict)
    """Unit -> what acts on it; a unit that is not here stays as it is."""

    def __call__(self, layer: Layer) -> Layer:
        """Apply it, to the layer that it was found for or to others of its shapes."""
        units = {
            name: act(unit, self.gauges[name]) if name in self.gauges else unit
            for name, unit in layer.units.items()
        }
        return Layer(units, layer.rest)


@dataclass(frozen=True, slots=True)
class Distances:
    """Of one pair of layers: family -> Frobenius distance of its normalised weights, in [0, 2].

    0: the same up to a positive factor; √2: orthogonal, as random weights of many numbers are.
    """

    unaligned: Mapping[str, float]
    aligned: Mapping[str, float]
    """No larger than `unaligned`, family by family."""
    n_left: int
    """Units that stayed as they were, because every attempt took some family further away."""


def distances(a: Layer, b: Layer, freedom: Freedom, alignment: Alignment) -> Distances:
    """Measure what two layers have in common, family by family.

    Every weight is scaled to norm 1, after the alignment as before it; a family of several
    (experts) is at the root mean square of their distances. Up to
    local optima of the order of queries, what is measured does not depend on the coordinates of
    `a` in its gauge group, nor on those of `b`, but for the lengths of its neurons in up and down.

    Args:
        a: is the one that is moved.
        b: stays as it is.
        freedom: of `a`.
        alignment: none, tied or exact.

    Returns:
        Of the families that both have in the same shapes.
    """
    a, b = a.normalised(), b.normalised()
    matches = _matches(a, b, freedom, alignment)
    ours, theirs = _shapes(a), _shapes(b)
    unaligned: dict[str, float] = {}
    aligned: dict[str, float] = {}
    for name in ours:
        if ours[name] == theirs.get(name):
            of_units = [match for match in matches.values() if name in match.before]
            pairs = zip(a.rest.get(name, ()), b.rest.get(name, ()), strict=False)
            of_rest = [_distance(x, y) for x, y in pairs]
            unaligned[name] = math.hypot(*(match.before[name] for match in of_units), *of_rest)
            aligned[name] = math.hypot(*(match.after[name] for match in of_units), *of_rest)
    n_left = sum(isinstance(match.gauge, Identity) for match in matches.values())
    return Distances(unaligned, aligned, n_left if alignment != "none" else 0)


def align(a: Layer, b: Layer, freedom: Freedom, alignment: Alignment) -> Aligned:
    """Find what brings `a` near `b`.

    Every unit's Σ_f ‖g a_f − b_f‖² of its normalised families is made small. No family of a
    unit ends up further away than it was: one that would weighs more in the next attempt; if
    attempts run out, heads stay in their places, and then the whole unit as it is.

    Args: as of `distances`.
    """
    matches = _matches(a.normalised(), b.normalised(), freedom, alignment)
    return Aligned({name: match.gauge for name, match in matches.items()})


@dataclass(frozen=True, slots=True)
class _Match:
    """What was found for a unit: family -> distance, before and after."""

    gauge: Gauge
    before: Mapping[str, float]
    after: Mapping[str, float]


def _matches(a: Layer, b: Layer, freedom: Freedom, alignment: Alignment) -> Mapping[str, _Match]:
    """Of the units that both have in the same shapes."""
    return {
        name: _closer(unit, b.units[name], _searches(unit, b.units[name], freedom, alignment))
        for name, unit in a.units.items()
        if name in b.units and _same_shapes(unit, b.units[name])
    }


Search = Callable[[Mapping[str, float]], Gauge]
"""Family -> its weight in the sum; gives the best gauge element."""


def _searches(a: Unit, b: Unit, freedom: Freedom, alignment: Alignment) -> Sequence[Search]:
    """What to try, the freest first."""
    match a, b:
        case Attention(), Attention():
            in_place = replace(freedom, heads=False)
            if alignment == "exact":
                return (
                    lambda emphasis: align_attention(a, b, freedom, emphasis),
                    lambda emphasis: align_attention(a, b, in_place, emphasis),
                )
            if alignment == "tied" and a.q.shape[1] == a.o.shape[1]:
                return (lambda emphasis: align_heads_tied(a, b, emphasis),)
        case Mlp(), Mlp():
            if alignment == "exact" and freedom.neuron_scales and a.gate is not None:
                return (
                    lambda emphasis: align_neurons(a, b, "any", emphasis),
                    lambda emphasis: align_neurons(a, b, "signs", emphasis),
                )
            if alignment == "exact":
                return (lambda emphasis: align_neurons(a, b, "none", emphasis),)
            if alignment == "tied":
                return (lambda emphasis: align_neurons_tied(a, b, emphasis),)
    return ()


def _closer(a: Unit, b: Unit, searches: Sequence[Search]) -> _Match:
    """What the first search finds that takes no family further away."""
    before = _unit_distances(a, b)
    for search in searches:
        emphasis = dict.fromkeys(before, 1.0)
        for _ in range(ATTEMPTS):
            gauge = search(emphasis)
            after = _unit_distances(_as_long_as(a, act(a, gauge)), b)
            further = [name for name in before if not after[name] <= before[name]]
            if not further:
                return _Match(gauge, before, after)
            for name in further:
                emphasis[name] *= EMPHASIS
    return _Match(Identity(), before, before)


def act(unit: Unit, gauge: Gauge) -> Unit:
    """Apply a gauge element to a unit of its kind."""
    return gauge(unit)  # type: ignore[arg-type]


def _as_long_as(unit: Unit, moved: Unit) -> Unit:
    """With the norms of its families before, which scales of neurons have changed."""
    if isinstance(unit, Attention):
        return moved
    factors = {}
    for name, weight in moved.families.items():
        norm = float(weight.norm())
        factors[name] = float(unit.families[name].norm()) / norm if norm else 1.0
    return moved.scaled(factors)


def _same_shapes(a: Unit, b: Unit) -> bool:
    return {name: x.shape for name, x in a.families.items()} == {
        name: x.shape for name, x in b.families.items()
    }


def _shapes(layer: Layer) -> Mapping[str, Sequence[torch.Size]]:
    return {name: [x.shape for x in weights] for name, weights in layer.families.items()}


def _unit_distances(a: Unit, b: Unit) -> Mapping[str, float]:
    return {name: _distance(x, b.families[name]) for name, x in a.families.items()}


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm())
