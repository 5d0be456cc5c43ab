"""Which sublayers a model has, what they do, and every way a selection can go wrong."""

import re
from types import SimpleNamespace

import pytest
from conftest import SIZES, small_config

from sharebasis.architecture.dims import Dims, dims
from sharebasis.architecture.families import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    slot_pattern,
    weight_type_name,
)
from sharebasis.architecture.roles import evidence_of, expert_slot, family_of, residual_role
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.architecture.sublayers import Sublayer
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.explore import linear_modules
from sharebasis.model.hub import meta_model

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
        # one of a list of experts is called like the list
        ("h.0.mlp.experts.up_proj.3", (D, D), "read", "name"),
        ("h.0.mlp.experts.down_proj.11", (D, D), "write", "name"),
    ],
)
def test_a_role_follows_from_the_shape_and_only_for_a_square_weight_from_the_name(
    name, shape, role, evidence
):
    assert residual_role(name, shape, D) == (role, evidence)
    assert residual_role(name, shape, D, "ambiguous_unknown") == (role, evidence)


@pytest.mark.parametrize("traced", ["read", "write", "neither"])
@pytest.mark.parametrize("name", ["h.0.attn.q_proj", "h.0.attn.o_proj", "h.0.attn.dense"])
@pytest.mark.parametrize("shape", [(D, 48), (48, D), (48, 48), (D, D)])
def test_what_was_seen_goes_before_shape_and_name(name, shape, traced):
    assert residual_role(name, shape, D, traced) == (traced, "trace")
    found = evidence_of(name, shape, D, traced)
    assert next(iter(found)) == "trace"
    without = evidence_of(name, shape, D)
    assert found == {"trace": traced, **without}
    assert list(found)[1:] == list(without)


@pytest.mark.parametrize(
    ("name", "shape", "traced", "says"),
    [
        (
            "h.0.attn.q_proj",
            (48, D),
            "read",
            {"trace": "read", "shape": "read", "name": "read"},
        ),
        ("h.0.attn.o_proj", (48, D), None, {"shape": "read", "name": "write"}),
        ("h.0.attn.o_proj", (D, D), "ambiguous_unknown", {"name": "write"}),
        ("h.0.attn.dense", (D, D), "write", {"trace": "write"}),
        ("h.0.attn.dense", (D, D), None, {}),
    ],
)
def test_evidence_that_says_nothing_is_left_out(name, shape, traced, says):
    assert evidence_of(name, shape, D, traced) == says


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
        ("h.0.attention.dense", "o"),
        ("h.0.attn.attention.out_proj", "o"),
        ("h.0.mlp.gate_up_proj", "fused"),
        ("h.0.mlp.experts.gate_up_proj.0", "fused"),
        ("h.0.mlp.experts.down_proj.12", "down"),
        ("h.0.mlp.experts.12.down_proj", "down"),
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
        says={"name": "read"},
        expert=None,
        tied_to=None,
    )


@pytest.mark.parametrize("number", ["0", "07", "11", "123"])
def test_a_record_names_its_block_whatever_other_numbers_its_name_has(number):
    name = f"model.layers.{number}.mlp.experts.3.up_proj"
    (record,) = classified({"up": ".*"}, modules=[module(name, (48, D))])
    assert (record.block, record.layer) == (f"model.layers.{number}", int(number))


def test_a_record_says_what_was_seen_and_what_disagrees():
    architecture = Architecture(BLOCKS, {"queries": WeightTypeSettings(pattern=r".*\.q_proj")})
    traced = {
        "model.layers.0.self_attn.q_proj": "write",
        "model.layers.0.mlp.up_proj": "read",
        "model.layers.11.self_attn.q_proj": "ambiguous_unknown",
    }
    found = classify(MODULES, architecture, D, traced)
    assert [(one.role, one.evidence, one.category, one.disagreement) for one in found] == [
        ("write", "trace", "ambiguous_read", "trace: write, name: read"),
        ("read", "trace", "read", ""),
        ("read", "name", "ambiguous_read", ""),
        ("read", "shape", "read", ""),
    ]
    assert found[0].says == {"trace": "write", "name": "read"}


