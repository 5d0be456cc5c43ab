"""From the stream towards the logits: what components are behind a norm, and for a token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sharebasis.errors import StreamError
from sharebasis.residual.activations import Activations
from sharebasis.residual.capture import FINAL


class Readout(Activations):
    """Activations whose stream can be read as a norm and the unembedding read it."""

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *batch d_model"]:
        """What components of a layer's input are behind the norm that reads it.

        Centred if it is a LayerNorm, divided by the scale that the whole stream had, times the
        norm's weight (TransformerLens, which folds the weight into the next matrix, leaves it
        out). The norm's bias is no component's.

        Args: as of `accumulated_resid`, and
            residual_stack: components; `pos_slice` was applied to them already.
            recompute_ln: instead take every element of the stack as a stream of its own, with a
                scale of its own and the bias: the logit lens. For the last norm only.
        """
        place = self._norm_place(layer, mlp_input)
        norm = self.norms[place].to(residual_stack.device)
        if recompute_ln:
            if place != FINAL:
                raise StreamError("recompute_ln is for the last norm: layer=None.")
            return self.final_module()(residual_stack)
        scale = self._positions(self[f"{place}.hook_scale"], pos_slice)
        return norm.linear(residual_stack, scale)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch d_model"],
        tokens: int | Int[Tensor, "*batch"],
        incorrect_tokens: int | Int[Tensor, "*batch"] | None = None,
        pos_slice: Any = None,
    ) -> Float[Tensor, "component ..."]:
        """What every component adds to the logit of a token, or to a difference of two.

        Over components that sum to the stream, and with `logit_bias`, it sums to the logit; where
        a family caps its logits (Gemma 2), to the logit before the cap.

        Args:
            residual_stack: components of the input of the unembedding, norm not applied.
            tokens: the right ones: one, one for each position, or one for each sequence and
                position.
            incorrect_tokens: the wrong ones, of the same shape.
            pos_slice: that was applied to the stack.
        """
        directions = self._token_directions(tokens, residual_stack.device)
        if incorrect_tokens is not None:
            directions = directions - self._token_directions(
                incorrect_tokens, residual_stack.device
            )
        return (self.apply_ln_to_stack(residual_stack, None, False, pos_slice) * directions).sum(-1)

    def logit_bias(
        self, tokens: int | Int[Tensor, "*batch"], incorrect_tokens: Any = None
    ) -> Float[Tensor, "*batch"]:
        """What the logit of a token has of no component: of the last norm's bias and of b_U."""
        norm = self.norms[FINAL]
        ids = torch.as_tensor(tokens, device=norm.bias.device)
        own = self._token_directions(ids, norm.bias.device) @ norm.bias
        own = own + self._anatomy.unembedding.bias(ids)
        return own if incorrect_tokens is None else own - self.logit_bias(incorrect_tokens)

    def _token_directions(self, tokens: Any, device: torch.device) -> Tensor:
        unembedding = self._anatomy.unembedding
        ids = torch.as_tensor(tokens, device=unembedding.w_u.device)
        return unembedding.directions(ids).to(device)

    def _norm_place(self, layer: int | None, mlp_input: bool) -> str:
        end = self._layer(layer)
        place = FINAL if end == self.n_layers else f"blocks.{end}.{'ln2' if mlp_input else 'ln1'}"
        if place not in self.norms:
            raise StreamError(
                f"Nothing norms what the {'MLP' if mlp_input else 'attention'} of layer {end} "
                "reads (some families norm what is written), so that apply_ln has no meaning."
            )
        return place

    def final_module(self) -> nn.Module:
        """The norm before the unembedding, as the model has it."""
        return self._anatomy.model.get_submodule(self._captured.final_norm)

    def _onto(
        self, project: Tensor | None, layer: int | None, mlp_input: bool, ln: bool, pos_slice: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Directions in the stream, and what to divide by, so that no component is normed."""
        if project is None:
            return None, None
        onto = project[:, None] if project.ndim == 1 else project
        if not ln:
            return onto, None
        place = self._norm_place(layer, mlp_input)
        scale = self._positions(self[f"{place}.hook_scale"], pos_slice)
        return self.norms[place].to(onto.device).pull_back(onto.T).T, scale
