"""Blocks that take turns are cut where the families' own code puts them.

What is expected is written by reshaping the numbers of the rows, as the families' own modelling
code reshapes what the fused sublayer gives.
"""

import math

import pytest
import torch
from cutting import D_HEAD, GROUPED, D, facts, split

from sharebasis.architecture.dims import Dims
from sharebasis.errors import SplitError
from sharebasis.linalg.rows import Rows, inverse_order


def rows_of(parts):
    return {part.label: list(part.rows) for part in parts}


def taken(parts, d_out):
    """The rows of every part; together they are each row of the weight once."""
    rows = rows_of(parts)
    assert sorted(row for own in rows.values() for row in own) == list(range(d_out))
    weight = torch.randn(d_out, D, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([part.rows.take(weight) for part in parts])
    order = inverse_order([part.rows for part in parts])
    assert torch.equal(whole if order is None else whole[order], weight)
    return rows


def numbers(*shape):
    """Of the rows of a weight whose outputs are reshaped to `shape`."""
    return torch.arange(math.prod(shape)).reshape(shape)


def flat(index):
    return index.reshape(-1).tolist()


def neox(n_heads):
    """GPT-NeoX, BLOOM: view(n_heads, 3, d_head)."""
    index = numbers(n_heads, 3, D_HEAD)
    return {x: index[:, i] for i, x in enumerate("qkv")}


def falcon(n_heads, n_kv):
    """Falcon's newer layout: view(n_kv, n_heads / n_kv + 2, d_head); q, then one k and one v."""
    index = numbers(n_kv, n_heads // n_kv + 2, D_HEAD)
    return {
        "q": index[:, :-2].reshape(n_heads, D_HEAD),
        "k": index[:, -2],
        "v": index[:, -1],
    }


def codegen(n_heads):
    """CodeGen: view(4, 3 * d_local), split into q, v and k (its own order) of d_local each."""
    index = numbers(4, 3, n_heads // 4, D_HEAD)
    return {x: index[:, i].reshape(n_heads, D_HEAD) for i, x in enumerate("qvk")}


def whole_blocks(n_heads, n_kv):
    """One after the other."""
    q, k, v = numbers(n_heads + 2 * n_kv, D_HEAD).split([n_heads, n_kv, n_kv])
    return {"q": q, "k": k, "v": v}


LAYOUTS = {
    "neox": (4, 4, {"qkv_order": "qkv", "interleave": "head"}, neox(4)),
    "neox, one head": (1, 1, {"qkv_order": "qkv", "interleave": "head"}, neox(1)),
    "falcon": (4, 2, {"qkv_order": "qkv", "interleave": "head"}, falcon(4, 2)),
    "falcon, many": (12, 3, {"qkv_order": "qkv", "interleave": "head"}, falcon(12, 3)),
    "falcon, one kv head": (4, 1, {"qkv_order": "qkv", "interleave": "head"}, falcon(4, 1)),
    "codegen": (8, 8, {"qkv_order": "qvk", "interleave": 4}, codegen(8)),
    "codegen, a head a turn": (4, 4, {"qkv_order": "qvk", "interleave": 4}, codegen(4)),
    "one turn": (4, 2, {"qkv_order": "qkv", "interleave": 1}, whole_blocks(4, 2)),
    "blocked": (4, 2, {"qkv_order": "qkv"}, whole_blocks(4, 2)),
}
"""Query heads, key-value heads, settings, and label -> (head, row of it) -> row of the weight."""


def laid_out(layout, strategy):
    """The parts of a fused weight of a layout, and how many rows it has."""
    n_heads, n_kv, settings, _ = LAYOUTS[layout]
    d_out = (n_heads + 2 * n_kv) * D_HEAD
    sizes = Dims(d_model=D, n_layers=1, n_heads=n_heads, n_kv_heads=n_kv, d_head=D_HEAD)
    return split(strategy, sizes, rows=d_out, **settings), d_out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_that_take_turns_are_where_the_familys_own_reshape_puts_them(layout):
    _, _, settings, expected = LAYOUTS[layout]
    parts, d_out = laid_out(layout, "qkv")
    assert [part.label for part in parts] == list(settings["qkv_order"])
    assert all(part.family == part.label for part in parts)
    assert all(part.shape == (expected[part.label].numel(), D) for part in parts)
    assert taken(parts, d_out) == {label: flat(index) for label, index in expected.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_of_blocks_that_take_turns_are_where_the_familys_own_reshape_puts_them(layout):
    expected = LAYOUTS[layout][-1]
    parts, d_out = laid_out(layout, "heads")
    assert taken(parts, d_out) == {
        label if len(index) == 1 else f"{label}.head{i}": flat(head)
        for label, index in expected.items()
        for i, head in enumerate(index)
    }
    assert all(part.family == part.label[0] for part in parts)


@pytest.mark.parametrize("strategy", ["qkv", "heads"])
@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize("interleave", [None, "row", 1, 5])
def test_gate_and_up_are_cut_where_the_order_and_the_turns_say(strategy, order, interleave):
    first, second = {
        None: (numbers(40)[:20], numbers(40)[20:]),
        "row": (numbers(40)[::2], numbers(40)[1::2]),  # GPT-OSS
        1: numbers(2, 20),
        5: numbers(5, 2, 4).unbind(1),
    }[interleave]
    parts = split(
        strategy, name="mlp.gate_up_proj", rows=40, gate_up_order=order, interleave=interleave
    )
    one, other = order.split("_")
    assert [(part.label, part.family) for part in parts] == [(one, one), (other, other)]
    assert taken(parts, 40) == {one: flat(first), other: flat(second)}


def test_a_row_of_each_in_turn_is_so_for_q_k_and_v_too():
    parts = split("qkv", interleave="row", qkv_order="kvq")
    index = numbers(D, 3)
    assert taken(parts, 3 * D) == {x: flat(index[:, i]) for i, x in enumerate("kvq")}
    heads = taken(split("heads", interleave="row", qkv_order="kvq"), 3 * D)
    assert heads["v.head2"] == flat(index.reshape(4, D_HEAD, 3)[2, :, 1])


def test_of_longer_blocks_more_than_a_row_has_its_turn():
    parts = split("qkv", GROUPED, rows=48, interleave="row", qkv_order="kqv")
    index = numbers(2 * D_HEAD, 4)
    assert taken(parts, 48) == {
        "k": flat(index[:, 0]),
        "q": flat(index[:, 1:3]),
        "v": flat(index[:, 3]),
    }


LATENT = Dims(d_model=D, n_layers=1, n_heads=4, n_kv_heads=4, d_head=2, d_v=5)


@pytest.mark.parametrize("interleave", [None, "head"])
@pytest.mark.parametrize("order", ["kv", "vk"])
def test_keys_and_values_of_a_latent_are_cut_by_their_own_widths(order, interleave):
    width = {"k": 7, "v": 5}
    if interleave:  # DeepSeek: view(n_heads, d_nope + d_v), split into d_nope and d_v
        first = numbers(4, 12).split([width[x] for x in order], dim=-1)
    else:
        first = (own.view(4, -1) for own in numbers(48).split([4 * width[x] for x in order]))
    expected = dict(zip(order, first, strict=True))
    settings = {"name": "attn.kv_b_proj", "rows": 48, "qkv_order": order, "interleave": interleave}
    parts = split("qkv", LATENT, **settings)
    assert [(part.label, part.family) for part in parts] == [(x, x) for x in order]
    assert taken(parts, 48) == {x: flat(index) for x, index in expected.items()}
    assert taken(split("heads", LATENT, **settings), 48) == {
        f"{x}.head{i}": flat(head) for x, index in expected.items() for i, head in enumerate(index)
    }
    assert len(split("none", LATENT, **settings)) == 1


def test_keys_and_values_without_a_width_of_their_own_are_as_many():
    parts = split("qkv", GROUPED, name="attn.kv", rows=40, qkv_order="kv")
    assert facts(parts) == [("k", "k", 0, 20), ("v", "v", 20, 40)]


@pytest.mark.parametrize("rows", [20, 19, 50])
def test_keys_and_values_of_a_latent_that_the_heads_do_not_divide_are_refused(rows):
    with pytest.raises(SplitError) as error:
        split("heads", LATENT, name="attn.kv_b", rows=rows, qkv_order="kv", interleave="head")
    for said in (
        f"h.3.attn.kv_b has {rows} rows",
        "4 k and 4 v heads (v: of 5 rows)",
        "set n_head",
    ):
        assert said in str(error.value)


def test_turns_do_not_matter_to_a_weight_that_stays_whole():
    (part,) = split("none", qkv_order="qkv", interleave="head")
    assert part.rows == Rows(0, 3 * D)


@pytest.mark.parametrize("interleave", [5, 16])
def test_turns_that_do_not_divide_the_blocks_are_refused(interleave):
    with pytest.raises(SplitError) as error:
        split("qkv", GROUPED, rows=48, qkv_order="vqk", interleave=interleave)
    for said in (
        "The blocks of h.3.attn.c_attn have 12, 24, 12 rows",
        f"cannot take {interleave} turns",
        "correct interleave of weight type mine",
    ):
        assert said in str(error.value)


def test_turns_that_cut_a_head_in_two_are_refused():
    with pytest.raises(SplitError, match=r"h\.3\.attn\.c_attn.*interleave of weight type mine"):
        split("heads", qkv_order="qkv", interleave=3)


def test_gate_and_up_have_no_heads_to_take_turns_by():
    with pytest.raises(SplitError) as error:
        split("qkv", name="mlp.up_proj", rows=40, gate_up_order="gate_up", interleave="head")
    for said in ("The blocks of h.3.mlp.up_proj have 20, 20 rows", "correct interleave"):
        assert said in str(error.value)


def test_an_odd_number_of_rows_is_not_cut_into_gate_and_up():
    with pytest.raises(SplitError) as error:
        split("qkv", name="mlp.up_proj", rows=41, gate_up_order="up_gate")
    for said in ("h.3.mlp.up_proj has 41 rows", "remove gate_up_order from weight type mine"):
        assert said in str(error.value)


@pytest.mark.parametrize("own", ["qkv", "heads"])
def test_gate_and_up_may_be_asked_for_by_name(own):
    parts = split("none", name="mlp.up_proj", rows=40, split=own, gate_up_order="gate_up")
    assert facts(parts) == [("gate", "gate", 0, 20), ("up", "up", 20, 40)]
