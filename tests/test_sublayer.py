"""Which sublayers a model has, what they do, and every way a selection can go wrong."""

from types import SimpleNamespace

import pytest
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture import ARCHITECTURES, Architecture, Dims, architecture_of, dims
from sharebasis.classification import linear_modules
from sharebasis.errors import SelectionError
from sharebasis.hub import empty_model
from sharebasis.settings import WeightTypeSettings
from sharebasis.sublayer import LinearModule, Sublayer, classify, family_of, residual_role

D, D_MLP, D_KV = 32, 48, 16


@pytest.mark.parametrize(
    ("name", "shape", "role", "evidence"),
    [
        ("h.0.mlp.anything", (D, 48), "write", "shape"),
        ("h.0.mlp.anything", (48, D), "read", "shape"),
        ("h.0.mlp.anything", (48, 64), "neither", "shape"),
        ("h.0.mlp.anything", (48, 48), "neither", "shape"),
        # the shape goes before a name that says the opposite
        ("h.0.attn.q_proj", (D, 48), "write", "shape"),
        ("h.0.attn.o_proj", (48, D), "read", "shape"),
        ("h.0.attn.q_proj", (48, 48), "neither", "shape"),
        ("h.0.attn.o_proj", (D, D), "write", "name"),
        ("h.0.attn.out_proj", (D, D), "write", "name"),
        ("h.0.mlp.down_proj", (D, D), "write", "name"),
        ("o_proj", (D, D), "write", "name"),
        ("h.0.attn.c_proj", (D, D), "write", "name"),
        ("h.0.self_attn.inner.c_proj", (D, D), "write", "name"),
        ("h.0.attn.q_proj", (D, D), "read", "name"),
        ("h.0.attn.k", (D, D), "read", "name"),
        ("h.0.attn.value", (D, D), "read", "name"),
        ("h.0.attn.query_key_value", (D, D), "read", "name"),
        ("h.0.attn.Wqkv", (D, D), "read", "name"),
        ("h.0.mlp.up_proj", (D, D), "read", "name"),
        ("h.0.mlp.fc_in", (D, D), "read", "name"),
        # a name that does not tell stays unknown
        ("h.0.mlp.c_proj", (D, D), "ambiguous_unknown", "none"),
        ("h.0.attn.dense", (D, D), "ambiguous_unknown", "none"),
        ("h.0.mlp.fc_out", (D, D), "ambiguous_unknown", "none"),
        ("h.0.mlp.setup", (D, D), "ambiguous_unknown", "none"),
        ("h.0.q_proj.inner", (D, D), "ambiguous_unknown", "none"),
    ],
)
def test_a_role_follows_from_the_shape_and_only_for_a_square_weight_from_the_name(
    name, shape, role, evidence
):
    assert residual_role(name, shape, D) == (role, evidence)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.layers.0.self_attn.q_proj", "q"),
        ("encoder.layer.0.attention.self.key", "k"),
        ("h.0.v", "v"),
        ("h.0.attention.query_key_value", "fused"),
        ("h.0.attn.c_attn", "fused"),
        ("h.0.attn.c_proj", "o"),
        ("h.0.mlp.c_proj", "down"),
        ("h.0.mlp.dense_4h_to_h", "down"),
        ("h.0.mlp.dense_h_to_4h", "up"),
        ("h.0.mlp.gate", "gate"),
        ("h.0.mlp.my_up_proj", "other"),
        ("h.0.mlp.c_proj.inner", "other"),
    ],
)
def test_a_family_is_read_off_the_end_of_a_name(name, family):
    assert family_of(name) == family


def module(name, shape=(D, D), type="Linear"):  # noqa: A002
    return LinearModule(name, type, shape, bias=False)


MODULES = (
    module("model.layers.0.self_attn.q_proj"),
    module("model.layers.0.mlp.up_proj", (D_MLP, D)),
    module("model.layers.11.self_attn.q_proj"),
    module("model.layers.11.mlp.up_proj", (D_MLP, D)),
    module("lm_head", (100, D)),
)
BLOCKS = r"layers\.(\d+)\."


