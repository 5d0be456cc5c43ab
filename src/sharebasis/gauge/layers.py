"""The weights of a layer, out of a checkpoint or a model and back into it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharebasis.architecture.fused import Projection, projections_in
from sharebasis.architecture.sublayers import Classification, Sublayer
from sharebasis.gauge.freedom import freedom_of
from sharebasis.gauge.tensors import ModelTensors, Tensors
from sharebasis.gauge.units import Attention, Freedom, Layer, Mlp, Unit
from sharebasis.linalg.value_gauge import ValueOutput

_QKVO = ("q", "k", "v", "o")
_MLP = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight of a layer lies: in some rows of a sublayer."""

    sublayer: Sublayer
    projection: Projection
    bias_of_rows: bool
    """Whether the bias goes with these rows; that of a write belongs to the stream."""

    @property
    def part(self) -> str:
        """The name of the part that it is, if the sublayer is cut into what it is fused of."""
        return self.sublayer.part_name(self.projection.label)

    def weight(self, tensors: Tensors) -> Tensor:
        return _wide(tensors.read(f"{self._owner}.weight", self.projection.rows, self._transposed))

    def bias(self, tensors: Tensors) -> Tensor | None:
        if not (self.sublayer.bias and self.bias_of_rows):
            return None
        return _wide(self.projection.rows.take(tensors.read(f"{self._owner}.bias")))

    def write(self, tensors: ModelTensors, weight: Tensor, bias: Tensor | None) -> None:
        tensors.write(f"{self._owner}.weight", weight, self.projection.rows, self._transposed)
        if bias is not None:
            tensors.write(f"{self._owner}.bias", bias, self.projection.rows)

    @property
    def _owner(self) -> str:
        return self.sublayer.tied_to or self.sublayer.name

    @property
    def _transposed(self) -> bool:
        return self.sublayer.type == "Conv1D"


class Layers:
    """A model's layers, each read when it is asked for."""

    def __init__(self, tensors: Tensors, classification: Classification, config: Any) -> None:
        """Args:
        tensors: of a checkpoint or a model.
        classification: its sublayers; the selected ones are looked at.
        config: of HF.
        """
        self._tensors, self._classification, self._config = tensors, classification, config
        self._places: dict[int, list[Place]] = {}
        for sublayer in classification.selected:
            for projection in projections_in(classification, sublayer):
                reads = projection.family not in ("o", "down")
                place = Place(sublayer, projection, reads)
                self._places.setdefault(sublayer.layer, []).append(place)
        self._others = self._tensors_beside_the_sublayers()

    @property
    def numbers(self) -> Sequence[int]:
        """Of the layers that have a selected sublayer, in order."""
        return sorted(self._places)

    def freedom(self, layer: int) -> Freedom:
        """Which gauge elements are exact in a layer."""
        others = self._others.get(layer, {})
        return freedom_of(self._config, self._classification.dims, layer, others)

    @property
    def value_outputs(self) -> Sequence[ValueOutput]:
        """Of the layers where any invertible matrix may come between values and outputs."""
        value_outputs = []
        for layer in self.numbers:
            grouped, _ = _units(self._places[layer], self._classification)
            if "attention" in grouped and self.freedom(layer).value_output == "all":
                v, o = (grouped["attention"][family] for family in "vo")
                value_outputs.append(ValueOutput(v.part, o.part, v.projection.n_heads))
        return value_outputs

    def read(self, layer: int) -> Layer:
        """The weights of a layer, in float32 at least.

        Raises:
            WeightsError: a tensor is missing or damaged.
        """
        units: dict[str, Unit] = {}
        rest: dict[str, list[Tensor]] = {}
        grouped, alone = _units(self._places[layer], self._classification)
        extras = self._extras(layer, grouped)
        for name, places in grouped.items():
            if name == "attention":
                units[name] = self._attention(places, extras)
            else:
                units[name] = self._mlp(places)
        for place in alone:
            rest.setdefault(_family(place), []).append(place.weight(self._tensors))
        for tail, name in self._others.get(layer, {}).items():
            if tail.endswith(".weight") and name not in extras.values():
                tensor = _wide(self._tensors.read(name))
                if tensor.ndim == 1:
                    rest.setdefault(_norm_name(tail), []).append(tensor)
        return Layer(units, {name: tuple(weights) for name, weights in rest.items()})

    def write(self, model: nn.Module, number: int, layer: Layer) -> None:
        """Put the units of a layer into a model in memory.

        Args:
            model: dense, of these layers; changed in place.
            number: of the layer.
            layer: as `read` gives it, or a gauge element applied to that.
        """
        tensors = ModelTensors(model)
        grouped, _ = _units(self._places[number], self._classification)
        for name, places in grouped.items():
            unit = layer.units[name]
            for family, place in places.items():
                weight = unit.families[family].flatten(0, -2)
                bias = getattr(unit, f"{family}_bias", None)
                place.write(
                    tensors,
                    weight if place.bias_of_rows else weight.T,
                    None if bias is None else bias.flatten(),
                )
        for field, name in self._extras(number, grouped).items():
            tensors.write(name, getattr(layer.units["attention"], field).flatten())

    def _attention(self, places: Mapping[str, Place], extras: Mapping[str, str]) -> Attention:
        q, k, v, o = (places[name] for name in _QKVO)
        heads, kv_heads = q.projection.n_heads, k.projection.n_heads
        vectors = {field: _wide(self._tensors.read(name)) for field, name in extras.items()}
        return Attention(
            q=q.weight(self._tensors).unflatten(0, (heads, -1)),
            k=k.weight(self._tensors).unflatten(0, (kv_heads, -1)),
            v=v.weight(self._tensors).unflatten(0, (kv_heads, -1)),
            o=o.weight(self._tensors).T.unflatten(0, (heads, -1)),
            q_bias=_by_head(q.bias(self._tensors), heads),
            k_bias=_by_head(k.bias(self._tensors), kv_heads),
            v_bias=_by_head(v.bias(self._tensors), kv_heads),
            q_norm=_by_head(vectors.get("q_norm"), heads),
            k_norm=_by_head(vectors.get("k_norm"), kv_heads),
            sinks=vectors.get("sinks"),
        )

    def _mlp(self, places: Mapping[str, Place]) -> Mlp:
        return Mlp(
            up=places["up"].weight(self._tensors),
            down=places["down"].weight(self._tensors).T,
            gate=places["gate"].weight(self._tensors) if "gate" in places else None,
            up_bias=places["up"].bias(self._tensors),
            gate_bias=places["gate"].bias(self._tensors) if "gate" in places else None,
        )

    def _tensors_beside_the_sublayers(self) -> Mapping[int, Mapping[str, str]]:
        """Layer -> tail of the name, from where the block's ends -> whole name."""
        linear = {sublayer.name for sublayer in self._classification.sublayers}
        block = re.compile(self._classification.architecture.block_pattern)
        others: dict[int, dict[str, str]] = {}
        for name in self._tensors.names:
            place = block.search(name)
            if place and name.rpartition(".")[0] not in linear:
                tail = name[place.end(1) + 1 :]
                others.setdefault(int(place[1]), {})[tail] = name
        return others

    def _extras(self, layer: int, grouped: Mapping[str, Mapping[str, Place]]) -> Mapping[str, str]:
        """Field of `Attention` -> name of the tensor that follows the order of heads."""
        places, extras = grouped.get("attention", {}), {}
        for tail, name in self._others.get(layer, {}).items() if places else ():
            last = tail.removesuffix(".weight").rpartition(".")[2]
            if last == "sinks":
                extras[last] = name
            if last in ("q_norm", "k_norm") and tail.endswith(".weight"):
                projection = places[last[0]].projection
                if projection.n_heads > 1 and self._tensors.read(name).shape == (
                    len(projection.rows),
                ):
                    extras[last] = name
        return extras


