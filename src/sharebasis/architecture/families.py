"""What a model family looks like, as data: sizes in one dialect, and where its sublayers are.

Adding a family is adding a row to `ARCHITECTURES`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sharebasis.config.model import WeightTypeSettings


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where a family keeps its blocks and which of their sublayers are compressed."""

    block_pattern: str
    weight_types: Mapping[str, WeightTypeSettings]


def architecture_of(
    model_type: str,
    names: Collection[str],
    block_pattern: str | None = None,
    weight_types: Mapping[str, WeightTypeSettings] | None = None,
) -> Architecture | None:
    """Look a family up; what the caller gives takes the table's place.

    Args:
        model_type: of the HF config.
        names: HF names of the model's linear modules. Weight types of the table that none
            of them matches are left out: not every model of a family has all of them.
        block_pattern: the caller's. Weight types of the table keep to its blocks.
        weight_types: the caller's.

    Returns:
        None if the family is not in the table and the caller did not give both.
    """
    known = ARCHITECTURES.get(model_type)
    if known is not None:
        if weight_types is None:
            weight_types = _present(within(known.weight_types, block_pattern, names), names)
        block_pattern = known.block_pattern if block_pattern is None else block_pattern
    if block_pattern is None or weight_types is None:
        return None
    return Architecture(block_pattern, weight_types)


def within(
    weight_types: Mapping[str, WeightTypeSettings],
    block_pattern: str | None,
    names: Collection[str],
) -> Mapping[str, WeightTypeSettings]:
    """Weight types that nobody wrote for these blocks, kept to them.

    Args:
        weight_types: that would select from every layer.
        block_pattern: the caller's, which need not find every layer; None restricts nothing,
            nor does one that finds no layer at all, so that it is what an error speaks of.
        names: HF names of the model's linear modules.
    """
    if block_pattern is None or not any(re.search(block_pattern, name) for name in names):
        return weight_types
    return {
        key: replace(settings, pattern=f"(?=.*(?:{block_pattern})){settings.pattern}")
        for key, settings in weight_types.items()
    }


def _present(
    weight_types: Mapping[str, WeightTypeSettings], names: Collection[str]
) -> Mapping[str, WeightTypeSettings]:
    return {
        key: settings
        for key, settings in weight_types.items()
        if any(re.fullmatch(settings.pattern, name) for name in names)
    }


def weight_type_name(path: str) -> str:
    """Name of the weight type of the modules that end in a path: `attn.c_attn` -> `attn_c_attn`."""
    return path.replace(".*", "").replace(".", "_")


def layout_of(path: str) -> Mapping[str, Any]:
    """What a path tells of a layout, since whoever uses the name has it so."""
    return _LAYOUTS.get(path.rsplit(".", 1)[-1], {})


def slot_pattern(slot: str) -> str:
    """Pattern of the modules of a name in which `*` stands for any number."""
    return re.escape(slot).replace(r"\*", r"\d+")


def _family(blocks: str, *paths: str, **settings: Mapping[str, Any]) -> Architecture:
    """A row of the table.

    Args:
        blocks: name of the list of blocks.
        paths: of sublayers in a block, `*` for the number of an expert.
        settings: weight type -> what there is to say of it beside its pattern.
    """
    return Architecture(
        block_pattern=rf"(?:^|\.){blocks}\.(\d+)\.",
        weight_types={
            name: WeightTypeSettings(
                r".*\." + slot_pattern(path), **{**layout_of(path), **settings.get(name, {})}
            )
            for path in paths
            for name in [weight_type_name(path)]
        },
    )


_ATTENTION = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
)
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.gate_up_proj.*", "mlp.experts.down_proj.*")
_SHARED_EXPERTS = tuple(f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down"))
_GATE_UP = {"gate_up_order": "gate_up"}
_QKV = {"qkv_order": "qkv"}
_QKV_BY_HEAD = {"qkv_order": "qkv", "interleave": "head"}
_LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    # Latent attention: keys without a position, then values, head by head.
    "kv_b_proj": {"qkv_order": "kv", "interleave": "head"},
}

_LLAMA = _family("layers", *_ATTENTION, *_GATED)
_MOE = _family(
    "layers",
    *_ATTENTION,
    *_GATED,
    *_EXPERTS,
    *(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")),
    mlp_experts_gate_up_proj=_GATE_UP,
)
_BLOOM = _family(
    "h",
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    self_attention_query_key_value=_QKV_BY_HEAD,
)
_DEEPSEEK = _family(
    "layers",
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
    *_GATED,
    *_EXPERTS,
    *_SHARED_EXPERTS,
    mlp_experts_gate_up_proj=_GATE_UP,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "bloom": _BLOOM,
    "codegen": _family(
        "h",
        "attn.qkv_proj",
        "attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
        attn_qkv_proj={"qkv_order": "qvk", "interleave": 4},
    ),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "falcon": _BLOOM,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm4": _family(
        "layers", *_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj", mlp_gate_up_proj=_GATE_UP
    ),
    "gpt2": _family("h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", attn_c_attn=_QKV),
    "gpt_bigcode": _family(
        "h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", attn_c_attn=_QKV_BY_HEAD
    ),
    "gpt_neo": _family(
        "h",
        "attn.attention.q_proj",
        "attn.attention.k_proj",
        "attn.attention.v_proj",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    "gpt_neox": _family(
        "layers",
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        attention_query_key_value=_QKV_BY_HEAD,
    ),
    "gpt_oss": _family(
        "layers",
        *_ATTENTION,
        *_EXPERTS,
        mlp_experts_gate_up_proj={"gate_up_order": "gate_up", "interleave": "row"},
    ),
    "gptj": _family(
        "h", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"
    ),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "mpt": _family(
        "blocks",
        "attn.Wqkv",
        "attn.out_proj",
        "ffn.up_proj",
        "ffn.down_proj",
        attn_Wqkv=_QKV,
    ),
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmoe": _MOE,
    "opt": _family(
        "layers",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
    ),
    "phi": _family(
        "layers",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.dense",
        "mlp.fc1",
        "mlp.fc2",
    ),
    "phi3": _family(
        "layers",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        self_attn_qkv_proj=_QKV,
        mlp_gate_up_proj=_GATE_UP,
    ),
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _family("layers", *_ATTENTION, "mlp.c_fc", "mlp.c_proj"),
}
"""HF `model_type` -> row. A family that is not here is still tried, by shape and by trace
(`classification`); it needs a row only for what nobody can see from outside: how a fused
weight is laid out.
"""