def classified(patterns, blocks=BLOCKS, modules=MODULES, **settings):
    types = {
        name: WeightTypeSettings(pattern=pattern, **settings) for name, pattern in patterns.items()
    }
    return classify(modules, Architecture(blocks, types), D)


def test_every_sublayer_of_a_block_gets_a_record_selected_or_not():
    records = classified({"queries": r".*\.q_proj"})
    assert [record.name for record in records] == [module.name for module in MODULES[:4]]
    assert [record.weight_type for record in records] == ["queries", None, "queries", None]
    assert [record.selected for record in records] == [True, False, True, False]


def test_a_record_says_where_a_sublayer_is_and_what_it_does():
    assert classified({"queries": r".*\.q_proj"})[2] == Sublayer(
        name="model.layers.11.self_attn.q_proj",
        slot="model.layers.*.self_attn.q_proj",
        layer=11,
        weight_type="queries",
        family="q",
        type="Linear",
        shape=(D, D),
        bias=False,
        role="read",
        evidence="name",
    )


def test_a_given_family_goes_before_the_name():
    families = [record.family for record in classified({"all": r".*\.q_proj"}, family="gate")]
    assert families == ["gate", "up", "gate", "up"]


@pytest.mark.parametrize(
    ("name", "shape", "category"),
    [
        ("layers.0.x", (D, 48), "write"),
        ("layers.0.x", (48, D), "read"),
        ("layers.0.x", (48, 48), "neither"),
        ("layers.0.o_proj", (D, D), "ambiguous_write"),
        ("layers.0.q_proj", (D, D), "ambiguous_read"),
        ("layers.0.x", (D, D), "ambiguous_unknown"),
    ],
)
def test_the_category_shows_which_roles_rest_on_a_name(name, shape, category):
    (record,) = classified({"x": ".*"}, modules=[module(name, shape)])
    assert record.category == category


@pytest.mark.parametrize(
    ("patterns", "blocks", "says"),
    [
        (
            {"queries": r"self_attn\.q_proj"},
            BLOCKS,
            [
                r"weight_types.queries.pattern 'self_attn\\.q_proj' matches none",
                "5 linear modules",
                "must match the whole name",
                "model.layers.0.self_attn.q_proj, model.layers.0.mlp.up_proj",
            ],
        ),
        (
            {"queries": "(unclosed"},
            BLOCKS,
            ["weight_types.queries.pattern '(unclosed' is not a regular expression", "missing )"],
        ),
        (
            {"queries": r".*\.q_proj"},
            "layers.(",
            ["block_pattern 'layers.(' is not a regular expression", "missing )"],
        ),
        (
            {"queries": r".*\.q_proj", "attention": r".*self_attn.*"},
            BLOCKS,
            [
                "model.layers.0.self_attn.q_proj is matched by two weight types",
                "'queries' and 'attention'",
                "make their patterns disjoint",
            ],
        ),
        (
            {"queries": r".*\.q_proj"},
            r"layers\.\d+\.",
            [r"block_pattern 'layers\\.\\d+\\.' has 0 groups", r"exactly one", r"'h\.(\d+)'"],
        ),
        (
            {"queries": r".*\.q_proj"},
            r"(model)\.layers\.(\d+)",
            ["has 2 groups", "exactly one, around the layer number"],
        ),
        (
            {"queries": r".*\.q_proj"},
            r"layers\.\d+\.(\w+)",
            [
                "captures 'self_attn' in model.layers.0.self_attn.q_proj",
                "no layer number",
                r"capture digits, as in 'h\.(\d+)'",
            ],
        ),
        (
            {"queries": r".*\.q_proj"},
            r"layers\.(\d\d)?",
            ["captures None in model.layers.0.self_attn.q_proj", "no layer number"],
        ),
        (
            {"queries": r".*\.q_proj", "head": "lm_head"},
            BLOCKS,
            [
                "lm_head is selected by weight type 'head'",
                r"block_pattern 'layers\\.(\\d+)\\.' finds no layer number in its name",
            ],
        ),
        ({}, BLOCKS, ["weight_types is empty: nothing would be compressed"]),
    ],
    ids=[
        "a pattern that matches nothing",
        "a pattern that is no expression",
        "a block pattern that is no expression",
        "two patterns for one module",
        "a block pattern without a group",
        "a block pattern with two groups",
        "a block pattern that captures a word",
        "a block pattern that captures nothing",
        "a module outside the blocks",
        "no weight types",
    ],
)
def test_a_selection_that_goes_wrong_says_where_and_what_to_do(patterns, blocks, says):
    with pytest.raises(SelectionError) as error:
        classified(patterns, blocks)
    for said in says:
        assert said in str(error.value)


