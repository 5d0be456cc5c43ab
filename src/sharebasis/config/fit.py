"""Settings of the groups `fit` and `grouping`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from sharebasis.config.types import Family, PositiveInt, Storage

Nearness = Literal["adjacent", "by_distance"]


@dataclass(frozen=True)
class LimitSettings:
    """How much of some sublayers is stored, as fractions of the original numbers.

    Where sublayers share a basis, of all that do. Where several limits name a sublayer, all hold.
    Values that are stored in their gauge (`FitSettings.value_gauge`) count as whole.
    """

    sublayers: str
    """A family, or a regular expression that a sublayer's whole HF name must match."""
    floor: Annotated[float, Ge(0), Le(1)] = 0.0
    """At least."""
    cap: Annotated[float, Gt(0), Le(1)] = 1.0
    """At most; below 1 the sublayer does not stay dense."""


@dataclass(frozen=True)
class GroupingSettings:
    """Which layers make a group of `fit.group_size`, or of `by_distance:N`."""

    by: Nearness
    """adjacent: those that follow each other; by_distance: of every family those that are nearest
    to each other, by what the stage `vary` measured."""
    tracked: str
    """The distances, as `vary` writes them; not read if adjacent, when any file will do."""


@dataclass(frozen=True)
class FitSettings:
    """Which factorization, and how much it may keep.

    Down to `damping_gradients` they belong to the stage `decompose`, the others to `fit`.
    """

    method: str
    """svd: of the weights; the others: of the weights in a metric of moments, see METHODS."""
    group_size: PositiveInt
    """Layers that share a basis; which ones, `grouping` says."""
    shared: tuple[Family, ...]
    """Families that share over layers; the others keep a basis for each part."""
    share_experts: bool
    """Whether the same matrix of all experts of a layer shares one basis, instead of that of
    the same expert of adjacent layers."""
    structures: tuple[str, ...]
    """What the allocation chooses from, by least loss. private: every part alone, which is always
    there; neurons: MLPs without some of their neurons, down refitted to the others; sparse:
    unstructured sparsity, weights without some of their entries, the others refitted; joint: q, k
    and v of a layer, gate and up, o and down; shared:N, shared:all: the same part of N adjacent
    layers, of the families `shared`; by_distance:N: of N layers that are near each other (needs
    grouping=by_distance); experts: the same matrix of all experts of a layer. What shares over
    layers has its basis on the side of the residual stream, with `:inner` behind it on that of
    heads and neurons, which layers have in common after `sharebasis.align` at most.
    [fixed]: what `group_size`, `shared` and `share_experts` say, and no choice."""
    two_sided: bool
    """Whether the loss weighs outputs by the moment of their gradients (calibrate.gradients)."""
    damping_inputs: Annotated[float, Ge(0)]
    """Of the mean diagonal of an input moment, added to its diagonal."""
    damping_gradients: Annotated[float, Ge(0)]
    """The same of a gradient moment."""
    removed: Annotated[float, Gt(0), Lt(1)]
    """Fraction of the selected sublayers' numbers to remove."""
    allocation: Literal["uniform", "global"]
    """uniform: as much of every group; global: where it costs the least loss."""
    storage: Storage
    """plain: basis and coefficients; interpolative: rank² numbers fewer, the same product."""
    value_gauge: bool
    """Whether values of heads that the allocation leaves dense are stored without columns that
    their outputs can take in: d_value² numbers a key-value head fewer, the same products."""
    exclude: tuple[str, ...]
    """Regular expressions; a sublayer whose whole HF name matches one stays dense, and counts."""
    limits: tuple[LimitSettings, ...]
    """What some sublayers keep, at least and at most; needs allocation global."""
    rank_multiple: PositiveInt
    """Every rank is a multiple of this, as hardware likes it; a weight may stay dense."""
    shard_bytes: Annotated[int, Gt(0)]
    """Size at which a shard of the compressed model is closed, in bytes."""
