"""Which gauge element brings one attention sublayer nearest to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sharebasis.gauge.procrustes import best_rotation
from sharebasis.gauge.units import Attention, AttentionGauge, Freedom

ROUNDS = 20
"""Of rotations and orders in turn; a handful is enough, as each one makes the sum larger."""


def align_attention(
    a: Attention, b: Attention, freedom: Freedom, emphasis: Mapping[str, float]
) -> AttentionGauge:
    """The exact gauge element that brings `a` near `b`: small Σ_f w_f ‖g a_f − b_f‖² of q, k, v, o.

    For every key-value head of the one and of the other, the two rotations and the order of
    the queries are found in turn, from the order as it is and from rotations that keys and
    values alone ask for. Then key-value heads are matched by assignment. No step makes the sum
    worse than the identity's, though with several queries to a key the least is not certain.

    Args:
        a: of the same shapes as `b`.
        b: stays as it is.
        freedom: of `a`.
        emphasis: family -> w_f.
    """
    n_kv_heads, n_queries = len(a.k), a.n_queries
    in_place = torch.arange(n_kv_heads, device=a.k.device)
    first, second = (
        torch.cartesian_prod(in_place, in_place).unbind(1) if freedom.heads and n_kv_heads > 1
        else (in_place, in_place)
    )  # fmt: skip
    products = _Products.of(a, b, first, second, emphasis)
    best = _best_order(products, freedom)
    if freedom.heads:
        gains = best.gain.view(n_kv_heads, n_kv_heads)
        rows, columns = linear_sum_assignment(gains.double().cpu().numpy(), maximize=True)
        kv_heads = torch.empty_like(in_place)
        kv_heads[torch.from_numpy(columns)] = torch.from_numpy(rows).to(in_place)
        chosen = kv_heads * n_kv_heads + in_place
    else:
        kv_heads = chosen = in_place
    heads = kv_heads[:, None] * n_queries + best.order[chosen]
    return AttentionGauge(
        heads.flatten(), kv_heads, best.query_key[chosen], best.value_output[chosen]
    )


def align_heads_tied(a: Attention, b: Attention, emphasis: Mapping[str, float]) -> AttentionGauge:
    """One orthogonal matrix for queries, keys, values and outputs of a head, heads as they are.

    Under grouped queries, one for each key-value head and its queries. Rotary positions are
    not looked at, so this is no symmetry of most models: for comparison only.

    Args: as of `align_attention`; keys must be as wide as values.
    """
    kv_heads = torch.arange(len(a.k), device=a.k.device)
    products = _Products.of(a, b, kv_heads, kv_heads, emphasis)
    order = torch.arange(a.n_queries, device=a.k.device).expand(len(a.k), -1)
    rotation = best_rotation(products.query_key(order) + products.value_output(order))
    return AttentionGauge(torch.arange(len(a.q), device=a.q.device), kv_heads, rotation, rotation)


@dataclass(frozen=True, slots=True)
class _Products:
    """A Bᵀ for pairs of a key-value head of `a` and one of `b`, and for all of their queries."""

    k: Float[Tensor, "pairs d_head d_head"]
    v: Float[Tensor, "pairs d_value d_value"]
    q: Float[Tensor, "pairs n_queries n_queries d_head d_head"]
    o: Float[Tensor, "pairs n_queries n_queries d_value d_value"]

    @staticmethod
    def of(
        a: Attention,
        b: Attention,
        first: Int[Tensor, " pairs"],
        second: Int[Tensor, " pairs"],
        emphasis: Mapping[str, float],
    ) -> _Products:
        def product(name: str) -> Tensor:
            x, y = a.families[name], b.families[name]
            gram = emphasis[name] * (x.flatten(0, 1) @ y.flatten(0, 1).T)
            n = len(a.k)
            by_head = gram.view(n, -1, x.shape[1], n, len(x) // n, x.shape[1])
            return by_head[first, :, :, second].transpose(2, 3)

        return _Products(
            k=product("k")[:, 0, 0], v=product("v")[:, 0, 0], q=product("q"), o=product("o")
        )

    def query_key(self, order: Int[Tensor, "pairs n_queries"]) -> Float[Tensor, "pairs d d"]:
        """Of keys and queries together, queries of `a` in an order."""
        return self.k + _ordered(self.q, order)

    def value_output(self, order: Int[Tensor, "pairs n_queries"]) -> Float[Tensor, "pairs d d"]:
        return self.v + _ordered(self.o, order)

    def gains(
        self, query_key: Float[Tensor, "pairs d d"], value_output: Float[Tensor, "pairs e e"]
    ) -> Float[Tensor, "pairs n_queries n_queries"]:
        """What each query head of `a` brings in the place of each of `b`."""
        return torch.einsum("pde,pijed->pij", query_key, self.q) + torch.einsum(
            "pde,pijed->pij", value_output, self.o
        )


@dataclass(frozen=True, slots=True)
class _Aligned:
    """What was found for each pair of key-value heads."""

    order: Int[Tensor, "pairs n_queries"]
    query_key: Float[Tensor, "pairs d_head d_head"]
    value_output: Float[Tensor, "pairs d_value d_value"]
    gain: Float[Tensor, " pairs"]
    """Σ_f w_f <g a_f, b_f>."""

    def or_better(self, other: _Aligned) -> _Aligned:
        """Of each pair the one with the larger gain."""
        better = other.gain > self.gain
        return _Aligned(
            torch.where(better[:, None], other.order, self.order),
            torch.where(better[:, None, None], other.query_key, self.query_key),
            torch.where(better[:, None, None], other.value_output, self.value_output),
            torch.where(better, other.gain, self.gain),
        )


def _best_order(products: _Products, freedom: Freedom) -> _Aligned:
    n_pairs, n_queries = products.q.shape[:2]
    as_it_is = torch.arange(n_queries, device=products.q.device).expand(n_pairs, -1)
    if n_queries == 1 or not freedom.heads:
        return _rotated(products, as_it_is, freedom)
    by_keys = _order(products.gains(*_rotations(products.k, products.v, freedom)))
    return _improved(products, as_it_is, freedom).or_better(_improved(products, by_keys, freedom))


def _improved(
    products: _Products, order: Int[Tensor, "pairs n_queries"], freedom: Freedom
) -> _Aligned:
    """Rotations and orders in turn, until nothing changes."""
    best = _rotated(products, order, freedom)
    for _ in range(ROUNDS):
        order = _order(products.gains(best.query_key, best.value_output))
        if torch.equal(order, best.order):
            break
        best = best.or_better(_rotated(products, order, freedom))
    return best


def _rotated(
    products: _Products, order: Int[Tensor, "pairs n_queries"], freedom: Freedom
) -> _Aligned:
    """The best rotations for an order."""
    qk, vo = products.query_key(order), products.value_output(order)
    query_key, value_output = _rotations(qk, vo, freedom)
    gain = (query_key * qk.mT).sum((1, 2)) + (value_output * vo.mT).sum((1, 2))
    return _Aligned(order, query_key, value_output, gain)


def _rotations(
    query_key: Float[Tensor, "pairs d d"],
    value_output: Float[Tensor, "pairs e e"],
    freedom: Freedom,
) -> tuple[Float[Tensor, "pairs d d"], Float[Tensor, "pairs e e"]]:
    return (
        best_rotation(query_key, freedom.query_key, freedom.planes),
        best_rotation(value_output, freedom.value_output),
    )


def _ordered(
    products: Float[Tensor, "pairs n n d d"], order: Int[Tensor, "pairs n"]
) -> Float[Tensor, "pairs d d"]:
    """Sum over the places j of b of the products with head order[j] of a."""
    pairs = torch.arange(len(order), device=order.device)[:, None]
    places = torch.arange(order.shape[1], device=order.device)
    return products[pairs, order, places].sum(1)


def _order(gains: Float[Tensor, "pairs n n"]) -> Int[Tensor, "pairs n"]:
    """The best assignment of heads of a to places of b, for each pair."""
    orders = torch.empty(gains.shape[:2], dtype=torch.long)
    for order, of_pair in zip(orders, gains.double().cpu().numpy(), strict=True):
        rows, columns = linear_sum_assignment(of_pair, maximize=True)
        order[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return orders.to(gains.device)