def test_a_family_that_the_table_does_not_know_is_refused_with_what_to_give():
    with pytest.raises(SelectionError) as error:
        architecture_of("mamba", block_pattern=BLOCKS)
    for said in ("'mamba' is not known", *ARCHITECTURES, "model.weight_types", "ARCHITECTURES in"):
        assert said in str(error.value)


def test_what_the_caller_gives_takes_the_tables_place():
    mine = {"queries": WeightTypeSettings(pattern=r".*\.q_proj")}
    assert architecture_of("mamba", BLOCKS, mine) == Architecture(BLOCKS, mine)
    assert architecture_of("gpt2", BLOCKS).block_pattern == BLOCKS
    assert architecture_of("gpt2", BLOCKS).weight_types == ARCHITECTURES["gpt2"].weight_types
    assert architecture_of("gpt2", None, mine).weight_types == mine
    assert architecture_of("gpt2") == ARCHITECTURES["gpt2"]


def test_empty_weight_types_do_not_stand_for_the_tables():
    assert architecture_of("llama", weight_types={}).weight_types == {}


def test_head_counts_that_a_config_leaves_out_follow_from_the_others():
    config = SimpleNamespace(hidden_size=96, num_attention_heads=8, num_hidden_layers=3)
    assert dims(config) == Dims(d_model=96, n_layers=3, n_heads=8, n_kv_heads=8, d_head=12)
    config.num_key_value_heads, config.head_dim = 2, 64
    assert dims(config) == Dims(d_model=96, n_layers=3, n_heads=8, n_kv_heads=2, d_head=64)


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 4), (4, 4)])
def test_conv1d_and_linear_are_told_apart_by_type_and_report_the_same_shape(d_out, d_in):
    model = nn.ModuleDict({"conv": Conv1D(d_out, d_in), "linear": nn.Linear(d_in, d_out, False)})
    assert linear_modules(model) == (
        LinearModule("conv", "Conv1D", (d_out, d_in), bias=True),
        LinearModule("linear", "Linear", (d_out, d_in), bias=False),
    )


# Random models of every known family: two layers, four query heads, two key-value heads where
# the family has them. Sublayer -> family, (d_out, d_in), has a bias, category.
def llama_like(d_q=D, qkv_bias=False):
    def category(rows, role):
        return f"ambiguous_{role}" if rows == D else role

    d_kv = d_q // 2
    return {
        "self_attn.q_proj": ("q", (d_q, D), qkv_bias, category(d_q, "read")),
        "self_attn.k_proj": ("k", (d_kv, D), qkv_bias, category(d_kv, "read")),
        "self_attn.v_proj": ("v", (d_kv, D), qkv_bias, category(d_kv, "read")),
        "self_attn.o_proj": ("o", (D, d_q), False, category(d_q, "write")),
        "mlp.gate_proj": ("gate", (D_MLP, D), False, "read"),
        "mlp.up_proj": ("up", (D_MLP, D), False, "read"),
        "mlp.down_proj": ("down", (D, D_MLP), False, "write"),
    }


