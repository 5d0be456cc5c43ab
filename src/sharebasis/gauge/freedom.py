"""Which gauge freedoms a family leaves: a table, and what the config says beside it.

Adding a family is adding a row to `POSITIONS`. Of a family that is not in it nothing is assumed
but that its neurons may be permuted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from sharebasis.architecture.dims import Dims
from sharebasis.gauge.units import Freedom

Positions = Literal["halves", "neighbours", "learned", "slopes"]
"""How attention knows of positions. halves: rotary, coordinate i with i + n/2; neighbours:
rotary, 2 i with 2 i + 1; learned: added to the stream; slopes: a bias for each head (ALiBi)."""

POSITIONS: Mapping[str, Positions] = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt"), "learned"),
    **dict.fromkeys(("bloom", "mpt"), "slopes"),
    **dict.fromkeys(("gptj", "codegen", "glm4", "cohere", "cohere2"), "neighbours"),
    **dict.fromkeys(
        (
            "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma",
            "gemma2", "gemma3_text", "olmo", "olmo2", "olmoe", "granite", "stablelm", "starcoder2",
            "smollm3", "phi", "phi3", "gpt_neox", "gpt_oss", "falcon",
        ),
        "halves",
    ),
}  # fmt: skip
"""HF `model_type` -> positions. Tested by applying random gauge elements to a model of each."""

ROOT_MEAN_SQUARE: Collection[str] = (
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "olmo2",
    "olmoe",
)
"""Families whose norms of queries and keys only divide by a length: signs pass through them.
Of other families' norms of queries and keys nothing is assumed."""

SHIFTED_UP: Collection[str] = ("gpt_oss",)
"""Families that add to up before they multiply it by the gate: it cannot be scaled."""

_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


def freedom_of(config: Any, dims: Dims, layer: int, names: Collection[str]) -> Freedom:
    """What is exact in a layer of a model.

    Args:
        config: of HF, or anything with its attributes.
        dims: of the model.
        layer: its number.
        names: of the layer's tensors, from where on the block's name ends.
    """
    family = config.model_type
    if family not in POSITIONS:
        return Freedom()
    positions = _positions(config)
    freedom = Freedom(
        query_key="all",
        planes=_planes(config, dims.d_head, layer, positions),
        value_output="all",
        heads=positions != "slopes",
        neuron_scales=family not in SHIFTED_UP,
    )
    if _clips(config):
        freedom = replace(freedom, query_key="signs", value_output="signs")
    if any(norm in name.split(".") for name in names for norm in _NORMS):
        if family in ROOT_MEAN_SQUARE:
            return replace(freedom, query_key="signs")
        return replace(freedom, query_key="none", heads=False)
    return freedom


def _positions(config: Any) -> Positions:
    if config.model_type == "falcon" and config.alibi:
        return "slopes"
    return POSITIONS[config.model_type]


def _planes(
    config: Any, d_head: int, layer: int, positions: Positions
) -> tuple[tuple[int, int], ...]:
    if positions in ("learned", "slopes") or not _rotates(config, layer):
        return ()
    n = _n_rotated(config, d_head)
    if positions == "neighbours":
        return tuple((i, i + 1) for i in range(0, n, 2))
    return tuple((i, i + n // 2) for i in range(n // 2))


def _rotates(config: Any, layer: int) -> bool:
    """Whether a layer has rotary positions at all; in some families not every one does."""
    if config.model_type == "smollm3":
        return bool(config.no_rope_layers[layer])  # 1: has them
    if config.model_type == "cohere2":
        return bool(config.layer_types[layer] == "sliding_attention")
    return True


def _n_rotated(config: Any, d_head: int) -> int:
    """Coordinates of a head that positions rotate."""
    if given := getattr(config, "rotary_dim", None):
        return int(given)
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(d_head * parameters.get("partial_rotary_factor", 1.0))


def _clips(config: Any) -> bool:
    """Whether queries, keys and values are clipped before use."""
    attention = getattr(config, "attn_config", None)
    return bool(getattr(config, "clip_qkv", None) or getattr(attention, "clip_qkv", None))
