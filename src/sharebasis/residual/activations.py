"""Activations by name, as a mapping; of some sequences, on some device."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.errors import StreamError
from sharebasis.residual.anatomy import Anatomy
from sharebasis.residual.capture import Captured
from sharebasis.residual.names import Name, act_name
from sharebasis.residual.norm import Norm, head_results

Own = TypeVar("Own", bound="Activations")


class Activations:
    """What a pass has kept, by TransformerLens's names; see `ActivationCache`."""

    def __init__(self, anatomy: Anatomy, captured: Captured, has_batch_dim: bool = True) -> None:
        self._anatomy, self._captured = anatomy, captured
        self.tensors: Mapping[str, Tensor] = captured.tensors
        self.norms: Mapping[str, Norm] = captured.norms
        self.has_batch_dim = has_batch_dim

    # As a mapping

    def __getitem__(self, name: Name) -> Tensor:
        key = self._key(name)
        if key in self.tensors:
            return self.tensors[key]
        layer = re.match(r"blocks\.(\d+)\.", key)
        if layer and key.endswith("attn.hook_result"):
            return self._heads(int(layer[1])).movedim(0, -2)
        if layer and re.search(r"hook_[qkv]_input$", key):
            stream = self["resid_pre", int(layer[1])].unsqueeze(-2)
            views = self._anatomy.layers[int(layer[1])]
            n_heads = len(views.W_Q if "q_input" in key else views.W_K)
            return stream.expand(*stream.shape[:-2], n_heads, -1)
        raise StreamError(
            f"{key} is not in this cache: it was not asked for, or this model "
            f"({self._anatomy.model.config.model_type}) has nothing that could be called so. "
            f"There are: {', '.join(sorted({re.sub(r'[0-9]+', '*', k, count=1) for k in self}))}."
        )

    def __contains__(self, name: Name) -> bool:
        return self._key(name) in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def keys(self) -> KeysView[str]:
        return self.tensors.keys()

    def items(self) -> ItemsView[str, Tensor]:
        return self.tensors.items()

    def _key(self, name: Name) -> str:
        if isinstance(name, str):
            return act_name(name)
        layer = name[1]
        if layer is not None and layer < 0:
            layer += self.n_layers
        return act_name(name[0], layer, *name[2:])

    @property
    def n_layers(self) -> int:
        return len(self._anatomy.layers)

    # Fewer sequences, another device

    def to(self: Own, device: torch.device | str) -> Own:
        """The same on another device."""
        return self._changed(lambda x: x.to(device))

    def remove_batch_dim(self: Own) -> Own:
        """Without its first dimension.

        Raises:
            StreamError: there is more than one sequence.
        """
        if not self.has_batch_dim:
            return self
        if wrong := next((x.shape[0] for x in self.tensors.values() if x.shape[0] != 1), None):
            raise StreamError(f"The cache holds {wrong} sequences; slice one out first.")
        return self._changed(lambda x: x[0], has_batch_dim=False)

    def apply_slice_to_batch_dim(self: Own, which: int | slice | Sequence[int]) -> Own:
        """Some of the sequences; an int drops the dimension, too."""
        if not self.has_batch_dim:
            raise StreamError("The cache has no batch dimension.")
        return self._changed(lambda x: x[which], has_batch_dim=not isinstance(which, int))

    def _changed(
        self: Own, change: Callable[[Tensor], Tensor], has_batch_dim: bool | None = None
    ) -> Own:
        tensors = {key: change(x) for key, x in self.tensors.items()}
        kept = self.has_batch_dim if has_batch_dim is None else has_batch_dim
        return type(self)(self._anatomy, replace(self._captured, tensors=tensors), kept)

    # Pieces

    def _layer(self, layer: int | None) -> int:
        if layer is None or layer == -1:
            return self.n_layers
        if not 0 <= layer <= self.n_layers:
            raise StreamError(f"There is no layer {layer}: there are {self.n_layers}.")
        return layer

    def _positions(self, x: Tensor, pos_slice: Any) -> Tensor:
        """The positions of a tensor (..., pos, d)."""
        if pos_slice is None:
            return x
        return x[..., pos_slice, :] if x.ndim > 1 else x

    def _heads(self, layer: int) -> Float[Tensor, "n_heads *batch d_model"]:
        z = self["z", layer]
        w_o = self._anatomy.layers[layer].W_O.detach().to(z.device)
        return head_results(z, w_o, self.tensors.get(f"blocks.{layer}.hook_attn_factor"))