EXPECTED = {
    "llama": llama_like(),
    "mistral": llama_like(),
    "qwen2": llama_like(qkv_bias=True),
    "qwen3": llama_like(d_q=64),  # head_dim 16
    "smollm3": llama_like(),
    "gpt2": {
        "attn.c_attn": ("fused", (3 * D, D), True, "read"),
        "attn.c_proj": ("o", (D, D), True, "ambiguous_write"),
        "mlp.c_fc": ("up", (D_MLP, D), True, "read"),
        "mlp.c_proj": ("down", (D, D_MLP), True, "write"),
    },
    "gptj": {
        "attn.q_proj": ("q", (D, D), False, "ambiguous_read"),
        "attn.k_proj": ("k", (D, D), False, "ambiguous_read"),
        "attn.v_proj": ("v", (D, D), False, "ambiguous_read"),
        "attn.out_proj": ("o", (D, D), False, "ambiguous_write"),
        "mlp.fc_in": ("up", (D_MLP, D), True, "read"),
        "mlp.fc_out": ("down", (D, D_MLP), True, "write"),
    },
    "opt": {
        "self_attn.q_proj": ("q", (D, D), True, "ambiguous_read"),
        "self_attn.k_proj": ("k", (D, D), True, "ambiguous_read"),
        "self_attn.v_proj": ("v", (D, D), True, "ambiguous_read"),
        "self_attn.out_proj": ("o", (D, D), True, "ambiguous_write"),
        "fc1": ("up", (D_MLP, D), True, "read"),
        "fc2": ("down", (D, D_MLP), True, "write"),
    },
    "phi": {
        "self_attn.q_proj": ("q", (D, D), True, "ambiguous_read"),
        "self_attn.k_proj": ("k", (D_KV, D), True, "read"),
        "self_attn.v_proj": ("v", (D_KV, D), True, "read"),
        "self_attn.dense": ("o", (D, D), True, "ambiguous_unknown"),
        "mlp.fc1": ("up", (D_MLP, D), True, "read"),
        "mlp.fc2": ("down", (D, D_MLP), True, "write"),
    },
}


def test_every_row_of_the_table_is_covered_here():
    assert set(EXPECTED) == set(ARCHITECTURES)


def tiny_config(model_type):
    gpt = {"n_embd": D, "n_inner": D_MLP, "n_layer": 2, "n_head": 4}
    opt = {"hidden_size": D, "ffn_dim": D_MLP, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = {
        "hidden_size": D,
        "intermediate_size": D_MLP,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    sizes = {
        "gpt2": gpt,
        "gptj": gpt | {"rotary_dim": 4},
        "opt": opt | {"word_embed_proj_dim": 24},  # adds linear modules outside the blocks
        "qwen3": llama | {"head_dim": 16},
    }.get(model_type, llama)
    special = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return transformers.AutoConfig.for_model(model_type, **sizes, **special)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_linear_sublayer_of_a_known_family_is_found_and_understood(model_type):
    config = tiny_config(model_type)
    sizes = dims(config)
    modules = linear_modules(empty_model(config))
    records = classify(modules, architecture_of(model_type), sizes.d_model)
    found = {
        (record.layer, record.slot.split("*.")[1]): (
            record.family,
            record.shape,
            record.bias,
            record.category,
        )
        for record in records
    }
    assert found == {
        (layer, name): facts for layer in (0, 1) for name, facts in EXPECTED[model_type].items()
    }
    assert all(record.selected for record in records)
    assert {record.type for record in records} == {"Conv1D" if model_type == "gpt2" else "Linear"}
    assert len({record.name for record in records}) == len(records) < len(modules)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_sizes_of_a_known_family_are_read_off_its_config(model_type):
    grouped = model_type not in ("gpt2", "gptj", "opt")
    assert dims(tiny_config(model_type)) == Dims(
        d_model=D,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2 if grouped else 4,
        d_head=16 if model_type == "qwen3" else 8,
    )
