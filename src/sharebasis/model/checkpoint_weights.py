"""A checkpoint by the names that the model itself uses, one tensor at a time.

A checkpoint may lack the base model's prefix, call things by older names, or keep apart what
the model keeps in one tensor. transformers knows how to convert it; this asks it to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sharebasis.errors import WeightsError
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.rows import Rows
from sharebasis.model import experts
from sharebasis.model.experts import Slice
from sharebasis.model.hub import empty_model, first_line, load_config, repeated


@dataclass(slots=True)
class Conversion:
    """Tensors of a checkpoint that become one or more of the model."""

    target: str
    """The (first) tensor of the model."""
    converter: WeightConverter
    sources: dict[str, list[str]]
    """Pattern of the converter -> tensors of the checkpoint, in order."""

    def is_of_experts(self, n: int) -> bool:
        """Whether every source is one tensor for each of `n` experts."""
        return n > 1 and all(len(names) == n for names in self.sources.values())

    def only(self, expert: int) -> Conversion:
        """The same of one expert, which makes a stack of one."""
        sources = {pattern: [names[expert]] for pattern, names in self.sources.items()}
        return Conversion(self.target, self.converter, sources)


class DenseWeights:
    """artifacts/weights, or any checkpoint, as an unstacked model's tensors (`experts`)."""

    def __init__(self, directory: Path) -> None:
        """Args:
        directory: in hub format.

        Raises:
            SourceError, WeightsError: it is not.
        """
        self._reader = TensorReader.of_checkpoint(directory)
        self._model = empty_model(load_config(directory))
        state = self._model.state_dict()
        self._direct, conversions = _assign(self._model, self._reader.files, state)
        self._conversions = {
            name: conversion for conversion in conversions for name in self._targets(conversion)
        }
        self._slices = experts.slices(self._model)
        stacks = {place.stack for place in self._slices.values()}
        tied = repeated(self._model)
        held = self._direct.keys() | self._conversions.keys()
        self.names = (
            *(
                name
                for name in state
                if name in held and name not in stacks and tied.get(name) not in held
            ),
            *(name for name, place in self._slices.items() if place.stack in held),
        )
        """Every tensor that the checkpoint holds; of tied ones the first."""
        self._converted: dict[str, Tensor] = {}

    @property
    def config(self) -> PretrainedConfig:
        """Of HF."""
        return self._model.config

    def read(self, name: str, rows: Rows | None = None, transposed: bool = False) -> Tensor:
        """Read a tensor, or some rows of it.

        Args:
            name: as the unstacked model calls it.
            rows: of the (d_out, d_in) weight; None reads all.
            transposed: whether the model keeps the weight as (d_in, d_out) (Conv1D); what
                is returned is (d_out, d_in).

        Raises:
            WeightsError: the checkpoint does not hold it, or a file is damaged.
        """
        if rows is not None and rows.runs == 1 and name in self._direct:
            window = slice(rows.start, rows.stop)
            if transposed:
                return self._reader.read(self._direct[name], columns=window).T
            return self._reader.read(self._direct[name], window)
        tensor = self._slice(self._slices[name]) if name in self._slices else self._whole(name)
        tensor = tensor.T if transposed else tensor
        return tensor if rows is None else rows.take(tensor)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter of the model."""
        return {name: tuple(x.shape) for name, x in self._model.named_parameters()}

    def module(self, name: str) -> nn.Module:
        """Of the model, without memory."""
        return self._model.get_submodule(name)

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored; of what transformers makes of several, that of the first."""
        stack = self._slices[name].stack if name in self._slices else name
        key = self._direct.get(stack)
        if key is None:
            key = next(iter(self._conversions[stack].sources.values()))[0]
        return self._reader.read(key, slice(0, 1)).dtype

    def stream(self, without: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor but some, one at a time."""
        for name in self.names:
            if name not in without:
                yield name, self.read(name)

    def _slice(self, place: Slice) -> Tensor:
        """The tensor of one expert; of a stack that the checkpoint keeps apart, it alone."""
        if place.stack in self._direct:
            only = slice(place.expert, place.expert + 1)
            stack = self._reader.read(self._direct[place.stack], only)
            return replace(place, expert=0).of(stack)
        conversion = self._conversions.get(place.stack)
        n_experts = len(self._model.get_parameter(place.stack))
        if conversion and conversion.is_of_experts(n_experts):
            stack = self._convert(conversion.only(place.expert))[place.stack]
            return replace(place, expert=0).of(stack)
        return place.of(self._whole(place.stack))

    def _whole(self, name: str) -> Tensor:
        if name in self._direct:
            return self._reader.read(self._direct[name])
        if name not in self._conversions:
            raise WeightsError(f"{self._reader.directory} holds no tensor for {name}.")
        if name not in self._converted:  # the last one: a stack is asked for expert by expert
            tensors = self._convert(self._conversions[name])
            shape = self._model.state_dict()[name].shape
            if tensors[name].shape != shape:  # experts are missing, and the others moved up
                raise WeightsError(
                    f"{self._reader.directory} gives {name} the shape {list(tensors[name].shape)}, "
                    f"but the model has {list(shape)}; it lacks some tensors of it."
                )
            self._converted = tensors
        return self._converted[name]

    def _targets(self, conversion: Conversion) -> Iterable[str]:
        """What a conversion makes; where that is more than one tensor, by trying its shapes."""
        if len(conversion.converter.target_patterns) == 1:
            return [conversion.target]
        return self._convert(
            conversion, lambda name: torch.empty(self._reader.shape(name), device="meta")
        )

    def _convert(
        self, conversion: Conversion, read: Callable[[str], Tensor] | None = None
    ) -> dict[str, Tensor]:
        converter, read = copy.deepcopy(conversion.converter), read or self._reader.read
        for pattern, names in conversion.sources.items():
            for name in names:
                tensor: Any = read(name)  # annotated as a Future, but may be there already
                converter.add_tensor(conversion.target, name, pattern, tensor)
        try:
            tensors = converter.convert(conversion.target, self._model, self._model.config)
            return {name: _only(tensor) for name, tensor in tensors.items()}
        except Exception as error:  # of transformers, of any kind
            raise WeightsError(
                f"{self._reader.directory}: transformers cannot make {conversion.target} of "
                f"{', '.join(conversion.sources)}: {first_line(error)}"
            ) from error


def _only(tensors: Tensor | list[Tensor]) -> Tensor:
    """transformers' converters give a tensor or a list of one."""
    return tensors[0] if isinstance(tensors, list) else tensors


def _assign(
    model: PreTrainedModel, keys: Iterable[str], state: dict[str, Tensor]
) -> tuple[dict[str, str], Iterable[Conversion]]:
    """For every tensor of the model: the one of the checkpoint, or what it is made of."""
    conversions = get_model_conversion_mapping(model)
    renamings = [x for x in conversions if isinstance(x, WeightRenaming)]
    converters = [x for x in conversions if isinstance(x, WeightConverter)]
    of_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    prefix = model.base_model_prefix
    direct: dict[str, str] = {}
    converted: dict[str, Conversion] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and pattern is None:
            target, _ = rename_source_key(key, [], [], prefix, state)
        if target not in state:
            continue
        if pattern is None:
            direct[target] = key
        else:
            converted.setdefault(target, Conversion(target, of_pattern[pattern], {}))
            converted[target].sources.setdefault(pattern, []).append(key)
    return direct, converted.values()
