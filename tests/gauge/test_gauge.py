"""Alignments: planted gauge elements come back, nothing gets further away, optima are optima."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations, product
from typing import get_args

import numpy as np
import pytest
import torch
from gauges import EXACT, random_element, random_rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sharebasis.config.analyse import Alignment
from sharebasis.gauge.alignment import align, distances
from sharebasis.gauge.neurons import Scales, align_neurons
from sharebasis.gauge.procrustes import WARM_START, best_matching, best_rotation
from sharebasis.gauge.units import (
    Attention,
    AttentionGauge,
    Freedom,
    Identity,
    Layer,
    Mlp,
    NeuronOrder,
)

D_MODEL, D_HEAD, D_MLP = 20, 8, 24
HALVES = ((0, 4), (1, 5), (2, 6), (3, 7))
PARTIAL = ((0, 1), (2, 3))

FREEDOMS: Mapping[str, Freedom] = {
    "no positions": Freedom("all", (), "all", heads=True, neuron_scales=True),
    "rotary": Freedom("all", HALVES, "all", heads=True, neuron_scales=True),
    "partial rotary": Freedom("all", PARTIAL, "all", heads=True),
    "q/k norms": Freedom("signs", HALVES, "all", heads=True, neuron_scales=True),
    "slopes of heads": Freedom("all", (), "all", heads=False),
    "clipped": Freedom("signs", HALVES, "signs", heads=True),
    "unknown": Freedom(),
}
HEADS = {"one head": (1, 1), "one query a key": (3, 1), "grouped": (2, 3), "one key": (1, 4)}
"""Key-value heads, and queries of each."""


def random_layer(heads: tuple[int, int] = (2, 3), biases: bool = True) -> Layer:
    n_kv, n_queries = heads
    n = n_kv * n_queries

    def of(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    attention = Attention(
        q=of(n, D_HEAD, D_MODEL),
        k=of(n_kv, D_HEAD, D_MODEL),
        v=of(n_kv, D_HEAD, D_MODEL),
        o=of(n, D_HEAD, D_MODEL),
        q_bias=of(n, D_HEAD) if biases else None,
        k_bias=of(n_kv, D_HEAD) if biases else None,
        v_bias=of(n_kv, D_HEAD) if biases else None,
    )
    weights = [of(D_MLP, D_MODEL) for _ in range(3)]
    return Layer({"attention": attention, "mlp": Mlp(*weights)}, {"input_norm": (of(D_MODEL),)})


def scrambled(layer: Layer, freedom: Freedom) -> Layer:
    units = {name: random_element(unit, freedom) for name, unit in layer.units.items()}
    return replace(layer, units=units)


# Planted truth


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("freedom", FREEDOMS.values(), ids=FREEDOMS)
def test_a_scrambled_layer_is_at_distance_zero_from_itself(
    freedom: Freedom, heads: tuple[int, int]
) -> None:
    layer = random_layer(heads)
    found = distances(scrambled(layer, freedom), layer, freedom, "exact")
    assert set(found.aligned) == {"q", "k", "v", "o", "gate", "up", "down", "input_norm"}
    assert max(found.aligned.values()) < EXACT
    assert min(found.unaligned[family] for family in ("gate", "up", "down")) > 0.5
    if freedom.value_output == "all":
        assert min(found.unaligned[family] for family in "vo") > 0.5


@pytest.mark.parametrize("freedom", FREEDOMS.values(), ids=FREEDOMS)
def test_biases_come_back_with_the_weights(freedom: Freedom) -> None:
    layer = random_layer()
    mixed = scrambled(layer, freedom)
    back = align(mixed, layer, freedom, "exact")(mixed)
    ours, theirs = back.units["attention"], layer.units["attention"]
    assert isinstance(ours, Attention)
    assert isinstance(theirs, Attention)
    for name in ("q_bias", "k_bias", "v_bias"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_a_rotation_across_planes_is_not_removed_from_rotary_heads() -> None:
    layer = random_layer()
    mixed = scrambled(layer, FREEDOMS["no positions"])
    found = distances(mixed, layer, FREEDOMS["rotary"], "exact").aligned
    assert min(found["q"], found["k"]) > 0.5
    assert max(found["v"], found["o"]) < EXACT  # where the keys do not mislead


def test_two_scrambled_layers_are_as_far_from_each_other_as_they_were() -> None:
    freedom = FREEDOMS["rotary"]
    a, b = random_layer((3, 1)), random_layer((3, 1))
    before = distances(a, b, freedom, "exact").aligned
    kept = replace(freedom, neuron_scales=False)  # the second layer says how long neurons are
    after = distances(scrambled(a, freedom), scrambled(b, kept), freedom, "exact").aligned
    assert after == pytest.approx(before, rel=1e-9)


def test_tied_recovers_a_tied_rotation_and_a_dense_one_of_the_neurons() -> None:
    layer = random_layer()
    turn = random_rotation(D_HEAD, "all", ())
    attention, mlp = layer.units["attention"], layer.units["mlp"]
    assert isinstance(attention, Attention)
    n_kv, n = len(attention.k), len(attention.q)
    same = turn.expand(n_kv, -1, -1)
    gauge = AttentionGauge(torch.arange(n), torch.arange(n_kv), same, same)
    dense = random_rotation(D_MLP, "all", ())
    assert isinstance(mlp, Mlp)
    assert mlp.gate is not None
    turned = Mlp(dense @ mlp.up, dense @ mlp.down, dense @ mlp.gate)
    mixed = replace(layer, units={"attention": gauge(attention), "mlp": turned})
    found = distances(mixed, layer, Freedom(), "tied")
    assert max(found.aligned.values()) < EXACT
    assert min(found.unaligned[name] for name in ("q", "k", "v", "o", "up")) > 0.5
    assert min(distances(mixed, layer, FREEDOMS["rotary"], "exact").aligned[x] for x in "qk") > 0.1


# Never further away


@given(
    seed=st.integers(0, 2**16),
    noise=st.sampled_from([0.0, 1e-9, 0.05, 1.0, 100.0]),
    heads=st.sampled_from(list(HEADS.values())),
    freedom=st.sampled_from(list(FREEDOMS.values())),
    alignment=st.sampled_from(get_args(Alignment)),
)
@settings(max_examples=120, deadline=None)
def test_no_family_is_further_away_aligned_than_it_was(
    seed: int, noise: float, heads: tuple[int, int], freedom: Freedom, alignment: Alignment
) -> None:
    torch.manual_seed(seed)
    layer, other = random_layer(heads), random_layer(heads)
    near = Layer(
        {
            name: replace(
                unit,
                **{x: w + noise * other.units[name].families[x] for x, w in unit.families.items()},
            )
            for name, unit in layer.units.items()
        },
        layer.rest,
    )
    found = distances(near, layer, freedom, alignment)
    for family, aligned in found.aligned.items():
        assert 0 <= aligned <= found.unaligned[family] <= 2
    if noise == 0:
        assert set(found.aligned.values()) == {0.0}
    if noise == 100 and alignment == "exact" and freedom is FREEDOMS["rotary"]:
        assert sum(found.aligned.values()) < sum(found.unaligned.values()) - 0.1


def test_families_that_pull_apart_leave_none_of_them_further_away() -> None:
    layer = random_layer()
    mlp = layer.units["mlp"]
    assert isinstance(mlp, Mlp)
    order = NeuronOrder(torch.arange(D_MLP).roll(1), torch.ones(D_MLP, dtype=torch.float64))
    pulling = replace(order(mlp), gate=mlp.gate)  # up and down ask for an order, gate against it
    a = replace(layer, units={"mlp": pulling})
    found = distances(a, layer, FREEDOMS["rotary"], "exact")
    assert found.aligned["gate"] == 0
    assert isinstance(
        align(a, layer, FREEDOMS["rotary"], "exact").gauges["mlp"],
        Identity | NeuronOrder,
    )


def test_gains_that_would_move_with_the_heads_leave_the_heads_in_their_places() -> None:
    a, b = random_layer((3, 1)), random_layer((3, 1))
    free = align(a, b, FREEDOMS["rotary"], "exact").gauges["attention"]
    assert isinstance(free, AttentionGauge)
    assert free.kv_heads.tolist() != [0, 1, 2]
    gains = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) @ torch.ones(
        3, D_HEAD, dtype=torch.float64
    )
    a, b = (
        replace(x, units={"attention": replace(x.units["attention"], k_norm=gains)}) for x in (a, b)
    )
    gauge = align(a, b, FREEDOMS["rotary"], "exact").gauges["attention"]
    assert isinstance(gauge, AttentionGauge)
    assert gauge.kv_heads.tolist() == [0, 1, 2]
    found = distances(a, b, FREEDOMS["rotary"], "exact")
    assert found.n_left == 0
    assert found.aligned["k_norm"] == 0
    assert found.aligned["v"] < found.unaligned["v"]


# Optima


@pytest.mark.parametrize("freedom", ["no positions", "rotary"])
def test_attention_is_matched_as_by_trying_every_order(freedom: str) -> None:
    """With one query to a key; rotations by scipy."""
    chosen = FREEDOMS[freedom]
    a, b = (random_layer((3, 1)).normalised() for _ in range(2))
    mine, other = a.units["attention"], b.units["attention"]
    assert isinstance(mine, Attention)
    assert isinstance(other, Attention)

    def residue(i: int, j: int) -> float:
        pairs = [((mine.v, other.v), (mine.o, other.o)), ((mine.q, other.q), (mine.k, other.k))]
        total = 0.0
        for which, both in enumerate(pairs):
            x, y = (torch.cat([both[0][s][n], both[1][s][n]], 1) for s, n in ((0, i), (1, j)))
            planes = HALVES if which and freedom == "rotary" else (range(D_HEAD),)
            for rows in planes:
                own, theirs = x[list(rows)], y[list(rows)]
                turn = torch.from_numpy(orthogonal_procrustes(own.T, theirs.T)[0].T)
                if len(own) == 2:  # rotations alone: scipy may turn the plane over
                    angles = torch.linspace(0, 2 * np.pi, 20001, dtype=torch.float64)
                    inner = own @ theirs.T
                    gains = angles.cos() * inner.trace() + angles.sin() * (
                        inner[0, 1] - inner[1, 0]
                    )
                    total += float(own.square().sum() + theirs.square().sum() - 2 * gains.max())
                else:
                    total += float((turn @ own - theirs).square().sum())
        return total

    best = min(sum(residue(i, j) for j, i in enumerate(order)) for order in permutations(range(3)))
    found = align(a, b, chosen, "exact")(a).units["attention"].families
    reached = sum(float((x - other.families[n]).square().sum()) for n, x in found.items())
    assert reached == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("scales", ["signs", "none"])
def test_neurons_are_matched_as_by_trying_every_order(scales: Scales) -> None:
    a, b = (Mlp(*(torch.randn(5, 4, dtype=torch.float64) for _ in range(3))) for _ in range(2))
    flips = list(product([1.0, -1.0] if scales == "signs" else [1.0], repeat=5))

    def residue(gauge: NeuronOrder) -> float:
        moved = gauge(a)
        return sum(float((x - b.families[n]).square().sum()) for n, x in moved.families.items())

    best = min(
        residue(NeuronOrder(torch.tensor(order), torch.tensor(flip, dtype=torch.float64)))
        for order in permutations(range(5))
        for flip in flips
    )
    found = align_neurons(a, b, scales, {"gate": 1.0, "up": 1.0, "down": 1.0})
    assert residue(found) == pytest.approx(best)


def test_scaled_neurons_get_the_ratio_of_norms_of_those_they_are_matched_with() -> None:
    a, b = random_layer().units["mlp"], random_layer().units["mlp"]
    assert isinstance(a, Mlp)
    assert isinstance(b, Mlp)
    a.up[3] = 0  # has no ratio, and must not spoil the others
    moved = align_neurons(a, b, "any", {"gate": 1.0, "up": 1.0, "down": 1.0})(a)
    ours, theirs = (x.up.norm(dim=1) / x.down.norm(dim=1) for x in (moved, b))
    nothing = moved.up.norm(dim=1) == 0
    assert int(nothing.sum()) == 1
    torch.testing.assert_close(ours[~nothing], theirs[~nothing])
    assert moved.down.isfinite().all()


def test_the_rotation_is_the_one_of_scipy_and_not_its_transpose() -> None:
    a, b = (torch.randn(6, 30, dtype=torch.float64) for _ in range(2))
    turn = best_rotation(a @ b.T)
    torch.testing.assert_close(turn, torch.from_numpy(orthogonal_procrustes(a.T, b.T)[0].T))
    assert (turn @ a - b).norm() < (turn.T @ a - b).norm()


@pytest.mark.parametrize("n", [5, WARM_START, WARM_START + 50])
@pytest.mark.parametrize("kind", ["random", "planted", "constant", "rows of one kind"])
def test_a_matching_from_prices_is_the_best_one(n: int, kind: str) -> None:
    scores = torch.rand(n, n)
    if kind == "planted":
        scores[torch.arange(n).roll(1), torch.arange(n)] += 1000
    elif kind == "constant":
        scores = torch.ones(n, n)
    elif kind == "rows of one kind":
        scores = torch.rand(n, 1) * 1e4 + torch.rand(1, n) + 1e-3 * scores
    order = best_matching(scores)
    assert sorted(order.tolist()) == list(range(n))
    rows, columns = linear_sum_assignment(scores.double().numpy(), maximize=True)
    reached = scores.double()[order, torch.arange(n)].sum()
    torch.testing.assert_close(reached, scores.double()[rows, columns].sum(), rtol=1e-12, atol=0)
    if kind == "planted":
        assert torch.equal(order, torch.arange(n).roll(1))


# Scale


def test_a_scale_of_a_whole_weight_is_no_distance_and_zeros_stay_zero() -> None:
    layer = random_layer()
    double = Layer(
        {
            name: unit.scaled(dict.fromkeys(unit.families, 2.0))
            for name, unit in layer.units.items()
        },
        {name: tuple(3 * x for x in own) for name, own in layer.rest.items()},
    )
    assert max(distances(double, layer, Freedom(), "none").unaligned.values()) < EXACT
    empty = Layer(rest={"norm": (torch.zeros(4),)})
    full = Layer(rest={"norm": (torch.ones(4),)})
    assert distances(empty, empty, Freedom(), "none").aligned == {"norm": 0.0}
    assert distances(empty, full, Freedom(), "none").aligned == {"norm": 1.0}
    assert distances(full, Layer(rest={"norm": (torch.ones(5),)}), Freedom(), "none").aligned == {}


def test_a_family_of_experts_is_at_the_root_mean_square_of_their_distances() -> None:
    def layer(n: int) -> Layer:
        weights = [Mlp(*torch.randn(2, 6, 4, dtype=torch.float64)) for _ in range(n)]
        return Layer({f"expert {i}": x for i, x in enumerate(weights)})

    a, b = layer(3), layer(3)
    pairs = [(x.families["up"], b.units[name].families["up"]) for name, x in a.units.items()]
    squares = [float((x / x.norm() - y / y.norm()).square().sum()) for x, y in pairs]
    found = distances(a, b, Freedom(), "none").aligned
    assert found["up"] == pytest.approx(np.sqrt(np.mean(squares)))
    assert "up" not in distances(a, layer(2), Freedom(), "none").aligned
