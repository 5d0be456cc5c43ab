"""Patterns of sublayer names -> how much of every group may be stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from sharebasis.architecture.groups import Group
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import Family
from sharebasis.errors import SelectionError


@dataclass(frozen=True, slots=True)
class Limit:
    """How many of a group's numbers are stored, as fractions of the original."""

    floor: float = 0.0
    """At least."""
    cap: float = 1.0
    """At most."""
    multiple: int = 1
    """Of which every rank is a multiple; dense weights have no rank and are not affected."""
    dense: bool = False
    """Whether the group stays as it is."""

    def __str__(self) -> str:
        if self.dense:
            return "dense"
        return f"fractions {self.floor:.4g} to {self.cap:.4g}, ranks in steps of {self.multiple}"


def limits_of(
    groups: Sequence[Group], tied_names: Mapping[str, Sequence[str]], settings: FitSettings
) -> Sequence[Limit]:
    """The limit of every group; where several settings name a group, all of them hold.

    Args:
        groups: at most one for each part.
        tied_names: sublayer -> those that are tied to it; a pattern may name any of them.
        settings: `exclude`, `limits` and `rank_multiple`.

    Raises:
        SelectionError: a pattern matches nothing, or one sublayer of a group without another
            that shares its basis.
    """
    names = [
        [[part.sublayer.name, *tied_names[part.sublayer.name]] for part in group.parts]
        for group in groups
    ]
    excluded = [_matched(pattern, names, "fit.exclude") for pattern in settings.exclude]
    dense = set().union(*excluded)
    floors, caps = [0.0] * len(groups), [1.0] * len(groups)
    for entry in settings.limits:
        if entry.sublayers in get_args(Family):
            chosen = _of_family(entry.sublayers, groups)
        else:
            chosen = _matched(entry.sublayers, names, "fit.limits")
        for i in chosen:
            floors[i], caps[i] = max(floors[i], entry.floor), min(caps[i], entry.cap)
    multiple = settings.rank_multiple
    ranges = enumerate(zip(floors, caps, strict=True))
    return [Limit(floor, cap, multiple, i in dense) for i, (floor, cap) in ranges]


def _of_family(family: str, groups: Sequence[Group]) -> set[int]:
    chosen = {i for i, group in enumerate(groups) if group.family == family}
    if not chosen:
        families = ", ".join(sorted({group.family for group in groups}))
        raise SelectionError(f"fit.limits names the family {family}, but there is only {families}.")
    return chosen


def _matched(pattern: str, names: Sequence[Sequence[Sequence[str]]], where: str) -> set[int]:
    """Groups all of whose parts have a name that matches."""
    chosen = set()
    for i, parts in enumerate(names):
        hits = [any(re.fullmatch(pattern, name) for name in of_part) for of_part in parts]
        if all(hits):
            chosen.add(i)
        elif any(hits):
            matched, unmatched = parts[hits.index(True)][0], parts[hits.index(False)][0]
            raise SelectionError(
                f"{where}: {pattern!r} matches {matched}, but not {unmatched}, with which it "
                "shares a basis; match both or neither, or let them not share (fit.shared)."
            )
    if not chosen:
        raise SelectionError(
            f"{where}: {pattern!r} matches the whole name of no selected sublayer; the first of "
            f"them is {names[0][0][0]}."
        )
    return chosen
