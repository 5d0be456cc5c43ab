"""A forward pass over a hub model, kept and taken apart: `run_with_cache`.

Names, shapes and methods are TransformerLens's, so that what is written for its cache reads
on. What differs is said where it does: nothing is folded into anything here, so norms bring
their weights, and what a family multiplies or norms before it adds it is a component as added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.attribution.capture import FINAL, Captured, capture
from sharebasis.attribution.names import Name, Names, act_name, wanted
from sharebasis.attribution.residual import Norm, head_results, neuron_results
from sharebasis.attribution.sites import find_sites
from sharebasis.attribution.unembedding import Unembedding
from sharebasis.errors import StreamError
from sharebasis.head_views import LayerViews, head_views, sublayers_of
from sharebasis.sublayer import Classification


def run_with_cache(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch pos"],
    names: Names = None,
    *,
    device: torch.device | str | None = None,
    **inputs: Any,
) -> tuple[Tensor, ActivationCache]:
    """Run tokens through a model, dense, wrapped or compressed, and keep activations.

    To run a model more than once, make one `Observer` of it and call that.

    Args:
        model: on any device.
        tokens: ids.
        names: what to keep; see `Observer.__call__`.
        device: where what is kept goes; None leaves it on the model's.
        inputs: more arguments of the model, `attention_mask` for one.

    Returns:
        Logits (batch, pos, d_vocab), and the cache.

    Raises:
        StreamError: the residual stream of the model is not a plain sum.
        SelectionError: its sublayers cannot be found.
    """
    return Observer(model)(tokens, names, device=device, **inputs)


class Observer:
    """Finds its way in a model once, and then runs tokens through it as often as is wanted."""

    def __init__(self, model: PreTrainedModel, found: Classification | None = None) -> None:
        """Args:
        model: dense, wrapped or compressed. Make a new observer once modules were put in or out.
        found: its sublayers; None classifies a model of the same class and config.

        Raises:
            SelectionError: its sublayers, or its embeddings, cannot be found.
        """
        found = sublayers_of(model) if found is None else found
        self.model = model
        self.layers: tuple[LayerViews, ...] = head_views(model, found)
        self.sites = find_sites(model, found)
        self.unembedding = Unembedding.of(model)

    @torch.no_grad()
    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        names: Names = None,
        *,
        device: torch.device | str | None = None,
        forced: ActivationCache | Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """Run tokens through the model.

        Args:
            tokens: ids.
            names: None keeps everything; a name (`"z"`, of every layer, or
                `"blocks.3.attn.hook_z"`), several of them, or a predicate of whole names.
            device: see `run_with_cache`.
            forced: `hook_resid_pre` and `hook_resid_mid` of blocks -> what the stream is made to
                be there: every component then works on inputs that are given. The cache of
                another model on the same tokens will do.
            inputs: see `run_with_cache`.

        Raises:
            StreamError: the residual stream is not a plain sum.
        """
        tokens = tokens.to(self.model.device)
        captured = capture(
            self.model,
            self.sites,
            lambda: self.model(input_ids=tokens, use_cache=False, **inputs).logits,
            wanted(names),
            forced.tensors if isinstance(forced, ActivationCache) else forced,
            device,
        )
        if not captured.norms.get(FINAL):
            raise StreamError(
                f"No norm was seen between the last block of this {self.model.config.model_type} "
                "model and its unembedding; such a model is not supported."
            )
        return captured.logits, ActivationCache(self, captured)


class ActivationCache:
    """Activations by name, and the ways to take the residual stream apart.

    `cache["blocks.3.attn.hook_z"]`, `cache["z", 3]`, `cache["resid_post", -1]`,
    `cache["scale", 3, "ln2"]`, `cache["scale"]` (of the last norm), `cache["embed"]`. Computed when
    they are asked for: `cache["result", 3]`, what every head adds, and `cache["q_input", 3]`
    (k, v), the stream once for each head.

    Wherever a `layer` is asked for below, it is the one whose input is taken apart; None, -1
    and the number of layers mean the input of the unembedding.
    """

    def __init__(self, observer: Observer, captured: Captured, has_batch_dim: bool = True) -> None:
        self._observer, self._captured = observer, captured
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
            views = self._observer.layers[int(layer[1])]
            n_heads = len(views.W_Q if "q_input" in key else views.W_K)
            return stream.expand(*stream.shape[:-2], n_heads, -1)
        raise StreamError(
            f"{key} is not in this cache: it was not asked for, or this model "
            f"({self._observer.model.config.model_type}) has nothing that could be called so. "
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
        return len(self._observer.layers)

    def to(self, device: torch.device | str) -> ActivationCache:
        """The same on another device."""
        return self._changed(lambda x: x.to(device))

    def remove_batch_dim(self) -> ActivationCache:
        """Without its first dimension.

        Raises:
            StreamError: there is more than one sequence.
        """
        if not self.has_batch_dim:
            return self
        if wrong := next((x.shape[0] for x in self.tensors.values() if x.shape[0] != 1), None):
            raise StreamError(f"The cache holds {wrong} sequences; slice one out first.")
        return self._changed(lambda x: x[0], has_batch_dim=False)

    def apply_slice_to_batch_dim(self, which: int | slice | Sequence[int]) -> ActivationCache:
        """Some of the sequences; an int drops the dimension, too."""
        if not self.has_batch_dim:
            raise StreamError("The cache has no batch dimension.")
        return self._changed(lambda x: x[which], has_batch_dim=not isinstance(which, int))

    def _changed(
        self, change: Callable[[Tensor], Tensor], has_batch_dim: bool | None = None
    ) -> ActivationCache:
        tensors = {key: change(x) for key, x in self.tensors.items()}
        kept = self.has_batch_dim if has_batch_dim is None else has_batch_dim
        return ActivationCache(self._observer, replace(self._captured, tensors=tensors), kept)

    # The stream as it grows

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        mlp_input: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
    ) -> Any:
        """The stream at every depth up to the input of a layer, for the logit lens.

        Args:
            layer: up to here.
            incl_mid: with the stream between attention and MLP of every layer.
            mlp_input: with that of `layer`.
            apply_ln: put through the norm that reads there: at the end, the last norm with a
                scale of each depth's own; elsewhere with the layer's scale.
            pos_slice: of the positions.
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
        found = self._positions(torch.stack(stack), pos_slice)
        if apply_ln:
            recompute = end == self.n_layers
            found = self.apply_ln_to_stack(found, layer, mlp_input, pos_slice, recompute)
        return (found, labels) if return_labels else found

    # What it is a sum of

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "attn", "mlp"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
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
        found = self._positions(torch.stack(stack), pos_slice)
        if apply_ln:
            found = self.apply_ln_to_stack(found, layer, mlp_input, pos_slice)
        return (found, labels) if return_labels else found

    def stack_head_results(
        self,
        layer: int | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
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
            f"L{i}H{h}" for i in range(end) for h in range(self._observer.sites.layers[i].n_heads)
        ]
        stack = [self._positions(self._heads(i), pos_slice) for i in range(end)]
        return self._finished(
            stack, labels, layer, False, pos_slice, incl_remainder, apply_ln, return_labels
        )

    def stack_neuron_results(
        self,
        layer: int | None = None,
        pos_slice: Any = None,
        neuron_slice: Any = slice(None),
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
            own = torch.arange(post.shape[-1])[neuron_slice].view(-1)
            factor = self.tensors.get(f"blocks.{i}.hook_mlp_factor")
            factor = None if factor is None else self._positions(factor, pos_slice)
            w_out = self._observer.layers[i].W_out.detach().to(post.device)
            results = neuron_results(post[..., own], w_out[own], factor, onto)
            stack.append(results if scale is None else results / scale)
            labels += [f"L{i}N{n}" for n in own.tolist()]
        found = self._finished(
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
        return _squeezed(found, project_output_onto)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
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
        labels = [f"L{i}H{h}" for i in heads for h in range(self._observer.sites.layers[i].n_heads)]
        parts = [seen(self._positions(self._heads(i), pos_slice)) for i in heads]
        if expand_neurons and end:
            found, names = self.stack_neuron_results(
                layer,
                pos_slice,
                apply_ln=apply_ln,
                mlp_input=mlp_input,
                project_output_onto=project_output_onto,
                return_labels=True,
            )
            squeezed = project_output_onto is not None and project_output_onto.ndim == 1
            parts.append(found.unsqueeze(-1) if squeezed else found)
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

    def stack_activation(
        self, activation_name: str, layer: int | None = None, sublayer_type: str | None = None
    ) -> Float[Tensor, "layers ..."]:
        """One activation of every layer before `layer`."""
        rest = () if sublayer_type is None else (sublayer_type,)
        return torch.stack([self[(activation_name, i, *rest)] for i in range(self._layer(layer))])

    # Towards the logits

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
        own = own + self._observer.unembedding.bias(ids)
        return own if incorrect_tokens is None else own - self.logit_bias(incorrect_tokens)

    def _token_directions(self, tokens: Any, device: torch.device) -> Tensor:
        unembedding = self._observer.unembedding
        ids = torch.as_tensor(tokens, device=unembedding.w_u.device)
        return unembedding.directions(ids).to(device)

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
        w_o = self._observer.layers[layer].W_O.detach().to(z.device)
        return head_results(z, w_o, self.tensors.get(f"blocks.{layer}.hook_attn_factor"))

    def _biases(self, end: int, mlp_input: bool, with_mlps: bool) -> Float[Tensor, "*b d_model"]:
        """The biases of all that writes, as they reach the stream."""
        total = torch.zeros_like(self["resid_pre", 0])
        for i in range(end + bool(mlp_input)):
            views = self._observer.layers[i]
            kinds = ["attn", "mlp"] if with_mlps and i < end else ["attn"]
            for kind in kinds:
                bias = views.b_O if kind == "attn" else views.b_out
                factor = self.tensors.get(f"blocks.{i}.hook_{kind}_factor")
                if bias is not None:
                    bias = bias.detach().to(total.device)
                    total = total + (bias if factor is None else bias * factor)
        return total

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
        return self._observer.model.get_submodule(self._captured.final_norm)

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

    def _finished(
        self,
        stack: Sequence[Tensor],
        labels: list[str],
        layer: int | None,
        mlp_input: bool,
        pos_slice: Any,
        incl_remainder: bool,
        apply_ln: bool,
        return_labels: bool,
        projected: tuple[Tensor, Tensor | None] | None = None,
    ) -> Any:
        """Put a stack together: its remainder, its norm, its labels."""
        end = self._layer(layer)
        whole = self["resid_pre", end] if end < self.n_layers else self["resid_post", -1]
        if mlp_input:
            whole = self["resid_mid", end]
        whole = self._positions(whole, pos_slice)
        if projected is not None:
            onto, scale = projected
            whole = whole @ onto if scale is None else (whole @ onto) / scale
        found = torch.cat(list(stack)) if stack else whole.new_zeros(0, *whole.shape)
        if incl_remainder:
            found = torch.cat([found, (whole - found.sum(0))[None]])
            labels = [*labels, "remainder"]
        if apply_ln and projected is None:
            found = self.apply_ln_to_stack(found, layer, mlp_input, pos_slice)
        return (found, labels) if return_labels else found


def _squeezed(found: Any, project: Tensor | None) -> Any:
    """Without the last dimension if there was one direction only."""
    if project is None or project.ndim > 1:
        return found
    if isinstance(found, tuple):
        return found[0].squeeze(-1), found[1]
    return found.squeeze(-1)
