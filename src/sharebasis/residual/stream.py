"""The residual stream as it grows, and what every attention and MLP adds to it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.errors import StreamError
from sharebasis.residual.readout import Readout
from sharebasis.residual.slices import Slice

Mode = Literal["all", "attn", "mlp"]


class StreamStacks(Readout):
    """Stacks of the stream at every depth, and of what sublayers add to it."""

    # The stream as it grows

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The stream at every depth up to the input of a layer, for the logit lens.

        Args:
            layer: up to here.
            incl_mid: with the stream between attention and MLP of every layer.
            apply_ln: put through the norm that reads there: at the end, the last norm with a
                scale of each depth's own; elsewhere with the layer's scale.
            pos_slice: of the positions.
            mlp_input: with the stream between attention and MLP of `layer`.
            return_labels: `0_pre`, `0_mid`, ..., `final_post`, too.

        Returns:
            (depth, *batch, pos, d_model)
        """
        end = self._layer(layer)
        stack, labels = [], []
        for i in range(end + 1):
            if i == self.n_layers:
                stack.append(self["resid_post", i - 1])
                labels.append("final_post")
                continue
            stack.append(self["resid_pre", i])
            labels.append(f"{i}_pre")
            if (incl_mid and i < end) or (mlp_input and i == end):
                stack.append(self["resid_mid", i])
                labels.append(f"{i}_mid")
        stacked = self._positions(torch.stack(stack), pos_slice)
        if apply_ln:
            stacked = self.apply_ln_to_stack(
                stacked, layer, mlp_input, pos_slice, recompute_ln=end == self.n_layers
            )
        return (stacked, labels) if return_labels else stacked

    def stack_activation(
        self, activation_name: str, layer: int | None = None, sublayer_type: str | None = None
    ) -> Float[Tensor, "layers ..."]:
        """One activation of every layer before `layer`."""
        layers = range(self._layer(layer))
        return torch.stack([self[activation_name, i, sublayer_type] for i in layers])

    # What it is a sum of

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Mode = "all",
        apply_ln: bool = False,
        pos_slice: Slice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What attention and MLP of every layer before `layer` added.

        Args: as of `accumulated_resid`, and
            mlp_input: with what attention of `layer` added.
            mode: all, or those of one kind (embeddings come with each).
            incl_embeds: with embeddings and positions.

        Returns:
            (component, *batch, pos, d_model), which sums to the layer's input in mode `all`.
        """
        if mode not in get_args(Mode):
            raise StreamError(f"There is no mode {mode!r}: there are {', '.join(get_args(Mode))}.")
        end = self._layer(layer)
        stack, labels = [], []
        if incl_embeds:
            for label in ("embed", "pos_embed"):
                if label in self:
                    stack.append(self[label])
                    labels.append(label)
        for i in range(end + bool(mlp_input)):
            for kind in ("attn", "mlp"):
                # A block may have no MLP, or no attention: it then adds nothing.
                due = mode in ("all", kind) and (i < end or kind == "attn")
                if due and (f"{kind}_out", i) in self:
                    stack.append(self[f"{kind}_out", i])
                    labels.append(f"{i}_{kind}_out")
        stacked = self._positions(torch.stack(stack), pos_slice)
        if apply_ln:
            stacked = self.apply_ln_to_stack(stacked, layer, mlp_input, pos_slice)
        return (stacked, labels) if return_labels else stacked
