"""Who shares with whom."""

import pytest

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.families import Architecture
from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError
from sharebasis.structures.curve import factor_numbers
from sharebasis.structures.groups import adjacent_groups, expert_groups, groups_of, nearest_groups

D, D_MLP = 24, 40
ROWS = {"attn.c_attn": 48, "attn.o_proj": D, "mlp.up_proj": D_MLP, "mlp.down_proj": D}


def parts(layers=range(5), strategy="none"):
    """The parts of a model with four sublayers a layer, the layers in the order given."""
    modules = [
        LinearModule(
            f"h.{layer}.{name}", "Linear", (rows, D_MLP if "down" in name else D), bias=False
        )
        for layer in layers
        for name, rows in ROWS.items()
    ]
    types = {
        "fused": WeightTypeSettings(pattern=r".*c_attn", qkv_order="qkv"),
        "rest": WeightTypeSettings(pattern=r".*(o|up|down)_proj"),
    }
    architecture = Architecture(r"h\.(\d+)\.", types)
    dims = Dims(d_model=D, n_layers=5, n_heads=4, n_kv_heads=2, d_head=6)
    model = Classification("mine", dims, architecture, classify(modules, architecture, D))
    return split_selected(model, strategy)


def layers_of(groups, family):
    """Layers of each group of a family, in order."""
    return [
        [part.sublayer.layer for part in group.parts] for group in groups if group.family == family
    ]


@pytest.mark.parametrize(
    ("size", "runs"),
    [
        (1, [[0], [1], [2], [3], [4]]),
        (2, [[0, 1], [2, 3], [4]]),
        (3, [[0, 1, 2], [3, 4]]),
        (5, [[0, 1, 2, 3, 4]]),
        (9, [[0, 1, 2, 3, 4]]),
    ],
)
def test_adjacent_layers_share_and_the_last_run_may_be_shorter(size, runs):
    groups = adjacent_groups(parts(), size, {"up"})
    assert layers_of(groups, "up") == runs
    assert all(len({part.sublayer.slot for part in group.parts}) == 1 for group in groups)


def test_families_that_do_not_share_keep_a_basis_for_each_part():
    groups = adjacent_groups(parts(), 3, {"up", "down"})
    assert layers_of(groups, "down") == [[0, 1, 2], [3, 4]]
    for family in ("o", "fused"):
        assert layers_of(groups, family) == [[0], [1], [2], [3], [4]]


def test_layers_that_come_in_another_order_are_grouped_alike():
    groups = adjacent_groups(parts(layers=[3, 0, 4, 2, 1]), 2, {"up"})
    assert layers_of(groups, "up") == [[0, 1], [2, 3], [4]]


def test_layers_with_none_selected_between_them_are_adjacent():
    groups = adjacent_groups(parts(layers=[0, 9, 10]), 2, {"up"})
    assert layers_of(groups, "up") == [[0, 9], [10]]
    assert [g.name for g in groups if g.family == "up"] == ["h.0+9.mlp.up_proj", "h.10.mlp.up_proj"]


NEAR = {"up": {(0, 1): 1.4, (0, 2): 0.1, (1, 3): 0.2, (0, 3): 1.4, (1, 2): 1.4, (2, 3): 1.4}}
"""Of four layers."""


def test_layers_that_are_near_share():
    groups = nearest_groups(parts(layers=range(4)), 2, {"up"}, NEAR)
    assert layers_of(groups, "up") == [[0, 2], [1, 3]]
    assert layers_of(groups, "down") == [[0], [1], [2], [3]]
    names = [group.name for group in groups if group.family == "up"]
    assert names == ["h.0+2.mlp.up_proj", "h.1+3.mlp.up_proj"]
    assert groups == groups_of(parts(layers=range(4)), 2, {"up"}, False, NEAR)


