"""The weights that head views are made of, however a model keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture.fused import Projection
from sharebasis.architecture.sublayers import Sublayer
from sharebasis.config.types import Family
from sharebasis.errors import SplitError
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.linalg.rows import Rows
from sharebasis.model.experts import slices
from sharebasis.model.surgery import weight_of


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Rows of a sublayer's weight, which a view is made of."""

    sublayer: Sublayer
    projection: Projection
    tensors: SublayerTensors

    @property
    def family(self) -> Family:
        return self.projection.family

    @property
    def weight(self) -> Float[Tensor, "rows d_in"]:
        return self._take(self.tensors.weight(self.sublayer.name))

    @property
    def bias(self) -> Float[Tensor, " rows"] | None:
        bias = self.tensors.bias(self.sublayer.name)
        return None if bias is None else self._take(bias)

    def _take(self, tensor: Tensor) -> Tensor:
        return self.projection.rows_in(self.sublayer, len(tensor)).take(tensor)

    def weight_by_head(self) -> Float[Tensor, "n_heads d_in d_head"]:
        return self._by_head(self.tensors.weight(self.sublayer.name))

    def bias_by_head(self) -> Float[Tensor, "n_heads d_head"] | None:
        bias = self.tensors.bias(self.sublayer.name)
        return None if bias is None else self._by_head(bias)

    def _by_head(self, tensor: Tensor) -> Tensor:
        rows, n_heads = self.projection.rows, self.projection.n_heads
        require_whole_heads(self.sublayer, "rows", len(rows), n_heads)
        return by_head(tensor, rows, n_heads)


def require_whole_heads(sublayer: Sublayer, side: str, length: int, n_heads: int) -> None:
    """See to it that heads divide the rows or columns of a weight.

    Raises:
        SplitError: they do not.
    """
    if length % n_heads:
        raise SplitError(
            f"{sublayer.name} has {length} {side}, which {n_heads} heads do not divide; set "
            "n_head (or n_kv_head) of its weight type."
        )


def by_head(
    tensor: Float[Tensor, d_out * d_in], rows: Rows, n_heads: int
) -> Float[Tensor, "n_heads *d_in d_head"]:
    """Some rows of a weight or bias, by head; a view if the heads' distances are all the same."""
    if n_heads % rows.runs:
        heads = rows.take(tensor).unflatten(0, (n_heads, -1))
        return heads.movedim(1, -1)
    runs = tensor[rows.start : rows.stop].unfold(0, rows.length, rows.stride or 1)
    return runs.unflatten(-1, (n_heads // rows.runs, -1)).movedim(-2, 1).flatten(0, 1)


class SublayerTensors:
    """Weights and biases by HF name of their sublayers, however a model keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slices = slices(model)

    def weight(self, name: str) -> Float[Tensor, "d_out d_in"]:
        if place := self._slices.get(f"{name}.weight"):
            return place.of(self._model.get_parameter(place.stack))
        return weight_of(self._model.get_submodule(name))

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        if place := self._slices.get(f"{name}.bias"):
            return place.of(self._model.get_parameter(place.stack))
        if f"{name}.weight" in self._slices:
            return None
        module = self._model.get_submodule(name)
        assert isinstance(module, nn.Linear | Conv1D | SplitLinear)
        return module.bias
