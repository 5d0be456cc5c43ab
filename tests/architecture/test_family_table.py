"""The table of families, and the sizes that a config gives."""

import re
from types import SimpleNamespace

import pytest
from conftest import small_config
from expected_sublayers import EXPECTED_NAMES
from selecting import BLOCKS, D, module

from sharebasis.architecture.dims import Dims, dims
from sharebasis.architecture.families import ARCHITECTURES, architecture_of
from sharebasis.architecture.model_family import Architecture, slot_pattern, weight_type_name
from sharebasis.architecture.selection import classify
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError

NAMES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("blocks", "types"),
    [(None, None), (BLOCKS, None), (None, {"up": WeightTypeSettings(pattern=".*")})],
)
def test_a_family_that_the_table_does_not_know_needs_both_patterns(blocks, types):
    assert architecture_of("mamba", NAMES, blocks, types) is None


def test_what_the_caller_gives_takes_the_tables_place():
    mine = {"queries": WeightTypeSettings(pattern=r".*\.q_proj")}
    names = EXPECTED_NAMES["gpt2"]
    row = ARCHITECTURES["gpt2"]
    assert architecture_of("mamba", NAMES, BLOCKS, mine) == Architecture(BLOCKS, mine)
    assert architecture_of("gpt2", names, BLOCKS) == Architecture(BLOCKS, row.weight_types)
    assert architecture_of("gpt2", names, None, mine) == Architecture(row.block_pattern, mine)
    assert architecture_of("gpt2", names) == Architecture(row.block_pattern, row.weight_types)


def test_weight_types_of_the_table_that_a_model_does_not_have_are_left_out():
    dense = [f"model.layers.0.{path}" for path in ("self_attn.q_proj", "mlp.up_proj")]
    found = architecture_of("qwen3_moe", dense)
    assert list(found.weight_types) == ["self_attn_q_proj", "mlp_up_proj"]
    row = ARCHITECTURES["qwen3_moe"]
    assert found.block_pattern == row.block_pattern
    assert all(found.weight_types[name] == row.weight_types[name] for name in found.weight_types)


def test_weight_types_of_the_caller_are_not_left_out():
    mine = {"typo": WeightTypeSettings(pattern=r".*\.q_porj")}
    assert architecture_of("llama", NAMES, weight_types=mine).weight_types == mine


def test_empty_weight_types_do_not_stand_for_the_tables():
    assert architecture_of("llama", NAMES, weight_types={}).weight_types == {}


def test_a_slot_gives_the_pattern_of_its_modules_and_a_path_the_name_of_its_type():
    assert weight_type_name("mlp.experts.up_proj.*") == "mlp_experts_up_proj"
    slot = "model.layers.*.mlp.experts.up_proj.*"
    names = ["3.mlp.experts.up_proj.0", "12.mlp.experts.up_proj.17", "3.mlp.experts.up_proj"]
    names += ["3.mlp.experts.up_proj.0.x", "3.mlpsexperts.up_proj.0", "3.my.mlp.experts.up_proj.1"]
    types = {"up": WeightTypeSettings(slot_pattern(slot))}
    found = classify([module(f"model.layers.{x}") for x in names], Architecture(BLOCKS, types), D)
    selected = [one.name.removeprefix("model.layers.") for one in found if one.selected]
    assert selected == names[:2]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_list_that_only_ends_like_the_blocks_is_not_theirs(model_type):
    pattern = ARCHITECTURES[model_type].block_pattern
    blocks = re.fullmatch(r"\(\?:\^\|\\\.\)(\w+)\\\..*", pattern)[1]
    assert re.search(pattern, f"model.{blocks}.12.x")[1] == "12"
    assert re.search(pattern, f"{blocks}.12.x")[1] == "12"
    assert not re.search(pattern, f"model.my_{blocks}.12.x")


def test_head_counts_that_a_config_leaves_out_follow_from_the_others():
    config = SimpleNamespace(hidden_size=96, num_attention_heads=8, num_hidden_layers=3)
    assert dims(config) == Dims(d_model=96, n_layers=3, n_heads=8, n_kv_heads=8, d_head=12)
    config.num_key_value_heads, config.head_dim = 2, 64
    assert dims(config) == Dims(d_model=96, n_layers=3, n_heads=8, n_kv_heads=2, d_head=64)


@pytest.mark.parametrize("whole", [False, True])
def test_the_decoder_of_a_pair_has_counts_of_its_own(whole):
    pair = {"encoder_layers": 6, "decoder_layers": 2, "encoder_attention_heads": 8}
    pair |= {"decoder_attention_heads": 4, "is_encoder_decoder": whole}
    config = small_config("bart", d_model=32, **pair)
    assert dims(config) == Dims(d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_head=8)


def test_a_config_that_does_not_tell_its_sizes_is_refused():
    with pytest.raises(SelectionError, match=r"'mamba' model does not tell .*num_hidden_layers"):
        dims(SimpleNamespace(model_type="mamba", hidden_size=96))
    without_attention = SimpleNamespace(hidden_size=96, num_hidden_layers=3)
    assert dims(without_attention) == Dims(96, n_layers=3, n_heads=1, n_kv_heads=1, d_head=96)
