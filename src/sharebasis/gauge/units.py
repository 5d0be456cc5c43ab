"""What may be changed in a block without changing what it computes.

Weights are kept with the residual stream last, so that a gauge acts on rows: W_O of a head is
(d_value, d_model) here, W_down (d_mlp, d_model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

Rotations = Literal["all", "signs", "none"]
"""Of the coordinates of a head: orthogonal matrices, signs alone, or none."""


@dataclass(frozen=True, slots=True)
class Freedom:
    """Which gauge elements are exact in a block.

    Of the invertible matrices that would do for values and outputs, and of the scales that
    queries and keys could exchange, only those are meant that keep norms.
    """

    query_key: Rotations = "none"
    """Rotations that queries and keys of a head may take together. all: any that positions
    allow; signs: of single coordinates (of both in a plane at once); none."""
    planes: tuple[tuple[int, int], ...] = ()
    """Pairs of coordinates of a head that rotary positions turn against each other; a rotation
    may turn them by an angle, and mix those of no pair freely."""
    value_output: Rotations = "none"
    """The same of values and outputs, which positions do not restrict."""
    heads: bool = False
    """Whether key-value heads may be permuted, and the queries of one of them."""
    neuron_scales: bool = False
    """Whether up of a neuron that has a gate may be multiplied by what down is divided by."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The weights of one attention sublayer; head h reads the key-value head h // n_queries."""

    q: Float[Tensor, "n_heads d_head d_model"]
    k: Float[Tensor, "n_kv_heads d_head d_model"]
    v: Float[Tensor, "n_kv_heads d_value d_model"]
    o: Float[Tensor, "n_heads d_value d_model"]
    q_bias: Float[Tensor, "n_heads d_head"] | None = None
    k_bias: Float[Tensor, "n_kv_heads d_head"] | None = None
    v_bias: Float[Tensor, "n_kv_heads d_value"] | None = None
    q_norm: Float[Tensor, "n_heads d_head"] | None = None
    """Gains of a norm that has one for every coordinate of every head."""
    k_norm: Float[Tensor, "n_kv_heads d_head"] | None = None
    sinks: Float[Tensor, " n_heads"] | None = None
    """Logits of the token that is not there."""

    @property
    def n_queries(self) -> int:
        """Query heads of a key-value head."""
        return len(self.q) // len(self.k)

    @property
    def families(self) -> Mapping[str, Tensor]:
        """What distances are measured of."""
        return _present(
            q=self.q, k=self.k, v=self.v, o=self.o, q_norm=self.q_norm, k_norm=self.k_norm
        )

    def scaled(self, factors: Mapping[str, float]) -> Attention:
        """With every family times a number."""
        return replace(self, **{name: factors[name] * x for name, x in self.families.items()})


@dataclass(frozen=True, slots=True)
class Mlp:
    """The weights of one MLP, or of one expert."""

    up: Float[Tensor, "d_mlp d_model"]
    down: Float[Tensor, "d_mlp d_model"]
    gate: Float[Tensor, "d_mlp d_model"] | None = None
    up_bias: Float[Tensor, " d_mlp"] | None = None
    gate_bias: Float[Tensor, " d_mlp"] | None = None

    @property
    def families(self) -> Mapping[str, Tensor]:
        """What distances are measured of."""
        return _present(gate=self.gate, up=self.up, down=self.down)

    def scaled(self, factors: Mapping[str, float]) -> Mlp:
        """With every family times a number."""
        return replace(self, **{name: factors[name] * x for name, x in self.families.items()})


Unit = Attention | Mlp
"""Weights that one gauge element acts on."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer."""

    units: Mapping[str, Unit] = field(default_factory=dict)
    """By name of their place in the layer."""
    rest: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Family -> weights that no gauge acts on: norms, and what is in no unit."""

    @property
    def families(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Family -> its weights: one, or one for each expert."""
        families: dict[str, tuple[Tensor, ...]] = dict(self.rest)
        for unit in self.units.values():
            for name, weight in unit.families.items():
                families[name] = (*families.get(name, ()), weight)
        return families

    def normalised(self) -> Layer:
        """With every weight divided by its Frobenius norm, zeros left as they are, and by the
        root of how many its family has: distances are then root mean squares over experts."""
        counts = {name: len(weights) ** -0.5 for name, weights in self.families.items()}
        return Layer(
            {
                name: unit.scaled(
                    {x: counts[x] * _inverse_norm(weight) for x, weight in unit.families.items()}
                )
                for name, unit in self.units.items()
            },
            {
                name: tuple(counts[name] * _inverse_norm(x) * x for x in weights)
                for name, weights in self.rest.items()
            },
        )


