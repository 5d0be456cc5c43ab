"""Parts cover a weight's rows exactly once, and are what their labels say."""

from itertools import permutations

import pytest
import torch
from cutting import D_HEAD, GROUPED, D, facts, split

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.families import Architecture
from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SplitError
from sharebasis.linalg.rows import Rows

N_HEADS = {"q": 4, "k": 2, "v": 2}
"""Heads of GROUPED."""
ORDERS = ["".join(order) for order in permutations("qkv")]


@pytest.mark.parametrize("name", ["attn.c_attn", "attn.q_proj", "mlp.up_proj"])
def test_none_keeps_a_weight_whole(name):
    (part,) = split("none", name=name, rows=40, qkv_order="qkv")
    assert (part.label, part.rows.start, part.rows.stop, part.shape) == ("", 0, 40, (40, D))
    assert part.name == part.sublayer.name == f"h.3.{name}"
    assert part.family == part.sublayer.family


@pytest.mark.parametrize("order", ORDERS)
def test_qkv_cuts_a_fused_weight_where_its_order_says(order):
    rows = {x: n * D_HEAD for x, n in N_HEADS.items()}
    parts = split("qkv", GROUPED, rows=8 * D_HEAD, qkv_order=order)
    first, second, third = (rows[x] for x in order)
    assert facts(parts) == [
        (order[0], order[0], 0, first),
        (order[1], order[1], first, first + second),
        (order[2], order[2], first + second, first + second + third),
    ]
    assert [part.name for part in parts] == [f"h.3.attn.c_attn[{x}]" for x in order]


@pytest.mark.parametrize("order", ORDERS)
def test_heads_cuts_a_fused_weight_into_the_heads_of_its_blocks_in_row_order(order):
    parts = split("heads", GROUPED, rows=8 * D_HEAD, qkv_order=order)
    labels = [(f"{x}.head{i}", x) for x in order for i in range(N_HEADS[x])]
    assert facts(parts) == [
        (label, family, D_HEAD * i, D_HEAD * (i + 1)) for i, (label, family) in enumerate(labels)
    ]


@pytest.mark.parametrize("strategy", ["qkv", "heads"])
def test_a_multi_query_weight_has_one_part_for_its_only_key_and_value_head(strategy):
    one = Dims(d_model=D, n_layers=2, n_heads=4, n_kv_heads=1, d_head=D_HEAD)
    k, v = split(strategy, one, rows=6 * D_HEAD, qkv_order="qkv")[-2:]
    assert facts([k, v]) == [("k", "k", 24, 30), ("v", "v", 30, 36)]


@pytest.mark.parametrize(("family", "n_heads"), N_HEADS.items())
def test_heads_cuts_an_unfused_weight_by_the_heads_of_its_family(family, n_heads):
    parts = split("heads", GROUPED, name=f"attn.{family}_proj", rows=n_heads * D_HEAD)
    assert facts(parts) == [
        (f"head{i}", family, D_HEAD * i, D_HEAD * (i + 1)) for i in range(n_heads)
    ]


@pytest.mark.parametrize("name", ["attn.q_proj", "attn.o_proj", "mlp.up_proj"])
def test_qkv_leaves_an_unfused_weight_whole(name):
    assert facts(split("qkv", name=name))[0][0] == ""
    assert len(split("qkv", name=name)) == 1


@pytest.mark.parametrize("name", ["attn.o_proj", "mlp.down_proj", "attn.c_attn"])
def test_heads_leaves_whole_what_has_no_heads_or_does_not_say_its_order(name):
    assert [part.label for part in split("heads", name=name)] == [""]


def test_head_counts_of_a_weight_type_go_before_the_models():
    fused = split("heads", rows=48, qkv_order="qkv", n_head=2, n_kv_head=1)
    assert [(part.label, part.shape[0]) for part in fused] == [
        ("q.head0", 12),
        ("q.head1", 12),
        ("k", 12),
        ("v", 12),
    ]
    keys = {"name": "attn.k_proj", "rows": 24, "dims": GROUPED}
    assert len(split("heads", **keys)) == 2
    assert len(split("heads", n_head=3, **keys)) == 3
    assert len(split("heads", n_head=3, n_kv_head=6, **keys)) == 6