def test_a_record_names_the_module_whose_weight_it_uses():
    tied = LinearModule(
        "model.layers.1.up_proj", "Linear", (48, D), True, tied_to="model.layers.0.up_proj"
    )
    architecture = Architecture(BLOCKS, {"up": WeightTypeSettings(pattern=r".*up_proj")})
    (record,) = classify([tied], architecture, D)
    assert record.tied_to == "model.layers.0.up_proj"


@pytest.mark.parametrize(
    ("name", "expert", "slot"),
    [
        ("model.layers.2.mlp.experts.up_proj.13", 13, "model.layers.2.mlp.experts.up_proj.*"),
        ("model.layers.2.mlp.experts.13.up_proj", 13, "model.layers.2.mlp.experts.*.up_proj"),
        ("model.layers.2.mlp.experts.0", 0, "model.layers.2.mlp.experts.*"),
        ("model.layers.2.mlp.shared_experts.up_proj", None, None),
        ("model.layers.2.mlp.my_experts.3.up_proj", None, None),
        ("model.layers.2.mlp.experts.up_proj", None, None),
        ("model.layers.2.mlp.up_proj", None, None),
    ],
)
def test_the_number_of_an_expert_is_read_off_the_name(name, expert, slot):
    (record,) = classified({"up": ".*"}, modules=[module(name, (48, D))])
    assert (record.expert, record.layer) == (expert, 2)
    assert expert_slot(name) == (slot or name)
    assert expert_slot(name, "4-7") == (slot or name).replace("*", "4-7")


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


# The table of families


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
    assert architecture_of("gpt2", names) == row


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
N_LAYERS = {"gpt_neo": 4, "smollm3": 4}
"""Where it is not 3."""
N_KV_HEADS = {
    **{name: 2 for name, rows in EXPECTED.items() if rows.keys() >= llama_like().keys()},
    "phi3": 2,
    "falcon": 2,
    "falcon, one kv head": 1,
    "gpt_bigcode": 1,
}
"""Where it is not 4."""
D_HEAD = {
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text", "qwen3_moe", "gpt_oss"), 12),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), 4),  # of the part that is rotated
}
"""Where it is not 8."""
EXPECTED_NAMES = {
    name: [f"transformer.h.{layer}.{path}" for layer in range(3) for path in sublayers]
    for name, sublayers in EXPECTED.items()
}


def test_every_small_config_is_covered_here():
    assert set(EXPECTED) == set(SIZES)


def expected(name):
    """(layer, path) -> facts and role."""
    return {
        (layer, path): (*facts, role_of(path, facts[-1]))
        for layer in range(N_LAYERS.get(name, 3))
        for sublayers in [EXPECTED[name] if layer else DENSE_FIRST.get(name, EXPECTED[name])]
        for path, facts in sublayers.items()
    }


def role_of(path, category):
    """Only the output of attention has a name here that does not tell."""
    return "write" if path.endswith(".dense") else category.removeprefix("ambiguous_")


@pytest.mark.parametrize("name", SIZES)
def test_every_linear_sublayer_of_a_known_family_is_found_and_understood(name):
    # OPT's narrower embeddings add linear modules outside the blocks
    changes = {"word_embed_proj_dim": 24} if name == "opt" else {}
    model = meta_model(small_config(name, **changes))
    records = classify_model(model).sublayers
    found = {
        (record.layer, record.slot.split("*.")[1]): (
            record.family,
            record.shape,
            record.bias,
            record.category,
            record.role,
        )
        for record in records
    }
    assert found == expected(name)
    not_selected = {record.slot.split("*.")[1] for record in records if not record.selected}
    assert not_selected == ({"mlp.shared_expert_gate"} if name == "qwen2_moe" else set())
    assert {record.type for record in records} == {"Conv1D" if name == "gpt2" else "Linear"}
    unstack(model)
    assert len({record.name for record in records}) == len(records) < len(linear_modules(model))


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_a_known_family_are_read_off_its_config(name):
    assert dims(small_config(name)) == Dims(
        d_model=D,
        n_layers=N_LAYERS.get(name, 3),
        n_heads=4,
        n_kv_heads=N_KV_HEADS.get(name, 4),
        d_head=D_HEAD.get(name, 8),
        d_v=6 if name.startswith("deepseek") else None,
    )
