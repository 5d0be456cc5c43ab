"""artifacts/spectra and a budget -> what becomes of every part, for the least loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from sharebasis.allocation.lagrangian import allocate
from sharebasis.allocation.loss_weights import part_weight
from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.allocation.uniform import uniform_ranks
from sharebasis.config.fit import FitSettings
from sharebasis.linalg.exact_cover import Cover
from sharebasis.spectra.store import Spectra
from sharebasis.structures.limits import limits_of
from sharebasis.structures.structure import MeasuredCell, Offer, Terms

Pick = tuple[MeasuredCell, Any]
"""A cell, and the point of it that was picked."""


def choose(
    spectra: Spectra, settings: FitSettings, sensitivity: Sensitivity, has_moments: bool
) -> Sequence[Pick]:
    """Pick what there will be, and what each of it keeps, for the least loss in the budget.

    Args:
        spectra: the cells to choose from.
        settings: budget, storage, limits, and whether there is a choice at all.
        sensitivity: what the losses of every part count.
        has_moments: without them, what needs them is not offered.

    Raises:
        BudgetError: a group is too small for the budget, or limits do not go with it.
        SelectionError: a pattern of excluded or limited sublayers matches nothing.
    """
    baseline = spectra.baseline
    limits = limits_of(baseline, spectra.tied_names, settings)
    by_part = {
        part.name: limit
        for group, limit in zip(baseline, limits, strict=True)
        for part in group.parts
    }
    terms = Terms(settings, by_part, spectra.energies, partial(part_weight, sensitivity))
    (first, cells), *others = spectra.by_structure
    terms.offers.extend(first.offers(cells, terms))
    if settings.allocation == "uniform":
        ranks = uniform_ranks(baseline, settings.removed, settings.storage, limits)
        return [(offer.cell, rank) for offer, rank in zip(terms.offers, ranks, strict=True)]
    for structure, cells in others:
        if has_moments or not structure.needs_moments:
            terms.offers.extend(structure.offers(cells, terms))
    _require_some(terms, len(baseline))
    numbers = {name: i for i, name in enumerate(by_part)}
    cover = Cover([frozenset(numbers[p.name] for p in offer.parts) for offer in terms.offers])
    curves = [offer.curve for offer in terms.offers]
    entries = allocate(curves, cover, len(baseline), settings.removed)
    offers = ((terms.offers[i], entry) for i, entry in entries.items())
    return [(offer.cell, offer.points[entry]) for offer, entry in offers]


def _require_some(terms: Terms, n_baseline: int) -> None:
    """Refuse limits that allow some part nothing, in whatever way it is stored.

    Raises:
        BudgetError: they do.
    """
    possible = [offer for offer in terms.offers if np.isfinite(offer.curve.loss).any()]
    stored = {part.name for offer in possible for part in offer.parts}
    for offer in terms.offers[:n_baseline]:
        if not {part.name for part in offer.parts} <= stored:
            _refuse(offer, terms)


def _refuse(offer: Offer, terms: Terms) -> None:
    offer.curve.within(terms.limits[offer.parts[0].name])
