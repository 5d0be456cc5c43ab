"""What a model family looks like, as data: sizes in one dialect, and where its sublayers are.

Adding a family is adding a row to `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharebasis.errors import SelectionError
from sharebasis.settings import WeightTypeSettings


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of a model."""

    d_model: int
    """Width of the residual stream."""
    n_layers: int
    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads."""
    d_head: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where a family keeps its blocks and which of their sublayers are compressed."""

    block_pattern: str
    weight_types: Mapping[str, WeightTypeSettings]


def dims(config: Any) -> Dims:
    """Translate a HF config (or anything with its attributes) into our sizes.

    Raises:
        SelectionError: the config does not tell them.
    """
    try:
        d_model, n_heads = config.hidden_size, config.num_attention_heads
        n_layers = config.num_hidden_layers
    except AttributeError as error:
        raise SelectionError(
            f"The config of this {config.model_type!r} model does not tell its sizes ({error}); "
            "such a model is not supported."
        ) from None
    return Dims(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_head=getattr(config, "head_dim", None) or d_model // n_heads,
    )


def architecture_of(
    model_type: str,
    block_pattern: str | None = None,
    weight_types: Mapping[str, WeightTypeSettings] | None = None,
) -> Architecture:
    """Look a family up; what the caller gives takes the table's place.

    Raises:
        SelectionError: the family is not in the table and the caller did not give both.
    """
    known = ARCHITECTURES.get(model_type)
    if known is not None:
        block_pattern = known.block_pattern if block_pattern is None else block_pattern
        weight_types = known.weight_types if weight_types is None else weight_types
    if block_pattern is None or weight_types is None:
        raise SelectionError(
            f"model family {model_type!r} is not known (known: {', '.join(ARCHITECTURES)}). "
            "Say where its sublayers are with model.weight_types and model.block_pattern, or add "
            "a row to ARCHITECTURES in sharebasis/architecture.py."
        )
    return Architecture(block_pattern, weight_types)


def _plain(**patterns: str) -> dict[str, WeightTypeSettings]:
    """Weight types named after the module that ends the pattern, `q_proj='self_attn'`."""
    return {
        name: WeightTypeSettings(pattern=rf".*\.{parent}\.{name}")
        for name, parent in patterns.items()
    }


_LLAMA = Architecture(
    block_pattern=r"layers\.(\d+)\.",
    weight_types=_plain(
        q_proj="self_attn",
        k_proj="self_attn",
        v_proj="self_attn",
        o_proj="self_attn",
        gate_proj="mlp",
        up_proj="mlp",
        down_proj="mlp",
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gpt2": Architecture(
        block_pattern=r"h\.(\d+)\.",
        weight_types={
            "attn_c_attn": WeightTypeSettings(pattern=r".*\.attn\.c_attn", qkv_order="qkv"),
            "attn_c_proj": WeightTypeSettings(pattern=r".*\.attn\.c_proj"),
            "mlp_c_fc": WeightTypeSettings(pattern=r".*\.mlp\.c_fc"),
            "mlp_c_proj": WeightTypeSettings(pattern=r".*\.mlp\.c_proj"),
        },
    ),
    "gptj": Architecture(
        block_pattern=r"h\.(\d+)\.",
        weight_types=_plain(
            q_proj="attn",
            k_proj="attn",
            v_proj="attn",
            out_proj="attn",
            fc_in="mlp",
            fc_out="mlp",
        ),
    ),
    "opt": Architecture(
        block_pattern=r"layers\.(\d+)\.",
        weight_types={
            **_plain(
                q_proj="self_attn", k_proj="self_attn", v_proj="self_attn", out_proj="self_attn"
            ),
            **_plain(fc1=r"layers\.\d+", fc2=r"layers\.\d+"),
        },
    ),
    "phi": Architecture(
        block_pattern=r"layers\.(\d+)\.",
        weight_types=_plain(
            q_proj="self_attn",
            k_proj="self_attn",
            v_proj="self_attn",
            dense="self_attn",
            fc1="mlp",
            fc2="mlp",
        ),
    ),
}
