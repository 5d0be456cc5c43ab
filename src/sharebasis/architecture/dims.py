"""The sizes of a model, in one dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sharebasis.errors import SelectionError


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
    d_v: int | None = None
    """Width of a value head; None: that of the others."""


def dims(config: Any) -> Dims:
    """Translate a HF config (or anything with its attributes) into our sizes.

    Raises:
        SelectionError: the config does not tell them.
    """
    nested = getattr(config, "get_text_config", None)
    text = nested(decoder=True) if nested else config
    try:
        d_model, n_layers = text.hidden_size, text.num_hidden_layers
        n_heads = getattr(text, "num_attention_heads", 1)  # of a model without attention
        if text is config and hasattr(text, "decoder_layers"):
            # The decoder of a pair, taken alone: transformers gives the encoder's counts.
            n_layers, n_heads = text.decoder_layers, text.decoder_attention_heads
    except AttributeError as error:
        raise SelectionError(
            f"The config of this {config.model_type!r} model does not tell its sizes ({error}); "
            "such a model is not supported."
        ) from None
    return Dims(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_n_kv_heads(text) or n_heads,
        d_head=getattr(text, "head_dim", None) or d_model // n_heads,
        d_v=getattr(text, "v_head_dim", None),
    )


def _n_kv_heads(config: Any) -> int | None:
    """Key and value heads; None: as many as query heads."""
    if getattr(config, "kv_lora_rank", None):
        return None  # every query head has its own, made of the latent
    if n_kv_heads := getattr(config, "num_key_value_heads", None):
        return int(n_kv_heads)
    # Falcon and GPT-BigCode: a flag for a single one; Falcon's newer layout goes by a number.
    newer = getattr(config, "new_decoder_architecture", False)
    if getattr(config, "multi_query", False) and not newer:
        return 1
    return getattr(config, "num_kv_heads", None) if newer else None
