"""Activations by name, as a mapping; of some sequences, on some device."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.errors import StreamError
from sharebasis.residual.anatomy import Anatomy
from sharebasis.residual.capture import Captured
from sharebasis.residual.names import Name, act_name
from sharebasis.residual.norm import Norm, head_results
from sharebasis.residual.slices import Slice, cut, index_of

Cache = TypeVar("Cache", bound="Activations")
Default = TypeVar("Default")


class Activations:
    """What a pass has kept, by TransformerLens's names; see `ActivationCache`."""

    def __init__(self, anatomy: Anatomy, captured: Captured, has_batch_dim: bool = True) -> None:
        self.anatomy = anatomy
        self.cache_dict: Mapping[str, Tensor] = captured.tensors
        """By whole name."""
        self.norms: Mapping[str, Norm] = captured.norms
        self.has_batch_dim = has_batch_dim
        self._captured = captured

    # As a mapping

    def __getitem__(self, name: Name) -> Tensor:
        key = self._key(name)
        if key in self.cache_dict:
            return self.cache_dict[key]
        layer = re.match(r"blocks\.(\d+)\.", key)
        if layer and key.endswith("attn.hook_result"):
            return self._heads(int(layer[1])).movedim(0, -2)
        if layer and re.search(r"hook_[qkv]_input$", key):
            stream = self["resid_pre", int(layer[1])].unsqueeze(-2)
            views = self.anatomy.layers[int(layer[1])]
            n_heads = len(views.W_Q if "q_input" in key else views.W_K)
            return stream.expand(*stream.shape[:-2], n_heads, -1)
        raise StreamError(
            f"{key} is not in this cache: it was not asked for, or this model "
            f"({self.anatomy.model.config.model_type}) has nothing that could be called so. "
            f"There are: {', '.join(sorted({re.sub(r'[0-9]+', '*', k, count=1) for k in self}))}."
        )

    def get(self, name: Name, default: Default = None) -> Tensor | Default:  # type: ignore[assignment]
        """What is there or can be computed; else the default."""
        try:
            return self[name]
        except StreamError:
            return default

    def __contains__(self, name: Name) -> bool:
        return self._key(name) in self.cache_dict

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def keys(self) -> KeysView[str]:
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        return self.cache_dict.items()

    def __repr__(self) -> str:
        return f"{type(self).__name__} with keys {list(self.cache_dict)}"

    @property
    def has_embed(self) -> bool:
        return "hook_embed" in self.cache_dict

    @property
    def has_pos_embed(self) -> bool:
        return "hook_pos_embed" in self.cache_dict

    @property
    def n_layers(self) -> int:
        return len(self.anatomy.layers)

    def _key(self, name: Name) -> str:
        if isinstance(name, str):
            return act_name(name)
        activation, layer, *rest = (*name, None) if len(name) == 1 else name
        if isinstance(layer, int) and layer < 0:
            layer += self.n_layers
        return act_name(activation, layer, *rest)

    # Fewer sequences, another device

    def to(self: Cache, device: torch.device | str) -> Cache:
        """Move the activations to a device, in place."""
        return self._change(lambda x: x.to(device))

    def remove_batch_dim(self: Cache) -> Cache:
        """Drop the first dimension, in place.

        Raises:
            StreamError: there is more than one sequence.
        """
        if not self.has_batch_dim:
            return self
        if wrong := next((len(x) for x in self.cache_dict.values() if len(x) != 1), None):
            raise StreamError(f"The cache holds {wrong} sequences; slice one out first.")
        self.has_batch_dim = False
        return self._change(lambda x: x[0])

    def apply_slice_to_batch_dim(self: Cache, batch_slice: Slice) -> Cache:
        """A cache of some of the sequences; an int drops the dimension, too.

        Args:
            batch_slice: as of `slices.Slice`.
        """
        if not self.has_batch_dim:
            raise StreamError("The cache has no batch dimension.")
        tensors = {key: cut(x, batch_slice, 0) for key, x in self.cache_dict.items()}
        keeps_dim = not isinstance(index_of(batch_slice), int)
        return type(self)(self.anatomy, replace(self._captured, tensors=tensors), keeps_dim)

    def _change(self: Cache, change: Callable[[Tensor], Tensor]) -> Cache:
        self.cache_dict = {key: change(x) for key, x in self.cache_dict.items()}
        return self

    # Pieces

    def _layer(self, layer: int | None) -> int:
        if layer is None or layer == -1:
            return self.n_layers
        if not 0 <= layer <= self.n_layers:
            raise StreamError(f"There is no layer {layer}: there are {self.n_layers}.")
        return layer

    def _positions(self, x: Tensor, pos_slice: Slice) -> Tensor:
        """The positions of a tensor (..., pos, d)."""
        return x if pos_slice is None else cut(x, pos_slice, -2)

    def _heads(self, layer: int) -> Float[Tensor, "n_heads *batch d_model"]:
        z = self["z", layer]
        w_o = self.anatomy.layers[layer].W_O.detach().to(z.device)
        return head_results(z, w_o, self.cache_dict.get(f"blocks.{layer}.hook_attn_factor"))

    def _scale(self, place: str, pos_slice: Slice) -> Float[Tensor, "*batch 1"]:
        """By what a norm divided, at some positions."""
        return self._positions(self[f"{place}.hook_scale"], pos_slice)
