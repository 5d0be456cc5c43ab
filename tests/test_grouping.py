"""Who shares with whom."""

import pytest

from sharebasis.architecture import Architecture, Dims
from sharebasis.grouping import adjacent_groups
from sharebasis.settings import WeightTypeSettings
from sharebasis.splitting import split_selected
from sharebasis.sublayer import Classification, LinearModule, classify

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
    assert [g.name for g in groups if g.family == "up"] == ["h.0-9.mlp.up_proj", "h.10.mlp.up_proj"]


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
    assert group.n_stored(7) == basis + 3 * coefficient