@dataclass(frozen=True, slots=True)
class AttentionGauge:
    """An order of the heads, and a rotation of queries and keys and one of values and outputs
    for each key-value head (in the new order)."""

    heads: Int[Tensor, " n_heads"]
    """The query head that comes to each place."""
    kv_heads: Int[Tensor, " n_kv_heads"]
    query_key: Float[Tensor, "n_kv_heads d_head d_head"]
    value_output: Float[Tensor, "n_kv_heads d_value d_value"]

    def __call__(self, unit: Attention) -> Attention:
        """W_Q -> R W_Q, W_K -> R W_K, W_V -> S W_V, W_O -> W_O Sᵀ; biases follow."""
        n_queries = unit.n_queries
        qk, vo = self.query_key, self.value_output
        qk_of_heads, vo_of_heads = (x.repeat_interleave(n_queries, 0) for x in (qk, vo))
        return Attention(
            q=qk_of_heads @ unit.q[self.heads],
            k=qk @ unit.k[self.kv_heads],
            v=vo @ unit.v[self.kv_heads],
            o=vo_of_heads @ unit.o[self.heads],
            q_bias=_rotated_bias(qk_of_heads, unit.q_bias, self.heads),
            k_bias=_rotated_bias(qk, unit.k_bias, self.kv_heads),
            v_bias=_rotated_bias(vo, unit.v_bias, self.kv_heads),
            q_norm=None if unit.q_norm is None else unit.q_norm[self.heads],
            k_norm=None if unit.k_norm is None else unit.k_norm[self.kv_heads],
            sinks=None if unit.sinks is None else unit.sinks[self.heads],
        )


@dataclass(frozen=True, slots=True)
class NeuronOrder:
    """An order of the neurons, and by what up is multiplied and down divided (in the new order)."""

    order: Int[Tensor, " d_mlp"]
    """The neuron that comes to each place."""
    scales: Float[Tensor, " d_mlp"]

    def __call__(self, unit: Mlp) -> Mlp:
        """Rows of gate, up and down are permuted; the bias of up is scaled with it."""
        order, scales = self.order, self.scales[:, None]
        return Mlp(
            up=scales * unit.up[order],
            down=unit.down[order] / scales,
            gate=None if unit.gate is None else unit.gate[order],
            up_bias=None if unit.up_bias is None else self.scales * unit.up_bias[order],
            gate_bias=None if unit.gate_bias is None else unit.gate_bias[order],
        )


@dataclass(frozen=True, slots=True)
class NeuronRotation:
    """A dense rotation of the neurons. Not a symmetry: for comparison only."""

    rotation: Float[Tensor, "d_mlp d_mlp"]

    def __call__(self, unit: Mlp) -> Mlp:
        rotation = self.rotation
        return Mlp(
            up=rotation @ unit.up,
            down=rotation @ unit.down,
            gate=None if unit.gate is None else rotation @ unit.gate,
            up_bias=None if unit.up_bias is None else rotation @ unit.up_bias,
            gate_bias=None if unit.gate_bias is None else rotation @ unit.gate_bias,
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """Leaves a unit as it is, bit for bit."""

    def __call__(self, unit: Unit) -> Unit:
        return unit


Gauge = AttentionGauge | NeuronOrder | NeuronRotation | Identity


def _rotated_bias(
    rotation: Float[Tensor, "n d d"], bias: Float[Tensor, "n d"] | None, order: Int[Tensor, " n"]
) -> Float[Tensor, "n d"] | None:
    return None if bias is None else (rotation @ bias[order][..., None])[..., 0]


def _present(**tensors: Tensor | None) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _inverse_norm(weight: Tensor) -> float:
    norm = float(weight.norm())
    return 1 / norm if norm else 0.0
