"""The model families that are known, one row each.

Adding a family is adding a row to `ARCHITECTURES`, here or while a program runs; nothing else
names one:

    >>> ARCHITECTURES["toy"] = model_family("layers", "attn.qkv", "mlp.up", "mlp.down")
    >>> list(ARCHITECTURES.pop("toy").weight_types)
    ['attn_qkv', 'mlp_up', 'mlp_down']
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from sharebasis.architecture.model_family import Architecture, ModelFamily, model_family
from sharebasis.config.model import WeightTypeSettings

ATTENTION = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
)
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = ("mlp.experts.gate_up_proj.*", "mlp.experts.down_proj.*")
SHARED_EXPERTS = tuple(f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down"))
GATE_UP = {"gate_up_order": "gate_up"}
QKV = {"qkv_order": "qkv"}
QKV_BY_HEAD = {"qkv_order": "qkv", "interleave": "head"}

LLAMA = model_family("layers", *ATTENTION, *GATED, positions="halves")
QK_NORMED = replace(LLAMA, qk_norms_keep_signs=True)
MOE = model_family(
    "layers",
    *ATTENTION,
    *GATED,
    *EXPERTS,
    *(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")),
    positions="halves",
    mlp_experts_gate_up_proj=GATE_UP,
)
QK_NORMED_MOE = replace(MOE, qk_norms_keep_signs=True)
BLOOM = model_family(
    "h",
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    positions="slopes",
    self_attention_query_key_value=QKV_BY_HEAD,
)
DEEPSEEK = model_family(
    "layers",
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
    *GATED,
    *EXPERTS,
    *SHARED_EXPERTS,
    mlp_experts_gate_up_proj=GATE_UP,
)

ARCHITECTURES: dict[str, ModelFamily] = {
    "bloom": BLOOM,
    "codegen": model_family(
        "h",
        "attn.qkv_proj",
        "attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
        positions="neighbours",
        attn_qkv_proj={"qkv_order": "qvk", "interleave": 4},
    ),
    "cohere": replace(LLAMA, positions="neighbours"),
    "cohere2": replace(LLAMA, positions="neighbours", sliding_layers_rotate=True),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "falcon": replace(BLOOM, positions="halves"),
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": QK_NORMED,
    "glm4": model_family(
        "layers",
        *ATTENTION,
        "mlp.gate_up_proj",
        "mlp.down_proj",
        mlp_gate_up_proj=GATE_UP,
        positions="neighbours",
    ),
    "gpt2": model_family(
        "h",
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        attn_c_attn=QKV,
        positions="learned",
    ),
    "gpt_bigcode": model_family(
        "h",
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        attn_c_attn=QKV_BY_HEAD,
        positions="learned",
    ),
    "gpt_neo": model_family(
        "h",
        "attn.attention.q_proj",
        "attn.attention.k_proj",
        "attn.attention.v_proj",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        positions="learned",
    ),
    "gpt_neox": model_family(
        "layers",
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        attention_query_key_value=QKV_BY_HEAD,
        positions="halves",
    ),
    "gpt_oss": model_family(
        "layers",
        *ATTENTION,
        *EXPERTS,
        mlp_experts_gate_up_proj={"gate_up_order": "gate_up", "interleave": "row"},
        positions="halves",
        up_is_shifted=True,
    ),
    "gptj": model_family(
        "h",
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.out_proj",
        "mlp.fc_in",
        "mlp.fc_out",
        positions="neighbours",
    ),
    "granite": LLAMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MOE,
    "mpt": model_family(
        "blocks",
        "attn.Wqkv",
        "attn.out_proj",
        "ffn.up_proj",
        "ffn.down_proj",
        attn_Wqkv=QKV,
        positions="slopes",
    ),
    "olmo": LLAMA,
    "olmo2": QK_NORMED,
    "olmoe": QK_NORMED_MOE,
    "opt": model_family(
        "layers",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
        positions="learned",
    ),
    "phi": model_family(
        "layers",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.dense",
        "mlp.fc1",
        "mlp.fc2",
        positions="halves",
    ),
    "phi3": model_family(
        "layers",
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        self_attn_qkv_proj=QKV,
        mlp_gate_up_proj=GATE_UP,
        positions="halves",
    ),
    "qwen2": LLAMA,
    "qwen2_moe": MOE,
    "qwen3": QK_NORMED,
    "qwen3_moe": QK_NORMED_MOE,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": model_family("layers", *ATTENTION, "mlp.c_fc", "mlp.c_proj", positions="halves"),
}
"""HF `model_type` -> row. A family that is not here is still tried, by shape and by trace
(`model.classify`); it needs a row only for what nobody can see from outside: how a fused weight
is laid out, and which changes of a layer are exact.
"""


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
