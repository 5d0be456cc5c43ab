"""The Sublayer record: one linear sublayer of a block, and what it does to the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.model_family import Architecture
from sharebasis.architecture.roles import FAMILIES, Evidence, Role
from sharebasis.config.model import WeightTypeSettings
from sharebasis.config.types import Family

LinearType = Literal["Linear", "Conv1D"]

UNSELECTED = WeightTypeSettings(".*")
"""Of a sublayer that no weight type selects: not fused, and what its name says."""


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
        return self.architecture.weight_types.get(sublayer.weight_type or "", UNSELECTED)

    def by_category(self) -> Mapping[Role, Mapping[Family, tuple[Sublayer, ...]]]:
        """The sublayers by what they do to the residual stream and by what they compute.

        Returns:
            Role (read, write, neither, ambiguous_unknown; those that occur, in this order) ->
            family (q, k, v, o, gate, up, down, then fused and other) -> sublayers in the model's
            order, selected or not.

        Example:
            >>> from transformers import AutoModelForCausalLM, GPT2Config
            >>> from sharebasis import classify
            >>> config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
            >>> categories = classify(AutoModelForCausalLM.from_config(config)).by_category()
            >>> {role: list(families) for role, families in categories.items()}
            {'read': ['up', 'fused'], 'write': ['o', 'down']}
            >>> [sublayer.name for sublayer in categories["write"]["o"]]
            ['transformer.h.0.attn.c_proj', 'transformer.h.1.attn.c_proj']
        """
        categories: dict[Role, dict[Family, tuple[Sublayer, ...]]] = {}
        for role in get_args(Role):
            of_role = [sublayer for sublayer in self.sublayers if sublayer.role == role]
            families = {
                family: tuple(sublayer for sublayer in of_role if sublayer.family == family)
                for family in get_args(Family)
            }
            if of_role:
                categories[role] = {
                    name: of_family for name, of_family in families.items() if of_family
                }
        return categories

    @property
    def blocks(self) -> Mapping[int, str]:
        """Layer -> HF name of its block, in their order; of the layers that have a sublayer."""
        return {x.layer: x.block for x in sorted(self.sublayers, key=lambda x: x.layer)}


def in_order(families: Iterable[str]) -> list[str]:
    """Each family once, the attention's and the MLP's first; for tables and pictures."""

    def place(family: str) -> tuple[int, str]:
        return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), family)

    return sorted(set(families), key=place)
