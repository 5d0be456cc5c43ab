"""artifacts/spectra and a budget -> what becomes of every part, for the least loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sharebasis.allocation.lagrangian import allocate_structures
from sharebasis.allocation.loss_weights import group_weight, weigh
from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.allocation.uniform import uniform_ranks
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.config.fit import NARROWED, SPARSE, FitSettings
from sharebasis.linalg.exact_cover import Cover
from sharebasis.linalg.value_gauge import ValueOutput
from sharebasis.spectra.store import Spectra
from sharebasis.structures.curve import DENSE, Curve, curve_of
from sharebasis.structures.limits import Limit, limits_of
from sharebasis.structures.neuron_plans import Plan, curve_of_plans, plans_of
from sharebasis.structures.sparse import curve_of_sparse


@dataclass(frozen=True, slots=True)
class Chosen:
    """What becomes of a model; every part is in one of these."""

    ranks: Mapping[int, int]
    """Number of a group -> its rank, or `DENSE`."""
    plans: Mapping[int, Plan] = field(default_factory=dict)
    """Number of an MLP that lacks neurons -> what is left of it."""
    sparse: Mapping[int, int] = field(default_factory=dict)
    """Number of a part that lacks entries -> how many numbers are stored of it."""
    fixed: Mapping[int, ValueOutput] = field(default_factory=dict)
    """Number of the group of values that are stored dense without some of their columns -> what
    they are, and their output."""


@dataclass(frozen=True, slots=True)
class _Option:
    """A way to store some parts."""

    parts: Sequence[Part]
    structure: str
    """As of `Group`; that of the given ones is the empty string."""
    curve: Curve
    source: int
    """The number of the group, MLP or part that it is about."""
    values: Sequence[int] = ()
    """Numbers of the groups of values that are stored in the gauge, too."""
    plans: Sequence[Plan] = ()


def choose(
    source: Spectra,
    energies: Sequence[NDArray[np.float64]],
    settings: FitSettings,
    sensitivity: Sensitivity,
    offered: bool,
) -> Chosen:
    """Pick what there will be, and what each of it keeps, for the least loss in the budget.

    Args:
        source: the groups, MLPs and parts to choose from.
        energies: of `source.groups`: what each direction saves of the loss, the largest first.
        settings: budget, storage, limits, and whether there is a choice at all.
        sensitivity: what the losses of every part count.
        offered: whether offered groups, MLPs that lack neurons and parts that lack entries may be
            picked, too.

    Raises:
        BudgetError: a group is too small for the budget, or limits do not go with it.
        SelectionError: a pattern of excluded or limited sublayers matches nothing.
    """
    n_given = source.n_given
    given = source.groups[:n_given]
    limits = limits_of(given, source.twins, settings)
    if settings.allocation == "uniform":
        ranks = uniform_ranks(given, settings.removed, settings.storage, limits)
        return Chosen(dict(enumerate(ranks)))
    market = _Market(source, energies, settings, sensitivity, limits)
    groups = market.groups(offered)
    options = [*groups, *market.in_gauge(groups)]
    if offered:
        options += [*market.narrowed(), *market.sparse()]
    market.require_some(options)
    numbers = {part.name: i for i, part in enumerate(p for group in given for p in group.parts)}
    cover = Cover([frozenset(numbers[part.name] for part in one.parts) for one in options])
    curves = [option.curve for option in options]
    entries = allocate_structures(curves, cover, n_given, settings.removed)
    return _chosen([(options[i], entry) for i, entry in entries.items()], market.values)


def _chosen(picked: Sequence[tuple[_Option, int]], values: Mapping[int, ValueOutput]) -> Chosen:
    ranks: dict[int, int] = {}
    plans: dict[int, Plan] = {}
    sparse: dict[int, int] = {}
    fixed: dict[int, ValueOutput] = {}
    for option, entry in picked:
        if option.plans:
            plans[option.source] = option.plans[entry]
        elif option.structure == SPARSE:
            sparse[option.source] = int(option.curve.stored[entry])
        else:
            ranks[option.source] = option.curve.rank(entry)
            ranks |= dict.fromkeys(option.values, DENSE)
            fixed |= {i: values[i] for i in option.values}
    return Chosen(dict(sorted(ranks.items())), plans, sparse, fixed)


@dataclass(frozen=True, slots=True)
class _Market:
    """All that there is to choose from, with what it stores and loses."""

    source: Spectra
    energies: Sequence[NDArray[np.float64]]
    settings: FitSettings
    sensitivity: Sensitivity
    limits: Sequence[Limit]
    """Of the given groups."""

    @property
    def _given(self) -> Sequence[Group]:
        return self.source.groups[: self.source.n_given]

    @property
    def _of_part(self) -> Mapping[str, Limit]:
        pairs = zip(self._given, self.limits, strict=True)
        return {part.name: limit for group, limit in pairs for part in group.parts}

    @property
    def values(self) -> Mapping[int, ValueOutput]:
        """Those that may be stored in the gauge if they stay dense, by the number of their group.

        Neither they nor their outputs are among those that have to stay as they are.
        """
        if not self.settings.value_gauge:
            return {}
        stay = {name for name, limit in self._of_part.items() if limit.dense}
        numbers = {group.parts[0].name: i for i, group in enumerate(self._given)}
        own = self.source.values
        return {numbers[v.value]: v for v in own if not stay & {v.value, v.output}}

    def require_some(self, options: Sequence[_Option]) -> None:
        """Refuse limits that allow some part nothing, in whatever way it is stored.

        Raises:
            BudgetError: they do.
        """
        possible = [one for one in options if np.isfinite(one.curve.loss).any()]
        stored = {part.name for option in possible for part in option.parts}
        for i, group in enumerate(self._given):
            if not {part.name for part in group.parts} <= stored:
                options[i].curve.within(self.limits[i])

    def groups(self, offered: bool) -> Sequence[_Option]:
        """The given groups, and perhaps those that are offered in their place."""
        n_given, of_part = self.source.n_given, self._of_part
        groups = self.source.groups if offered else self._given
        energies = weigh(self.sensitivity, groups, self.energies[: len(groups)])
        options = []
        for i, (group, own) in enumerate(zip(groups, energies, strict=True)):
            curve = curve_of(group, own, self.settings.storage)
            if i < n_given:
                options.append(_Option(group.parts, "", curve.limited(self.limits[i]), i))
            else:
                curve = curve.offered({of_part[part.name] for part in group.parts})
                options.append(_Option(group.parts, group.structure, curve, i))
        return options

    def in_gauge(self, groups: Sequence[_Option]) -> Iterator[_Option]:
        """Groups of outputs with their values, which stay dense and lack what the outputs take in.

        Outputs that lack entries take nothing in: they would be full again.
        """
        by_output = {own.output: (i, own) for i, own in self.values.items()}
        for option in groups:
            own = [by_output[part.name] for part in option.parts if part.name in by_output]
            if own:
                curve, parts = option.curve, [*option.parts]
                for i, values in own:
                    (part,) = groups[i].parts
                    curve = curve.beside(groups[i].curve, values.saved(part.shape[0]))
                    parts.append(part)
                numbers = [i for i, _ in own]
                yield replace(option, parts=parts, curve=curve, values=numbers)

    def narrowed(self) -> Iterator[_Option]:
        """MLPs that lack neurons."""
        of_part, storage = self._of_part, self.settings.storage
        for j, mlp in enumerate(self.source.mlps):
            own = [of_part[part.name] for part in mlp.parts]
            weights = [group_weight(self.sensitivity, Group((part,))) for part in mlp.parts]
            plans = plans_of(mlp, self.source.widths(j).weighed(weights), own, storage)
            curve = curve_of_plans(mlp.down.name, mlp.n_weights, plans)
            if plans:
                yield _Option(mlp.parts, NARROWED, curve, j, plans=plans)

    def sparse(self) -> Iterator[_Option]:
        """Parts that lack entries."""
        of_part = self._of_part
        for j, part in enumerate(self.source.sparse):
            weight = group_weight(self.sensitivity, Group((part,)))
            curve = curve_of_sparse(part, self.source.sparsities(j), weight)
            # The multiples are of ranks, of which there are none.
            limit = replace(of_part[part.name], multiple=1)
            yield _Option([part], SPARSE, curve.limited(limit), j)
