"""Names in `fit.structures` -> structures."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from sharebasis.config.structures import STRUCTURES, structure_name
from sharebasis.structures.structure import Structure


def structure(name: str, specs: Sequence[str] = ()) -> Structure:
    """A structure of the table.

    Args:
        name: in `config.structures.STRUCTURES`.
        specs: the entries of `fit.structures` that name it.
    """
    module, _, kind = STRUCTURES[name].implementation.partition(":")
    instance: Structure = getattr(import_module(module), kind)(specs)
    return instance


def structures_of(specs: Sequence[str]) -> Sequence[tuple[str, Structure]]:
    """The baseline, and then what is offered in its place, in the order of the table, with names.

    Args:
        specs: `fit.structures`. `private` is the baseline where no other of them is one.
    """
    named: dict[str, list[str]] = {name: [] for name, entry in STRUCTURES.items() if entry.always}
    baseline = "private", structure("private", ["private"])
    for spec in dict.fromkeys(specs):
        name = structure_name(spec)
        alone = structure(name, [spec])
        if not alone.is_baseline:
            named.setdefault(name, []).append(spec)
        elif name != "private":
            baseline = name, alone
    offered = [(name, structure(name, named[name])) for name in STRUCTURES if name in named]
    return [baseline, *offered]
