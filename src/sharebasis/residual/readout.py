"""From the stream towards the logits: what components are behind a norm, and for a token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sharebasis.errors import StreamError
from sharebasis.residual.activations import Activations
from sharebasis.residual.capture import FINAL
from sharebasis.residual.slices import Slice, cut


class Readout(Activations):
    """Activations whose stream can be read as a norm and the unembedding read it."""

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice = None,
        batch_slice: Slice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component ... d_model"]:
        """What components of a layer's input are behind the norm that reads it.

        Centred if it is a LayerNorm, divided by the scale that the whole stream had, times the
        norm's weight (TransformerLens, which folds the weight into the next matrix, leaves it
        out). The norm's bias is no component's.

        Args: as of `accumulated_resid`, and
            residual_stack: components; `pos_slice` was applied to them already.
            batch_slice: of the sequences of stack and scale.
            has_batch_dim: whether the stack has sequences; without, it stays as it is.
            recompute_ln: instead take every element of the stack as a stream of its own, with a
                scale of its own and the bias: the logit lens. For the last norm only.
        """
        place = self._norm_place(layer, mlp_input)
        norm = self.norms[place].to(residual_stack.device)
        if has_batch_dim and batch_slice is not None:
            residual_stack = cut(residual_stack, batch_slice, 1)
        if recompute_ln:
            if place != FINAL:
                raise StreamError("recompute_ln is for the last norm: layer=None.")
            return self.final_module()(residual_stack)
        scale = self._scale(place, pos_slice)
        if batch_slice is not None and self.has_batch_dim:
            scale = cut(scale, batch_slice, 0)
        return norm.linear(residual_stack, scale)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch d_model"],
        tokens: int | Int[Tensor, ...],
        incorrect_tokens: int | Int[Tensor, ...] | None = None,
        pos_slice: Slice = None,
        batch_slice: Slice = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component ..."]:
        """What every component adds to the logit of a token, or to a difference of two.

        Over components that sum to the stream, and with `logit_bias`, it sums to the logit; where
        a family caps its logits (Gemma 2), to the logit before the cap.

        Args:
            residual_stack: components of the input of the unembedding, norm not applied.
            tokens: the right ones: one; one for each sequence and position; one for each
                sequence; or, if there are not as many as sequences, one for each position.
            incorrect_tokens: the wrong ones, of the same shape.
            pos_slice: that was applied to the stack.
            batch_slice: that is to be applied to the stack.
            has_batch_dim: whether the stack has sequences.

        Raises:
            StreamError: the tokens do not fit the stack, or each other.
        """
        device = residual_stack.device
        directions = self._token_directions(tokens, device)
        if incorrect_tokens is not None:
            incorrect = self._token_directions(incorrect_tokens, device)
            if incorrect.shape != directions.shape:
                raise StreamError(
                    f"There are {list(incorrect.shape[:-1])} incorrect tokens beside "
                    f"{list(directions.shape[:-1])} right ones; the shapes have to be the same."
                )
            directions = directions - incorrect
        stack = self.apply_ln_to_stack(
            residual_stack, None, False, pos_slice, batch_slice, has_batch_dim
        )
        if has_batch_dim and stack.ndim == 4 and directions.shape[:-1] == stack.shape[1:2]:
            directions = directions.unsqueeze(-2)  # one for each sequence
        places, shape = stack.shape[1:-1], directions.shape[:-1]
        if len(shape) > len(places) or any(
            n not in (1, m) for n, m in zip(shape[::-1], places[::-1], strict=False)
        ):
            raise StreamError(
                f"Tokens of shape {list(shape)} do not go with a stack whose sequences and "
                f"positions are {list(places)}."
            )
        return (stack * directions).sum(-1)

    def logit_bias(
        self, tokens: int | Int[Tensor, "*batch"], incorrect_tokens: Any = None
    ) -> Float[Tensor, "*batch"]:
        """What the logit of a token has of no component: of the last norm's bias and of b_U."""
        norm = self.norms[FINAL]
        ids = torch.as_tensor(tokens, device=norm.bias.device)
        bias = self._token_directions(ids, norm.bias.device) @ norm.bias
        bias = bias + self.anatomy.unembedding.bias(ids)
        return bias if incorrect_tokens is None else bias - self.logit_bias(incorrect_tokens)

    def _token_directions(self, tokens: Any, device: torch.device) -> Tensor:
        unembedding = self.anatomy.unembedding
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
        return self.anatomy.model.get_submodule(self._captured.final_norm)

    def _onto(
        self, project: Tensor | None, layer: int | None, mlp_input: bool, ln: bool, pos_slice: Slice
    ) -> tuple[Tensor | None, Tensor | None]:
        """Directions in the stream, and what to divide by, so that no component is normed."""
        if project is None:
            return None, None
        onto = project[:, None] if project.ndim == 1 else project
        if not ln:
            return onto, None
        place = self._norm_place(layer, mlp_input)
        scale = self._scale(place, pos_slice)
        return self.norms[place].to(onto.device).pull_back(onto.T).T, scale
