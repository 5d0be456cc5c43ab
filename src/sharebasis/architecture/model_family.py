"""A row of the table of families: where a family keeps its sublayers, and what its code alone
tells of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sharebasis.config.model import WeightTypeSettings

Positions = Literal["halves", "neighbours", "learned", "slopes"]
"""How attention knows of positions. halves: rotary, coordinate i with i + n/2; neighbours:
rotary, 2 i with 2 i + 1; learned: added to the stream; slopes: a bias for each head (ALiBi)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where a family keeps its blocks and which of their sublayers are compressed."""

    block_pattern: str
    """Regular expression whose one group captures the layer number."""
    weight_types: Mapping[str, WeightTypeSettings]


@dataclass(frozen=True, slots=True)
class ModelFamily(Architecture):
    """A row of `ARCHITECTURES`.

    What follows the weight types says which changes of a layer are exact (`sharebasis.gauge`).
    """

    positions: Positions | None = None
    """None: nobody has looked; neurons may be permuted, and nothing else is assumed."""
    sliding_layers_rotate: bool = False
    """Whether only layers of sliding attention have rotary positions."""
    qk_norms_keep_signs: bool = False
    """Whether norms of queries and keys only divide by a length, so that signs pass through them.
    Of other families' norms of queries and keys nothing is assumed."""
    up_is_shifted: bool = False
    """Whether something is added to up before the gate multiplies it: it cannot be scaled."""


def model_family(
    blocks: str,
    *paths: str,
    positions: Positions | None = None,
    sliding_layers_rotate: bool = False,
    qk_norms_keep_signs: bool = False,
    up_is_shifted: bool = False,
    **settings: Mapping[str, Any],
) -> ModelFamily:
    """Make a row of the table.

    Args:
        blocks: name of the list of blocks.
        paths: of sublayers in a block, `*` for the number of an expert.
        positions, sliding_layers_rotate, qk_norms_keep_signs, up_is_shifted: as of `ModelFamily`.
        settings: weight type (`weight_type_name` of a path) -> fields of `WeightTypeSettings`,
            for what there is to say of it beside its pattern.

    Example:
        >>> row = model_family(
        ...     "layers", "attn.qkv", "attn.o_proj", attn_qkv={"qkv_order": "qkv"}
        ... )
        >>> list(row.weight_types), row.weight_types["attn_qkv"].qkv_order
        (['attn_qkv', 'attn_o_proj'], 'qkv')
    """
    return ModelFamily(
        block_pattern=rf"(?:^|\.){blocks}\.(\d+)\.",
        weight_types={
            name: WeightTypeSettings(
                r".*\." + slot_pattern(path), **{**layout_of(path), **settings.get(name, {})}
            )
            for path in paths
            for name in [weight_type_name(path)]
        },
        positions=positions,
        sliding_layers_rotate=sliding_layers_rotate,
        qk_norms_keep_signs=qk_norms_keep_signs,
        up_is_shifted=up_is_shifted,
    )


def weight_type_name(path: str) -> str:
    """Name of the weight type of the modules that end in a path: `attn.c_attn` -> `attn_c_attn`."""
    return path.replace(".*", "").replace(".", "_")


def slot_pattern(slot: str) -> str:
    """Pattern of the modules of a name in which `*` stands for any number."""
    return re.escape(slot).replace(r"\*", r"\d+")


LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    # Latent attention: keys without a position, then values, head by head.
    "kv_b_proj": {"qkv_order": "kv", "interleave": "head"},
}
"""Last component of a module's name -> how whoever uses that name lays the weight out."""


def layout_of(path: str) -> Mapping[str, Any]:
    """What the end of a path tells of a layout."""
    return LAYOUTS.get(path.rsplit(".", 1)[-1], {})
