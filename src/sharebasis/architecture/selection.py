"""The linear modules of a model -> those that may be compressed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sharebasis.architecture.model_family import Architecture
from sharebasis.architecture.roles import EXPERT, Role, evidence_of, family_of, residual_role
from sharebasis.architecture.sublayers import LinearType, Sublayer
from sharebasis.errors import SelectionError


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A Linear or Conv1D as a model has it; `shape` is (d_out, d_in) for both."""

    name: str
    type: LinearType
    shape: tuple[int, int]
    bias: bool
    tied_to: str | None = None
    """Name of the module whose weight this one uses, too."""


def classify(
    modules: Iterable[LinearModule],
    architecture: Architecture,
    d_model: int,
    traced: Mapping[str, Role] | None = None,
) -> tuple[Sublayer, ...]:
    """Make a record of every linear sublayer that lies in a block, selected or not.

    Args:
        modules: of the model, in its order.
        architecture: where its blocks are, and what is selected.
        d_model: width of the residual stream.
        traced: HF name -> role, of the sublayers that were seen to run.

    Raises:
        SelectionError: a pattern is not a regular expression, matches nothing, matches
            outside the blocks, or two of them match one module; or the block pattern
            captures no number.
    """
    modules = tuple(modules)
    block = compiled(architecture.block_pattern, "block_pattern")
    if block.groups != 1:
        raise SelectionError(
            f"block_pattern {block.pattern!r} has {block.groups} groups; it needs exactly one, "
            r"around the layer number, as in 'h\.(\d+)'."
        )
    chosen = _select(modules, architecture)
    records = []
    for module in modules:
        place = block.search(module.name)
        if place is None:
            if module.name in chosen:
                raise SelectionError(
                    f"{module.name} is selected by weight type {chosen[module.name]!r}, but "
                    f"block_pattern {block.pattern!r} finds no layer number in its name."
                )
            continue
        if not (place[1] or "").isdigit():
            raise SelectionError(
                f"block_pattern {block.pattern!r} captures {place[1]!r} in {module.name}, which "
                r"is no layer number; capture digits, as in 'h\.(\d+)'."
            )
        role = (traced or {}).get(module.name)
        weight_type = chosen.get(module.name)
        records.append(_record(module, place, weight_type, architecture, d_model, role))
    return tuple(records)


def _record(
    module: LinearModule,
    place: re.Match[str],
    weight_type: str | None,
    architecture: Architecture,
    d_model: int,
    traced: Role | None,
) -> Sublayer:
    settings = architecture.weight_types.get(weight_type) if weight_type else None
    role, evidence = residual_role(module.name, module.shape, d_model, traced)
    expert = EXPERT.search(module.name)
    return Sublayer(
        name=module.name,
        slot=module.name[: place.start(1)] + "*" + module.name[place.end(1) :],
        layer=int(place[1]),
        expert=int(expert[2]) if expert else None,
        weight_type=weight_type,
        family=(settings and settings.family) or family_of(module.name),
        type=module.type,
        shape=module.shape,
        bias=module.bias,
        role=role,
        evidence=evidence,
        says=evidence_of(module.name, module.shape, d_model, traced),
        tied_to=module.tied_to,
    )


def _select(modules: tuple[LinearModule, ...], architecture: Architecture) -> dict[str, str]:
    """Which weight type selects which module, by HF name."""
    if not architecture.weight_types:
        raise SelectionError("weight_types is empty: nothing would be compressed.")
    chosen: dict[str, str] = {}
    for weight_type, settings in architecture.weight_types.items():
        pattern = compiled(settings.pattern, f"weight_types.{weight_type}.pattern")
        names = [module.name for module in modules if pattern.fullmatch(module.name)]
        if not names:
            examples = ", ".join(module.name for module in modules[:8])
            raise SelectionError(
                f"weight_types.{weight_type}.pattern {pattern.pattern!r} matches none of the "
                f"model's {len(modules)} linear modules (a pattern must match the whole name). "
                f"The first names are: {examples}"
            )
        for name in names:
            if name in chosen:
                raise SelectionError(
                    f"{name} is matched by two weight types, {chosen[name]!r} and "
                    f"{weight_type!r}; make their patterns disjoint."
                )
            chosen[name] = weight_type
    return chosen


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compile what a user wrote.

    Raises:
        SelectionError: it is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SelectionError(f"{where} {pattern!r} is not a regular expression: {error}.") from None