@pytest.mark.parametrize(
    ("own", "strategy", "n_parts"),
    [("none", "heads", 1), ("qkv", "none", 3), ("heads", "none", 12), (None, "qkv", 3)],
)
def test_the_split_of_a_weight_type_goes_before_the_strategy(own, strategy, n_parts):
    assert len(split(strategy, split=own, qkv_order="qkv")) == n_parts


@pytest.mark.parametrize("strategy", ["none", "qkv", "heads"])
@pytest.mark.parametrize("name", ["attn.c_attn", "attn.k_proj", "mlp.up_proj"])
def test_the_parts_products_concatenate_to_the_product_of_the_whole(strategy, name):
    order = {"qkv_order": "vkq"} if name == "attn.c_attn" else {}
    parts = split(strategy, GROUPED, name, rows=48, **order)
    assert [row for part in parts for row in part.rows] == list(range(48))
    weight = torch.randn(48, D, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1)).double()
    pieces = [x @ part.rows.take(weight).T for part in parts]
    torch.testing.assert_close(torch.cat(pieces, -1), x @ weight.T, rtol=0, atol=1e-13)


def test_all_selected_sublayers_of_a_model_are_cut_and_no_others():
    modules = [
        LinearModule(f"h.{layer}.{name}", "Linear", (rows, D), bias=False)
        for layer in (0, 1)
        for name, rows in (("attn.c_attn", 48), ("mlp.up_proj", 40), ("mlp.down_proj", 24))
    ]
    types = {
        "fused": WeightTypeSettings(pattern=r".*c_attn", qkv_order="kvq"),
        "down": WeightTypeSettings(pattern=r".*down_proj"),
    }
    architecture = Architecture(r"h\.(\d+)\.", types)
    model = Classification("mine", GROUPED, architecture, classify(modules, architecture, D))
    assert rows_by_sublayer(split_selected(model, "qkv")) == {
        "h.0.attn.c_attn": [Rows(0, 12), Rows(12, 12), Rows(24, 24)],
        "h.0.mlp.down_proj": [Rows(0, 24)],
        "h.1.attn.c_attn": [Rows(0, 12), Rows(12, 12), Rows(24, 24)],
        "h.1.mlp.down_proj": [Rows(0, 24)],
    }


# What is refused


@pytest.mark.parametrize("order", ["qk", "qkk", "qkvv", "QKV", "abc"])
@pytest.mark.parametrize("strategy", ["qkv", "heads"])
def test_an_order_that_is_no_permutation_is_refused(order, strategy):
    said = rf"^qkv_order '{order}' of weight type mine is not a permutation of 'qkv'"
    with pytest.raises(SplitError, match=said):
        split(strategy, qkv_order=order)


@pytest.mark.parametrize("strategy", ["qkv", "heads"])
def test_fused_rows_that_the_heads_do_not_divide_are_refused(strategy):
    with pytest.raises(SplitError) as error:
        split(strategy, GROUPED, rows=50, qkv_order="qkv")
    for said in ("h.3.attn.c_attn has 50 rows", "4 q, 2 k and 2 v heads", "set n_head and n_kv"):
        assert said in str(error.value)


def test_unfused_rows_that_the_heads_do_not_divide_are_refused():
    with pytest.raises(SplitError) as error:
        split("heads", GROUPED, name="attn.k_proj", rows=25)
    for said in ("h.3.attn.k_proj has 25 rows", "2 heads do not divide", "set n_head (or n_kv"):
        assert said in str(error.value)


@pytest.mark.parametrize("name", ["attn.o_proj", "mlp.up_proj", "attn.c_attn"])
@pytest.mark.parametrize("own", ["qkv", "heads"])
def test_a_split_that_was_asked_for_by_name_is_not_passed_over_in_silence(name, own):
    with pytest.raises(SplitError) as error:
        split("none", name=name, split=own)
    for said in (
        f"weight_types.mine asks for split '{own}'",
        f"h.3.{name}",
        "give its qkv_order or gate_up_order",
    ):
        assert said in str(error.value)
