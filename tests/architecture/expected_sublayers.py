"""The linear sublayers of small models of every known family."""

from selecting import D_KV, D_MLP, D


# Small models of every known family, four query heads, and fewer for keys and values where the
# family has them. Sublayer -> family, (d_out, d_in), has a bias, category.
def llama_like(d_q=D, d_kv=D_KV, qkv_bias=False, o_bias=False):
    def category(rows, role):
        return f"ambiguous_{role}" if rows == D else role

    return {
        "self_attn.q_proj": ("q", (d_q, D), qkv_bias, category(d_q, "read")),
        "self_attn.k_proj": ("k", (d_kv, D), qkv_bias, category(d_kv, "read")),
        "self_attn.v_proj": ("v", (d_kv, D), qkv_bias, category(d_kv, "read")),
        "self_attn.o_proj": ("o", (D, d_q), o_bias, category(d_q, "write")),
    }


def gated(d_mlp=D_MLP, prefix="mlp"):
    return {
        f"{prefix}.gate_proj": ("gate", (d_mlp, D), False, "read"),
        f"{prefix}.up_proj": ("up", (d_mlp, D), False, "read"),
        f"{prefix}.down_proj": ("down", (D, d_mlp), False, "write"),
    }


def experts(d_mlp=D_MLP, bias=False):
    sublayers = {}
    for i in range(4):
        sublayers[f"mlp.experts.gate_up_proj.{i}"] = ("fused", (2 * d_mlp, D), bias, "read")
        sublayers[f"mlp.experts.down_proj.{i}"] = ("down", (D, d_mlp), bias, "write")
    return sublayers


def unlike_llama(qkv, o, up, down, rows=3 * D, d_mlp=4 * D, bias=True):
    """One fused weight for q, k and v; names of all four."""
    return {
        qkv: ("fused", (rows, D), bias, "read"),
        o: ("o", (D, D), bias, "ambiguous_unknown" if "dense" in o else "ambiguous_write"),
        up: ("up", (d_mlp, D), bias, "read"),
        down: ("down", (D, d_mlp), bias, "write"),
    }


def three_apart(prefix, o, up, down, d_mlp=D_MLP, bias=True, o_bias=True):
    """q, k and v apart, none of them grouped; names of the others."""
    return {
        **{f"{prefix}.{x}_proj": (x, (D, D), bias, "ambiguous_read") for x in "qkv"},
        o: ("o", (D, D), o_bias, "ambiguous_unknown" if "dense" in o else "ambiguous_write"),
        up: ("up", (d_mlp, D), True, "read"),
        down: ("down", (D, d_mlp), True, "write"),
    }


GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NEOX_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
BLOOM = ("self_attention.query_key_value", "self_attention.dense", *NEOX_MLP)
LLAMA = {**llama_like(), **gated()}
WIDE = {**llama_like(d_q=48, d_kv=24), **gated()}  # head_dim 12
MLA = {
    "self_attn.q_a_proj": ("other", (16, D), False, "read"),
    "self_attn.q_b_proj": ("q", (48, 16), False, "neither"),
    "self_attn.kv_a_proj_with_mqa": ("other", (16, D), False, "read"),
    "self_attn.kv_b_proj": ("fused", (56, 12), False, "neither"),
    "self_attn.o_proj": ("o", (D, 24), False, "write"),
}
MLA_V2 = {path: facts for path, facts in MLA.items() if "q_" not in path} | {
    "self_attn.q_proj": ("q", (48, D), False, "read")
}
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": {**llama_like(qkv_bias=True), **gated()},
    "qwen3": WIDE,
    "gemma": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "granite": LLAMA,
    "stablelm": LLAMA,
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "smollm3": LLAMA,
    "gpt2": unlike_llama(*GPT2),
    "gpt_bigcode": unlike_llama(*GPT2, rows=48),
    "gpt_bigcode, many kv heads": unlike_llama(*GPT2),
    "codegen": {
        "attn.qkv_proj": ("fused", (3 * D, D), False, "read"),
        "attn.out_proj": ("o", (D, D), False, "ambiguous_write"),
        "mlp.fc_in": ("up", (4 * D, D), True, "read"),
        "mlp.fc_out": ("down", (D, 4 * D), True, "write"),
    },
    "gpt_neo": three_apart(
        "attn.attention",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        d_mlp=4 * D,
        bias=False,
    ),
    "gpt_neox": unlike_llama(
        "attention.query_key_value", "attention.dense", *NEOX_MLP, d_mlp=D_MLP
    ),
    "gptj": three_apart(
        "attn", "attn.out_proj", "mlp.fc_in", "mlp.fc_out", d_mlp=4 * D, bias=False, o_bias=False
    ),
    "opt": three_apart("self_attn", "self_attn.out_proj", "fc1", "fc2"),
    "bloom": unlike_llama(*BLOOM),
    "falcon": unlike_llama(*BLOOM, rows=64, bias=False),
    "falcon, one kv head": unlike_llama(*BLOOM, rows=48, bias=False),
    "falcon, old layout": unlike_llama(*BLOOM, bias=False),
    "mpt": unlike_llama("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj", bias=False),
    "phi": three_apart("self_attn", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "phi3": {
        "self_attn.qkv_proj": ("fused", (64, D), False, "read"),
        "self_attn.o_proj": ("o", (D, D), False, "ambiguous_write"),
        "mlp.gate_up_proj": ("fused", (2 * D_MLP, D), False, "read"),
        "mlp.down_proj": ("down", (D, D_MLP), False, "write"),
    },
    "glm4": {
        **llama_like(qkv_bias=True),
        "mlp.gate_up_proj": ("fused", (2 * D_MLP, D), False, "read"),
        "mlp.down_proj": ("down", (D, D_MLP), False, "write"),
    },
    "starcoder2": {
        **llama_like(qkv_bias=True, o_bias=True),
        "mlp.c_fc": ("up", (D_MLP, D), True, "read"),
        "mlp.c_proj": ("down", (D, D_MLP), True, "write"),
    },
    "qwen2_moe": {
        **llama_like(qkv_bias=True),
        **experts(24),
        **gated(24, "mlp.shared_expert"),
        "mlp.shared_expert_gate": ("other", (1, D), False, "read"),
    },
    "mixtral": {**llama_like(), **experts()},
    "qwen3_moe": {**llama_like(d_q=48, d_kv=24), **experts(24)},
    "olmoe": {**llama_like(), **experts()},
    "gpt_oss": {
        **llama_like(d_q=48, d_kv=24, qkv_bias=True, o_bias=True),
        **experts(bias=True),
    },
    "deepseek_v3": {**MLA, **experts(24), **gated(24, "mlp.shared_experts")},
    "deepseek_v2": {**MLA_V2, **experts(24), **gated(24, "mlp.shared_experts")},
}
DENSE_FIRST = {"deepseek_v3": {**MLA, **gated()}, "deepseek_v2": {**MLA_V2, **gated()}}
"""The sublayers of layer 0, where they are others than those of the rest."""

EXPECTED_NAMES = {
    name: [f"transformer.h.{layer}.{path}" for layer in range(3) for path in sublayers]
    for name, sublayers in EXPECTED.items()
}
