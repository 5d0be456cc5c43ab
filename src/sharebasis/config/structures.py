"""Structures that `fit.structures` may name, a line each.

Another one is a file in `structures/` and a line here. Where it is, is a string, as settings are
read before torch is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sharebasis.errors import SettingsError

_MANY = r"([2-9]|[1-9]\d+)"


@dataclass(frozen=True, slots=True)
class StructureEntry:
    """A structure, and how settings name it."""

    implementation: str
    """`module:class`, of a `sharebasis.structures.structure.Structure`."""
    pattern: str
    """Regular expression of what names it."""
    spelling: str = ""
    """What names it, for messages; the pattern, if there is nothing to add to that."""
    always: bool = False
    """Whether it is offered without being named."""
    baseline: str | None = None
    """The name under which it covers every part once: what there is without a choice."""
    over_layers: str | None = None
    """Regular expression of names under which layers share, of the families of `fit.shared`."""
    reads_correlations: bool = False
    """Whether it asks for a method that looks at how inputs are correlated."""


STRUCTURES: dict[str, StructureEntry] = {
    "private": StructureEntry(
        "sharebasis.structures.private:Private", "private", baseline="private"
    ),
    "shared": StructureEntry(
        "sharebasis.structures.shared:Shared",
        rf"fixed|joint|experts|(shared:(all|{_MANY})|by_distance:{_MANY})(:inner)?",
        "fixed, joint, experts, shared:N (N from 2), shared:all and by_distance:N, the last three "
        "with :inner behind them or without",
        baseline="fixed",
        over_layers="(shared|by_distance):.*",
    ),
    "value_gauge": StructureEntry(
        "sharebasis.structures.value_gauge:ValueGauges", "value_gauge", always=True
    ),
    "neurons": StructureEntry(
        "sharebasis.structures.neurons:Neurons", "neurons", reads_correlations=True
    ),
    "sparse": StructureEntry(
        "sharebasis.structures.sparse:Sparse", "sparse", reads_correlations=True
    ),
}
"""By name, in the order in which they are offered."""


def structure_name(spec: str) -> str:
    """The name of the structure that an entry of `fit.structures` stands for.

    Raises:
        SettingsError: there is none.
    """
    for name, entry in STRUCTURES.items():
        if not entry.always and re.fullmatch(entry.pattern, spec):
            return name
    named = (entry for entry in STRUCTURES.values() if not entry.always)
    known = ", ".join(entry.spelling or entry.pattern for entry in named)
    raise SettingsError(f"fit.structures: {spec!r} is none of {known}.")