@pytest.mark.parametrize(
    ("layers", "shared", "text"),
    [
        (5, {"up"}, r"between up of layers 0 and 4.*vary\.pairs=all and vary\.layers=null"),
        (4, {"up", "fused"}, r"no distances of fused.*attn\.c_attn.*those of up.*split=qkv"),
    ],
)
def test_a_distance_that_was_not_measured_is_told(layers, shared, text):
    with pytest.raises(SelectionError, match=text):
        nearest_groups(parts(layers=range(layers)), 2, shared, NEAR)


@pytest.mark.parametrize("strategy", ["qkv", "heads"])
def test_parts_of_a_weight_share_only_with_their_likes_in_other_layers(strategy):
    groups = adjacent_groups(parts(strategy=strategy), 2, {"q", "k", "v"})
    fused = [group for group in groups if group.parts[0].label]
    assert {part.label for group in fused for part in group.parts} == (
        set("qkv")
        if strategy == "qkv"
        else {
            "q.head0",
            "q.head1",
            "q.head2",
            "q.head3",
            "k.head0",
            "k.head1",
            "v.head0",
            "v.head1",
        }
    )
    for group in fused:
        assert len({(part.label, part.sublayer.slot) for part in group.parts}) == 1
        assert len(group.parts) in (1, 2)


