"""The Sublayer record: one linear sublayer of a block, and what it does to the residual stream."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sharebasis.architecture import Architecture, Dims
from sharebasis.errors import SelectionError
from sharebasis.settings import Family, WeightTypeSettings

Role = Literal["read", "write", "neither", "ambiguous_unknown"]
Evidence = Literal["trace", "shape", "name", "none"]
LinearType = Literal["Linear", "Conv1D"]

FAMILIES: tuple[Family, ...] = ("q", "k", "v", "o", "gate", "up", "down")
"""Those that say what a sublayer computes, in the order in which a block does."""

# The names follow the reference behaviour and are deliberately narrow, because a wrong role
# is worse than an unknown one.
_WRITE_NAME = re.compile(r"(^|\.)(o_proj|out_proj|down_proj|d_proj)$|attn[^.]*\.(.*\.)?c_proj$")
_READ_NAME = re.compile(
    r"(^|[._])(q|k|v|qkv|query|key|value|query_key_value|wqkv|up|gate|in)(_proj)?$", re.IGNORECASE
)
_EXPERT = re.compile(r"(?<=\.experts\.)((?:[a-z]\w*\.)?)(\d+)(?=\.|$)")
"""The number of an expert, in `experts.3.up_proj` or `experts.up_proj.3`."""

_UNSELECTED = WeightTypeSettings(".*")
"""Of a sublayer that no weight type selects: not fused, and what its name says."""

_FAMILY_BY_NAME: tuple[tuple[re.Pattern[str], Family], ...] = (
    (re.compile(r"(^|\.)(q_proj|q_b_proj|q|query|q_lin)$"), "q"),
    (re.compile(r"(^|\.)(k_proj|k|key|k_lin)$"), "k"),
    (re.compile(r"(^|\.)(v_proj|v|value|v_lin)$"), "v"),
    (
        re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|query_key_value|Wqkv|kv_b_proj|gate_up_proj)$"),
        "fused",
    ),
    (re.compile(r"att[^.]*\.(.*\.)?(o_proj|out_proj|c_proj|dense)$"), "o"),
    (re.compile(r"(^|\.)(gate_proj|gate)$"), "gate"),
    (re.compile(r"(^|\.)(up_proj|c_fc|fc1|fc_in|dense_h_to_4h)$"), "up"),
    (re.compile(r"(^|\.)(down_proj|fc2|fc_out|dense_4h_to_h)$|mlp\.c_proj$"), "down"),
)


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A Linear or Conv1D as a model has it; `shape` is (d_out, d_in) for both."""

    name: str
    type: LinearType
    shape: tuple[int, int]
    bias: bool
    tied_to: str | None = None
    """Name of the module whose weight this one uses, too."""


@dataclass(frozen=True, slots=True)
class Sublayer:
    """One linear sublayer of one block."""

    name: str
    """HF name of the module."""
    slot: str
    """The name with the layer number replaced by `*`: the same in every block."""
    layer: int
    weight_type: str | None
    """The weight type that selects it for compression; None: it stays as it is."""
    family: Family
    type: LinearType
    shape: tuple[int, int]
    """(d_out, d_in), whatever way round the module stores it."""
    bias: bool
    role: Role
    """Residual role: reads the stream, writes to it, or touches it on neither side."""
    evidence: Evidence
    """By what the role was decided: trace before shape before name."""
    says: Mapping[Evidence, Role] = field(default_factory=dict)
    """What each kind of evidence says; those that say nothing are not there."""
    expert: int | None = None
    """The number of the expert that it is a matrix of."""
    tied_to: str | None = None
    """HF name of the sublayer whose weight this one uses, too."""

    def part_name(self, label: str) -> str:
        """Of some of its rows, which are called so; '' is all of it."""
        return f"{self.name}[{label}]" if label else self.name

    @property
    def selected(self) -> bool:
        return self.weight_type is not None

    @property
    def block(self) -> str:
        """HF name of the block that it lies in: its own name up to the layer number."""
        digits = len(self.name) - len(self.slot) + 1
        return self.name[: self.slot.index("*") + digits]

    @property
    def disagreement(self) -> str:
        """Which evidence says what, where not all say the same; else empty."""
        if len(set(self.says.values())) < 2:
            return ""
        return ", ".join(f"{evidence}: {role}" for evidence, role in self.says.items())

    @property
    def category(self) -> str:
        """The five-way view by shape and name: write, read, ambiguous_write, ambiguous_read,
        ambiguous_unknown (and neither, for what touches d_model on neither side)."""
        by_shape = self.says.get("shape")
        return by_shape or f"ambiguous_{self.says.get('name', 'unknown')}"


