"""Families that are not in the table are explored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import random_model, small_config

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import meta_model
from sharebasis.stages.verify.verify import lossless_difference

PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ATTENTION = {
    "self_attn_q_proj": "read",
    "self_attn_k_proj": "read",
    "self_attn_v_proj": "read",
    "self_attn_o_proj": "write",
}
UNKNOWN: Mapping[str, tuple[dict[str, Any], str, Mapping[str, str]]] = {
    "nemotron": (
        {**PLAIN, "num_key_value_heads": 2},
        r"^model\.layers\.(\d+)\.",
        {**ATTENTION, "mlp_up_proj": "read", "mlp_down_proj": "write"},
    ),
    "persimmon": (
        PLAIN,
        r"^model\.layers\.(\d+)\.",
        {
            "self_attn_query_key_value": "read",
            "self_attn_dense": "write",
            "mlp_dense_h_to_4h": "read",
            "mlp_dense_4h_to_h": "write",
        },
    ),
    # output.dense is the end of attention.output.dense, too
    "bert": (
        {**PLAIN, "is_decoder": True},
        r"^bert\.encoder\.layer\.(\d+)\.",
        {
            "attention_self_query": "read",
            "attention_self_key": "read",
            "attention_self_value": "read",
            "attention_output_dense": "write",
            "intermediate_dense": "read",
            "output_dense": "write",
        },
    ),
    # blocks that are not alike, experts without a gate, a latent that the experts read and write
    "nemotron_h": (
        {
            **PLAIN,
            "layers_block_type": ["full_attention", "moe", "full_attention"],
            "num_key_value_heads": 2,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_latent_size": 16,
            "moe_shared_expert_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
        },
        r"^model\.layers\.(\d+)\.",
        {
            "mixer_q_proj": "read",
            "mixer_k_proj": "read",
            "mixer_v_proj": "read",
            "mixer_o_proj": "write",
            "mixer_fc1_latent_proj": "read",
            "mixer_fc2_latent_proj": "write",
            "mixer_experts_up_proj": "neither",
            "mixer_experts_down_proj": "neither",
            "mixer_shared_experts_up_proj": "read",
            "mixer_shared_experts_down_proj": "write",
        },
    ),
    # four residual streams, which one latent mixes before they are read
    "qwen4_exp_text": (
        {
            **PLAIN,
            "hidden_size": 16,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        r"^model\.layers\.(\d+)\.",
        {
            **ATTENTION,
            "self_attn_indexer_index_qk_proj": "read",
            "linear_attn_in_proj_qkv": "read",
            "linear_attn_in_proj_z": "read",
            "linear_attn_in_proj_b": "read",
            "linear_attn_in_proj_a": "read",
            "linear_attn_out_proj": "write",
            "mlp_experts_gate_up_proj": "read",
            "mlp_experts_down_proj": "write",
            "mlp_shared_expert_gate_proj": "read",
            "mlp_shared_expert_up_proj": "read",
            "mlp_shared_expert_down_proj": "write",
            "mlp_shared_expert_gate": "read",
            "attn_hyper_connection_input_mix_weight_down": "read",
            "attn_hyper_connection_input_mix_weight_up": "neither",
            "attn_hyper_connection_block_inject_weight": "read",
            "mlp_hyper_connection_input_mix_weight_down": "read",
            "mlp_hyper_connection_input_mix_weight_up": "neither",
            "mlp_hyper_connection_block_inject_weight": "read",
        },
    ),
    # every other block begins the stream anew and is given its earlier states
    "inkling2_text": (
        {
            **PLAIN,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_layers_per_attn_res_block": 2,
            "d_rel": 8,
            "unpadded_vocab_size": 288,
        },
        r"^model\.layers\.(\d+)\.",
        {
            **ATTENTION,
            "self_attn_r_proj": "read",
            "self_attn_gate_proj": "read",
            "self_attn_sink_proj": "read",
            "self_attn_k_sconv_weight_proj": "read",
            "self_attn_v_sconv_weight_proj": "read",
            "mlp_experts_gate_up_proj": "read",
            "mlp_experts_down_proj": "write",
        },
    ),
    # no attention; names that tell nothing
    "mamba2": (
        {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        r"^backbone\.layers\.(\d+)\.",
        {"mixer_in_proj": "read", "mixer_out_proj": "write"},
    ),
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_family_that_is_not_in_the_table_is_explored(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, block_pattern, roles = UNKNOWN[family]
    assert family not in ARCHITECTURES
    found = classify_model(meta_model(small_config(family, **changes)))
    assert found.architecture.block_pattern == block_pattern
    seen: dict[str, set[str]] = {}
    for sublayer in found.sublayers:
        assert (sublayer.evidence, sublayer.selected) == ("trace", True)
        seen.setdefault(str(sublayer.weight_type), set()).add(sublayer.role)
    assert seen == {weight_type: {role} for weight_type, role in roles.items()}
    assert found.architecture.weight_types.keys() == roles.keys()
    (warning,) = (record for record in caplog.records if record.name.startswith("sharebasis"))
    for said in (f"family '{family}' is not known", "compressing", "fused", *roles):
        assert said in warning.getMessage()


@pytest.mark.parametrize("family", ["nemotron", "bert", "nemotron_h"])
def test_what_was_explored_can_be_wrapped(family: str) -> None:
    model = random_model(family, 288, **UNKNOWN[family][0])
    found = classify_model(model)
    tokens = torch.randint(288, (1, 12))
    logits = model(input_ids=tokens).logits
    for strategy in ("none", "heads"):
        rows = rows_by_sublayer(split_selected(found, strategy))  # type: ignore[arg-type]
        assert rows.keys() == {sublayer.name for sublayer in found.selected}
        difference = lossless_difference(model, rows, tokens)
        assert difference <= 2e-5 * logits.abs().max().item()


def test_weight_types_of_the_caller_are_searched_for_in_blocks_that_are_looked_for() -> None:
    mine = {"up": WeightTypeSettings(pattern=r".*\.mlp\.up_proj")}
    model = meta_model(small_config("nemotron", **UNKNOWN["nemotron"][0]))
    found = classify_model(model, weight_types=mine)
    assert found.architecture.weight_types == mine
    assert {sublayer.layer for sublayer in found.selected} == {0, 1, 2}
    assert len(found.selected) == 3
    assert len(found.sublayers) == 18


def test_no_weight_types_are_not_taken_for_weight_types_that_were_not_given() -> None:
    model = meta_model(small_config("nemotron", **UNKNOWN["nemotron"][0]))
    with pytest.raises(SelectionError, match=r"^weight_types is empty"):
        classify_model(model, weight_types={})


def test_blocks_of_the_caller_are_not_looked_for() -> None:
    model = meta_model(small_config("nemotron", **UNKNOWN["nemotron"][0]))
    model.config.num_hidden_layers = 7  # there is no such list
    found = classify_model(model, block_pattern=r"layers\.(\d+)\.")
    assert found.architecture.block_pattern == r"layers\.(\d+)\."
    assert {sublayer.layer for sublayer in found.selected} == {0, 1, 2}
    assert len(found.selected) == 18


@pytest.mark.parametrize(
    ("family", "sizes"), [("nemotron", UNKNOWN["nemotron"][0]), ("llama", {}), ("mixtral", {})]
)
@pytest.mark.parametrize("pattern", [r"layers\.([02])\.", r"^model\.layers\.(0|2)\."])
def test_layers_that_the_callers_blocks_leave_out_stay_as_they_are(
    family: str, sizes: dict[str, Any], pattern: str
) -> None:
    model = meta_model(small_config(family, **sizes))
    everywhere = classify_model(model).selected
    found = classify_model(model, block_pattern=pattern)
    assert found.architecture.block_pattern == pattern
    assert found.sublayers == found.selected
    assert [(one.name, one.role, one.weight_type) for one in found.selected] == [
        (one.name, one.role, one.weight_type) for one in everywhere if one.layer in (0, 2)
    ]


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_blocks_of_the_caller_that_are_nowhere_are_what_the_error_speaks_of(family: str) -> None:
    sizes = UNKNOWN["nemotron"][0] if family == "nemotron" else {}
    model = meta_model(small_config(family, **sizes))
    with pytest.raises(SelectionError, match=r"block.*stacks"):
        classify_model(model, block_pattern=r"stacks\.(\d+)\.")
    with pytest.raises(SelectionError, match=r"^block_pattern '\(' is not a regular expression"):
        classify_model(model, block_pattern="(")
