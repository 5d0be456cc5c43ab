"""Distinct inputs of sublayers: q, k and v read one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import cast

from torch import nn

from sharebasis.errors import CalibrationError
from sharebasis.model.hooks import watched


@dataclass(frozen=True, slots=True)
class Site:
    """One input, and every sublayer that reads it."""

    name: str
    """HF name of the first reader."""
    readers: tuple[str, ...]
    d: int
    """Width of the input."""


def find_sites(
    model: nn.Module,
    names: Iterable[str],
    run: Callable[[], object],
    idle: Collection[str] = (),
) -> tuple[Site, ...]:
    """Find out, by running the model once, which sublayers read the same tensor.

    Two sublayers share a site if they are given the same memory, seen the same way;
    q, k and v do, and gate and up, whatever the family calls them.

    Args:
        model: that holds the sublayers.
        names: HF names of the sublayers.
        run: called without arguments, runs a few tokens through `model`.
        idle: sublayers that need not run on them, as experts; each is a site of its own then.

    Raises:
        CalibrationError: a sublayer did not run.
    """
    names = tuple(names)
    # What they are given is held, so that no memory is used twice.
    with watched({name: model.get_submodule(name) for name in names}) as inputs:
        run()
    if silent := [name for name in names if name not in inputs and name not in idle]:
        raise CalibrationError(
            f"{len(silent)} selected sublayers did not run on the probe, {silent[0]} among them; "
            "exclude them from the selection (model.weight_types)."
        )
    readers: dict[tuple[int | str, int, int], list[str]] = {}
    for name in names:
        if name in inputs:
            x = inputs[name]
            key: tuple[int | str, int, int] = (x.data_ptr(), x.numel(), x.shape[-1])
        else:
            key = (name, 0, cast(int, model.get_submodule(name).in_features))
        readers.setdefault(key, []).append(name)
    return tuple(Site(of_site[0], tuple(of_site), key[2]) for key, of_site in readers.items())