def _units(
    places: Iterable[Place], classification: Classification
) -> tuple[Mapping[str, Mapping[str, Place]], Sequence[Place]]:
    """Unit -> family -> place, and the places of no unit."""
    attention: dict[str, list[Place]] = {}
    mlps: dict[str, dict[str, list[Place]]] = {}
    alone: list[Place] = []
    for place in places:
        family, sublayer = place.projection.family, place.sublayer
        if family in _MLP:
            mlps.setdefault(_mlp_name(sublayer), {}).setdefault(family, []).append(place)
        elif family in _QKVO and sublayer.expert is None:
            attention.setdefault(family, []).append(place)
        else:
            alone.append(place)
    grouped = {}
    for name, unit in {"attention": attention, **mlps}.items():
        is_unit = _is_attention if name == "attention" else _is_mlp
        if is_unit(unit, classification):
            grouped[name] = {family: of_family[0] for family, of_family in unit.items()}
        else:
            alone += [place for of_family in unit.values() for place in of_family]
    return grouped, alone


def _is_attention(places: Mapping[str, Sequence[Place]], classification: Classification) -> bool:
    """Whether these are one q, k, v and o that heads can be cut from."""
    if set(places) != set(_QKVO) or any(len(x) != 1 for x in places.values()):
        return False
    q, k, v, o = (places[name][0] for name in _QKVO)
    heads, kv_heads = q.projection.n_heads, k.projection.n_heads
    d_model = classification.dims.d_model
    return (
        heads > 0
        and 0 < kv_heads == v.projection.n_heads
        and heads % kv_heads == 0
        and len(q.projection.rows) % heads == 0
        and len(q.projection.rows) * kv_heads == len(k.projection.rows) * heads
        and len(v.projection.rows) % kv_heads == 0
        and o.sublayer.shape == (d_model, len(v.projection.rows) // kv_heads * heads)
        and all(x.sublayer.shape[1] == d_model for x in (q, k, v))
    )


def _is_mlp(places: Mapping[str, Sequence[Place]], classification: Classification) -> bool:
    """Whether these are one up, one down and at most one gate of the same neurons."""
    if any(len(x) != 1 for x in places.values()) or not {"up", "down"} <= places.keys():
        return False
    d_model, d_mlp = classification.dims.d_model, len(places["up"][0].projection.rows)
    reads = [of_family[0] for name, of_family in places.items() if name != "down"]
    return places["down"][0].sublayer.shape == (d_model, d_mlp) and all(
        len(x.projection.rows) == d_mlp and x.sublayer.shape[1] == d_model for x in reads
    )


def _mlp_name(sublayer: Sublayer) -> str:
    if sublayer.expert is not None:
        return f"expert {sublayer.expert}"
    return sublayer.slot.rpartition(".")[0] or "mlp"


def _family(place: Place) -> str:
    family = place.projection.family
    known = family not in ("fused", "other")
    return family if known else place.sublayer.slot.rpartition("*.")[2]


def _norm_name(tail: str) -> str:
    """`self_attn.q_norm.weight` -> `q_norm`."""
    return next(x for x in reversed(tail.split(".")[:-1]) if not x.isdigit())


def _by_head(tensor: Tensor | None, n_heads: int) -> Tensor | None:
    return None if tensor is None else tensor.unflatten(0, (n_heads, -1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