@dataclass(frozen=True)
class Classification:
    """Every linear sublayer of a model: artifacts/sublayers.json."""

    model_type: str
    dims: Dims
    architecture: Architecture
    sublayers: tuple[Sublayer, ...]

    @property
    def selected(self) -> tuple[Sublayer, ...]:
        return tuple(sublayer for sublayer in self.sublayers if sublayer.selected)

    def settings_of(self, sublayer: Sublayer) -> WeightTypeSettings:
        """What its weight type says of how it is laid out; nothing, where it has none."""
        return self.architecture.weight_types.get(sublayer.weight_type or "", _UNSELECTED)

    @property
    def blocks(self) -> Mapping[int, str]:
        """Layer -> HF name of its block, in their order; of the layers that have a sublayer."""
        return {x.layer: x.block for x in sorted(self.sublayers, key=lambda x: x.layer)}


def role_by_shape(shape: tuple[int, int], d_model: int) -> Role | None:
    """What the shape (d_out, d_in) tells; None for a square weight of width d_model."""
    match shape[0] == d_model, shape[1] == d_model:
        case True, False:
            return "write"
        case False, True:
            return "read"
        case False, False:
            return "neither"
    return None


def role_by_name(name: str) -> Role | None:
    """What the HF name tells; None where it is none of the well-known ones."""
    name = _without_expert(name)
    if _WRITE_NAME.search(name):
        return "write"
    return "read" if _READ_NAME.search(name) else None


def residual_role(
    name: str, shape: tuple[int, int], d_model: int, traced: Role | None = None
) -> tuple[Role, Evidence]:
    """Decide what a linear sublayer does to the residual stream, and say by what.

    Args: as of `evidence_of`.
    """
    for evidence, role in evidence_of(name, shape, d_model, traced).items():
        return role, evidence
    return "ambiguous_unknown", "none"


def evidence_of(
    name: str, shape: tuple[int, int], d_model: int, traced: Role | None = None
) -> Mapping[Evidence, Role]:
    """What each kind of evidence says, the strongest first; those that say nothing are left out.

    Args:
        name: HF name of the module.
        shape: (d_out, d_in).
        d_model: width of the residual stream.
        traced: what running the model showed; None or ambiguous_unknown: nothing.
    """
    by_trace = None if traced == "ambiguous_unknown" else traced
    all_three: Mapping[Evidence, Role | None] = {
        "trace": by_trace,
        "shape": role_by_shape(shape, d_model),
        "name": role_by_name(name),
    }
    return {evidence: role for evidence, role in all_three.items() if role}


def family_of(name: str) -> Family:
    """Read off a module's HF name what it computes; `other` where the name does not tell."""
    name = _without_expert(name)
    return next((family for pattern, family in _FAMILY_BY_NAME if pattern.search(name)), "other")


def in_order(families: Iterable[str]) -> list[str]:
    """Each family once, the attention's and the MLP's first; for tables and pictures."""

    def place(family: str) -> tuple[int, str]:
        return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), family)

    return sorted(set(families), key=place)


def _without_expert(name: str) -> str:
    """`experts.up_proj.3` -> `experts.up_proj`; `experts.3.up_proj` stays."""
    return re.sub(r"\.\d+$", "", name)


def expert_slot(name: str, number: str = "*") -> str:
    """A name or slot with `number` for that of the expert; the same where there is none."""
    return _EXPERT.sub(lambda match: match[1] + number, name)


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
    expert = _EXPERT.search(module.name)
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
