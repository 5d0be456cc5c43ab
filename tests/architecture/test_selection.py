"""Which sublayers a model has, and every way a selection can go wrong."""

import pytest
from selecting import BLOCKS, MODULES, D, classified, module

from sharebasis.architecture.families import Architecture
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.architecture.sublayers import Sublayer
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError


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
