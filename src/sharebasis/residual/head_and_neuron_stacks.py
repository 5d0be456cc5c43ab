"""What single heads and neurons add to the residual stream, and all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.residual.norm import neuron_results
from sharebasis.residual.slices import Slice, cut
from sharebasis.residual.stream import StreamStacks


class HeadAndNeuronStacks(StreamStacks):
    """Stacks with a component for every head, and for every neuron."""

    def stack_head_results(
        self,
        layer: int | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice = None,
        apply_ln: bool = False,
    ) -> Any:
        """What every head of the layers before `layer` added; labels `L3H1`.

        Args: as of `decompose_resid`, and
            incl_remainder: with the rest of the layer's input.

        Returns:
            (layers times heads, *batch, pos, d_model)
        """
        end = self._layer(layer)
        labels = [
            f"L{i}H{h}" for i in range(end) for h in range(self.anatomy.sites.layers[i].n_heads)
        ]
        stack = [self._positions(self._heads(i), pos_slice) for i in range(end)]
        return self._finished(
            stack, labels, layer, False, pos_slice, incl_remainder, apply_ln, return_labels
        )

    def stack_neuron_results(
        self,
        layer: int | None = None,
        pos_slice: Slice = None,
        neuron_slice: Slice = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Float[Tensor, "d_model ..."] | None = None,
        mlp_input: bool = False,
    ) -> Any:
        """What every neuron of the layers before `layer` added; labels `L3N14`.

        Args: as of `stack_head_results`, and
            neuron_slice: of the neurons of every layer.
            project_output_onto: one direction or several, which take the place of d_model in
                the result; the tensor of d_mlp times d_model numbers a token is then never made.
            mlp_input: `layer`'s MLP reads the result, not its attention.

        Raises:
            StreamError: a layer has experts, whose neurons are not the same for every token.
        """
        end = self._layer(layer)
        onto, scale = self._onto(project_output_onto, layer, mlp_input, apply_ln, pos_slice)
        stack, labels = [], []
        for i in range(end):
            post = self._positions(self["post", i], pos_slice)
            neurons = cut(torch.arange(post.shape[-1]), neuron_slice, 0).view(-1)
            factor = self.cache_dict.get(f"blocks.{i}.hook_mlp_factor")
            factor = None if factor is None else self._positions(factor, pos_slice)
            w_out = self.anatomy.layers[i].W_out.detach().to(post.device)
            results = neuron_results(post[..., neurons], w_out[neurons], factor, onto)
            stack.append(results if scale is None else results / scale)
            labels += [f"L{i}N{n}" for n in neurons.tolist()]
        stacked = self._finished(
            stack,
            labels,
            layer,
            mlp_input,
            pos_slice,
            incl_remainder,
            apply_ln,
            return_labels,
            None if onto is None else (onto, scale),
        )
        return _squeezed(stacked, project_output_onto)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Slice = None,
        return_labels: bool = False,
        project_output_onto: Float[Tensor, "d_model ..."] | None = None,
    ) -> Any:
        """The whole input of `layer`: heads, neurons (or MLPs), embeddings, positions, biases.

        Args: as of `stack_neuron_results`, and
            expand_neurons: every neuron, or every MLP with its bias.

        Returns:
            (component, *batch, pos, d_model), in this order, which sums to the layer's input.
        """
        end = self._layer(layer)
        onto, scale = self._onto(project_output_onto, layer, mlp_input, apply_ln, pos_slice)

        def seen(stack: Tensor) -> Tensor:
            if onto is not None:
                stack = stack @ onto
                return stack if scale is None else stack / scale
            if apply_ln:
                return self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice)
            return stack

        heads = range(end + bool(mlp_input))
        labels = [f"L{i}H{h}" for i in heads for h in range(self.anatomy.sites.layers[i].n_heads)]
        parts = [seen(self._positions(self._heads(i), pos_slice)) for i in heads]
        if expand_neurons and end:
            stacked, names = self.stack_neuron_results(
                layer,
                pos_slice,
                apply_ln=apply_ln,
                mlp_input=mlp_input,
                project_output_onto=project_output_onto,
                return_labels=True,
            )
            squeezed = project_output_onto is not None and project_output_onto.ndim == 1
            parts.append(stacked.unsqueeze(-1) if squeezed else stacked)
            labels += names
        else:
            for i in range(end):
                if ("mlp_out", i) in self:
                    parts.append(seen(self._positions(self["mlp_out", i], pos_slice)[None]))
                    labels.append(f"{i}_mlp_out")
        for label in ("embed", "pos_embed"):
            if label in self:
                parts.append(seen(self._positions(self[label], pos_slice)[None]))
                labels.append(label)
        biases = self._biases(end, mlp_input, expand_neurons)
        parts.append(seen(self._positions(biases, pos_slice)[None]))
        labels.append("bias")
        stack = _squeezed(torch.cat(parts), project_output_onto)
        return (stack, labels) if return_labels else stack

    # Pieces

    def _biases(self, end: int, mlp_input: bool, with_mlps: bool) -> Float[Tensor, "*b d_model"]:
        """The biases of all that writes, as they reach the stream."""
        total = torch.zeros_like(self["resid_pre", 0])
        for i in range(end + bool(mlp_input)):
            views = self.anatomy.layers[i]
            kinds = ["attn", "mlp"] if with_mlps and i < end else ["attn"]
            for kind in kinds:
                bias = views.b_O if kind == "attn" else views.b_out
                factor = self.cache_dict.get(f"blocks.{i}.hook_{kind}_factor")
                if bias is not None:
                    bias = bias.detach().to(total.device)
                    total = total + (bias if factor is None else bias * factor)
        return total

    def _finished(
        self,
        stack: Sequence[Tensor],
        labels: list[str],
        layer: int | None,
        mlp_input: bool,
        pos_slice: Slice,
        incl_remainder: bool,
        apply_ln: bool,
        return_labels: bool,
        projected: tuple[Tensor, Tensor | None] | None = None,
    ) -> Any:
        """Put a stack together: its remainder, its norm, its labels."""
        end = self._layer(layer)
        stream = self["resid_pre", end] if end < self.n_layers else self["resid_post", -1]
        if mlp_input:
            stream = self["resid_mid", end]
        stream = self._positions(stream, pos_slice)
        if projected is not None:
            onto, scale = projected
            stream = stream @ onto if scale is None else (stream @ onto) / scale
        stacked = torch.cat(list(stack)) if stack else stream.new_zeros(0, *stream.shape)
        if incl_remainder:
            stacked = torch.cat([stacked, (stream - stacked.sum(0))[None]])
            labels = [*labels, "remainder"]
        if apply_ln and projected is None:
            stacked = self.apply_ln_to_stack(stacked, layer, mlp_input, pos_slice)
        return (stacked, labels) if return_labels else stacked


def _squeezed(stacked: Any, project: Tensor | None) -> Any:
    """Without the last dimension if there was one direction only."""
    if project is None or project.ndim > 1:
        return stacked
    if isinstance(stacked, tuple):
        return stacked[0].squeeze(-1), stacked[1]
    return stacked.squeeze(-1)
