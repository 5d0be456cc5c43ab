"""Tensors of a model by name, from a checkpoint or a module."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from sharebasis.linalg.rows import Rows
from sharebasis.model.experts import slices


@runtime_checkable
class Tensors(Protocol):
    """Tensors by the names of an unstacked model: `DenseWeights`, `ModelTensors`."""

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str, rows: Rows | None = None, transposed: bool = False) -> Tensor:
        """A tensor or some rows of it, (d_out, d_in) whichever way round it is kept."""
        ...


class ModelTensors:
    """The tensors of a dense model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._state = {name: x.detach() for name, x in model.named_parameters()}
        self._slices = slices(model)
        stacks = {place.stack for place in self._slices.values()}
        self.names = (*(name for name in self._state if name not in stacks), *self._slices)

    def read(self, name: str, rows: Rows | None = None, transposed: bool = False) -> Tensor:
        tensor = self._view(name, transposed)
        return (tensor if rows is None else rows.take(tensor)).clone()

    def write(
        self, name: str, value: Tensor, rows: Rows | None = None, transposed: bool = False
    ) -> None:
        """Put a tensor, or some rows of it, into the model."""
        tensor = self._view(name, transposed)
        tensor[slice(None) if rows is None else list(rows)] = value.to(tensor)

    def _view(self, name: str, transposed: bool) -> Tensor:
        if place := self._slices.get(name):
            return place.of(self._state[place.stack])
        return self._state[name].T if transposed else self._state[name]
