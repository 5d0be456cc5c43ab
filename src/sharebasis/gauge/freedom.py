"""Which gauge freedoms a layer leaves: by the row of its family, and by what the config says.

Of a family without a row, or whose row does not tell its positions, nothing is assumed but that
its neurons may be permuted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.model_family import ModelFamily, Positions
from sharebasis.gauge.units import Freedom

_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


def freedom_of(config: Any, dims: Dims, layer: int, names: Collection[str]) -> Freedom:
    """What is exact in a layer of a model.

    Args:
        config: of HF, or anything with its attributes.
        dims: of the model.
        layer: its number.
        names: of the layer's tensors, from where on the block's name ends.
    """
    family = ARCHITECTURES.get(config.model_type)
    if family is None or family.positions is None:
        return Freedom()
    positions = "slopes" if getattr(config, "alibi", False) else family.positions
    rotates = positions in ("halves", "neighbours") and _rotates(config, family, layer)
    freedom = Freedom(
        query_key="all",
        planes=_planes(_n_rotated(config, dims.d_head), positions) if rotates else (),
        value_output="all",
        heads=positions != "slopes",
        neuron_scales=not family.up_is_shifted,
    )
    if _clips(config):
        freedom = replace(freedom, query_key="signs", value_output="signs")
    if any(norm in name.split(".") for name in names for norm in _NORMS):
        if family.qk_norms_keep_signs:
            return replace(freedom, query_key="signs")
        return replace(freedom, query_key="none", heads=False)
    return freedom


def _planes(n: int, positions: Positions) -> tuple[tuple[int, int], ...]:
    """Pairs of `n` coordinates that rotary positions turn against each other."""
    if positions == "neighbours":
        return tuple((i, i + 1) for i in range(0, n, 2))
    return tuple((i, i + n // 2) for i in range(n // 2))


def _rotates(config: Any, family: ModelFamily, layer: int) -> bool:
    """Whether a layer of a rotary family has positions at all; in some not every one does."""
    if family.sliding_layers_rotate:
        return bool(config.layer_types[layer] == "sliding_attention")
    rotating = getattr(config, "no_rope_layers", None)  # 1: has them
    return rotating is None or bool(rotating[layer])


def _n_rotated(config: Any, d_head: int) -> int:
    """Coordinates of a head that positions rotate."""
    if n_rotated := getattr(config, "rotary_dim", None):
        return int(n_rotated)
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(d_head * parameters.get("partial_rotary_factor", 1.0))


def _clips(config: Any) -> bool:
    """Whether queries, keys and values are clipped before use."""
    attention = getattr(config, "attn_config", None)
    return bool(getattr(config, "clip_qkv", None) or getattr(attention, "clip_qkv", None))
