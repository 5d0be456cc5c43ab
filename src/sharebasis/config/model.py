"""Settings of the group `model`, and `split`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sharebasis.config.types import DType, Family, PositiveInt, SplitStrategy


@dataclass(frozen=True)
class WeightTypeSettings:
    """Which modules are one weight type, and how each of them is laid out."""

    pattern: str
    """Regular expression that a module's whole HF name must match."""
    family: Family | None = None
    """What the sublayer computes; None reads it off the name."""
    split: SplitStrategy | None = None
    """How to cut this weight type; None follows `split.strategy`."""
    qkv_order: str | None = None
    """Order of the blocks of a fused q, k and v, a permutation of 'qkv' (or of 'kv')."""
    gate_up_order: Literal["gate_up", "up_gate"] | None = None
    """Order of the blocks of a fused gate and up projection."""
    interleave: Literal["head", "row"] | PositiveInt | None = None
    """How the blocks of a fused weight take turns. None: not at all, one after the other.
    head: q, k and v of one key-value head, then of the next. row: a row of each in turn.
    A number: that many groups, each with its share of q, k and v."""
    n_head: PositiveInt | None = None
    """Query heads; None reads the model's config."""
    n_kv_head: PositiveInt | None = None
    """Key and value heads; None is the config's, or `n_head` where that is given."""

    @property
    def fused(self) -> bool:
        return bool(self.qkv_order or self.gate_up_order)


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and which of its sublayers."""

    source: str
    """Hub id, directory in hub format, GGUF file, or `package:NAME` (a GGUF inside an
    installed package)."""
    tracked: str
    """File or directory whose content stands for the source in `dvc repro`."""
    revision: str | None
    """Commit or tag of a hub id; None is its main branch."""
    dtype: DType
    """Arithmetic of the forward passes. Weights are stored as the source has them."""
    weight_types: Mapping[str, WeightTypeSettings] | None
    """Name -> weight type; None takes the table of known families."""
    block_pattern: str | None
    """Regular expression whose one group captures the layer number; None as above."""


@dataclass(frozen=True)
class SplitSettings:
    """How a sublayer is cut into parts."""

    strategy: SplitStrategy
    """none: whole; qkv: a fused weight becomes q, k and v; heads: every head a part."""
