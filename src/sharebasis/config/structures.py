"""Which structures there are: what an entry of `fit.structures` may be, and who implements it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sharebasis.errors import SettingsError


@dataclass(frozen=True)
class StructureEntry:
    """A structure, as far as settings know it."""

    implementation: str
    """module:attribute; a name, as settings are read where torch is not loaded."""
    pattern: str
    """Regular expression that a whole entry of `fit.structures` matches."""
    spelling: str = ""
    """What entries look like, for messages; the pattern, if there is nothing to add to it."""


_N = r"([2-9]|[1-9]\d+)"

STRUCTURES: dict[str, StructureEntry] = {
    "private": StructureEntry("sharebasis.structures.private:Private", "private"),
    "shared": StructureEntry(
        "sharebasis.structures.shared:Shared",
        rf"fixed|joint|experts|(shared:(all|{_N})|by_distance:{_N})(:inner)?",
        "fixed, joint, experts, shared:N (N from 2), shared:all, by_distance:N (the last three "
        "with :inner behind them or without)",
    ),
    "neurons": StructureEntry("sharebasis.structures.neurons:Neurons", "narrowed"),
    "sparse": StructureEntry("sharebasis.structures.sparse:Sparse", "sparse"),
}
"""Name -> structure. A line more is all that settings have to know of another one."""


def structure_entry(spec: str) -> tuple[str, StructureEntry]:
    """The structure that an entry of `fit.structures` asks for, and its name.

    Raises:
        SettingsError: none of them is written like that.
    """
    for name, entry in STRUCTURES.items():
        if re.fullmatch(entry.pattern, spec):
            return name, entry
    known = ", ".join(entry.spelling or entry.pattern for entry in STRUCTURES.values())
    raise SettingsError(f"fit.structures: {spec!r} is none of {known}.")