@pytest.mark.parametrize("strategy", ["none", "qkv", "heads"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_part_is_in_one_group_and_no_two_groups_have_one_name(strategy, size):
    given = parts(strategy=strategy)
    groups = adjacent_groups(given, size, {"q", "k", "up"})
    members = [part.name for group in groups for part in group.parts]
    assert sorted(members) == sorted(part.name for part in given)
    names = [group.name for group in groups]
    assert len(set(names)) == len(names)


def test_a_group_is_named_after_what_its_parts_have_in_common():
    groups = adjacent_groups(parts(strategy="heads"), 2, {"k"})
    names = {group.name for group in groups}
    assert {"h.0-1.attn.c_attn.k.head1", "h.4.attn.c_attn.k.head1"} <= names
    assert {"h.3.attn.c_attn.q.head0", "h.3.mlp.up_proj"} <= names


def test_a_group_stores_one_basis_and_a_coefficient_for_each_part():
    group = next(g for g in adjacent_groups(parts(), 3, {"up"}) if g.family == "up")
    assert (group.d_out, group.d_in) == (3 * D_MLP, D)
    assert group.n_weights == 3 * D_MLP * D
    basis, coefficient = 7 * D, D_MLP * 7
    assert factor_numbers(group, 7, "plain") == basis + 3 * coefficient


# Experts


N_EXPERTS = 3
MOE = {
    "self_attn.q_proj": (D, D),
    **{f"mlp.experts.gate_up_proj.{i}": (2 * D_MLP, D) for i in range(N_EXPERTS)},
    **{f"mlp.experts.down_proj.{i}": (D, D_MLP) for i in range(N_EXPERTS)},
    "mlp.shared_experts.up_proj": (D_MLP, D),
}
"""(d_out, d_in)"""
BY_NUMBER = {f"mlp.experts.{i}.{x}_proj": (D, D) for i in range(N_EXPERTS) for x in ("up", "gate")}
"""Another habit of naming them."""
ALONE = {
    "mlp.experts.gate_up_proj.5": (2 * D_MLP, D),
    "mlp.experts.down_proj.5": (D, D_MLP),
}
"""One expert alone."""


def moe_parts(strategy="none", layers=range(3), shapes=MOE):
    modules = [
        LinearModule(f"model.layers.{layer}.{name}", "Linear", shape, bias=False)
        for layer in layers
        for name, shape in shapes.items()
    ]
    types = {
        "gate_up": WeightTypeSettings(pattern=r".*gate_up_proj\.\d+", gate_up_order="gate_up"),
        "rest": WeightTypeSettings(pattern=r".*(_proj|(?<!gate_)(up|down)_proj\.\d+)"),
    }
    if shapes is BY_NUMBER:
        types = {"all": WeightTypeSettings(pattern=".*")}
    architecture = Architecture(r"layers\.(\d+)\.", types)
    dims = Dims(d_model=D, n_layers=3, n_heads=4, n_kv_heads=4, d_head=6)
    model = Classification("mine", dims, architecture, classify(modules, architecture, D))
    return split_selected(model, strategy)


def of_experts(parts):
    return [part for part in parts if part.sublayer.expert is not None]


def members(groups):
    """Name -> (layer, expert) of each part, in order."""
    return {
        group.name: [(part.sublayer.layer, part.sublayer.expert) for part in group.parts]
        for group in groups
    }


def test_the_same_matrix_of_all_experts_of_a_layer_shares():
    assert members(expert_groups(of_experts(moe_parts()))) == {
        f"model.layers.{layer}.mlp.experts.{name}.0-2": [(layer, i) for i in range(3)]
        for layer in range(3)
        for name in ("gate_up_proj", "down_proj")
    }


def test_a_part_of_an_experts_matrix_shares_with_that_part_of_the_others():
    groups = expert_groups(of_experts(moe_parts("qkv")))
    for group in groups:
        assert len({(part.label, part.family) for part in group.parts}) == 1
    assert members(groups) == {
        f"model.layers.{layer}.mlp.experts.{name}": [(layer, i) for i in range(3)]
        for layer in range(3)
        for name in ("gate_up_proj.0-2.gate", "gate_up_proj.0-2.up", "down_proj.0-2")
    }


def test_the_number_of_an_expert_may_come_before_the_matrix():
    assert members(expert_groups(moe_parts(shapes=BY_NUMBER, layers=[4]))) == {
        f"model.layers.4.mlp.experts.0-2.{x}_proj": [(4, 0), (4, 1), (4, 2)] for x in ("up", "gate")
    }


def test_experts_that_read_inputs_of_another_width_share_among_themselves():
    shapes = {f"mlp.experts.up_proj.{i}": (D, D if i < 2 else D_MLP) for i in range(4)}
    groups = members(expert_groups(moe_parts(shapes=shapes | ALONE, layers=[1])))
    assert groups == {
        "model.layers.1.mlp.experts.up_proj.0-1": [(1, 0), (1, 1)],
        "model.layers.1.mlp.experts.up_proj.2-3": [(1, 2), (1, 3)],
        "model.layers.1.mlp.experts.gate_up_proj.5": [(1, 5)],
        "model.layers.1.mlp.experts.down_proj.5": [(1, 5)],
    }


def test_groups_are_by_layer_unless_experts_share():
    parts = moe_parts("qkv")
    shared = {"gate", "up", "q"}
    assert groups_of(parts, 2, shared, False) == adjacent_groups(parts, 2, shared)
    by_layer = members(groups_of(parts, 2, shared, False))
    assert by_layer["model.layers.0-1.mlp.experts.gate_up_proj.1.gate"] == [(0, 1), (1, 1)]
    assert by_layer["model.layers.2.mlp.experts.gate_up_proj.1.gate"] == [(2, 1)]
    assert by_layer["model.layers.0.mlp.experts.down_proj.2"] == [(0, 2)]


def test_experts_share_within_a_layer_and_all_others_by_layers():
    parts = moe_parts("qkv")
    groups = groups_of(parts, 2, {"q", "up"}, True)
    assert members(groups) == {
        "model.layers.0-1.self_attn.q_proj": [(0, None), (1, None)],
        "model.layers.2.self_attn.q_proj": [(2, None)],
        "model.layers.0-1.mlp.shared_experts.up_proj": [(0, None), (1, None)],
        "model.layers.2.mlp.shared_experts.up_proj": [(2, None)],
        **members(expert_groups(of_experts(parts))),
    }


@pytest.mark.parametrize("share_experts", [False, True])
@pytest.mark.parametrize("strategy", ["none", "qkv", "heads"])
def test_every_part_of_a_model_with_experts_is_in_one_group_of_its_own_name(
    strategy, share_experts
):
    given = moe_parts(strategy)
    groups = groups_of(given, 2, {"gate", "down"}, share_experts)
    assert sorted(part.name for group in groups for part in group.parts) == sorted(
        part.name for part in given
    )
    assert len(members(groups)) == len(groups)
