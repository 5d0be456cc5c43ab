"""A forward pass over a hub model, kept and taken apart: `run_with_cache`.

Names, shapes and methods are TransformerLens's, so that what is written for its cache reads
on. What differs is said where it does: nothing is folded into anything here, so norms bring
their weights, and what a family multiplies or norms before it adds it is a component as added.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from sharebasis.errors import StreamError
from sharebasis.residual.anatomy import Anatomy
from sharebasis.residual.capture import FINAL, capture
from sharebasis.residual.head_and_neuron_stacks import HeadAndNeuronStacks
from sharebasis.residual.names import Names, wanted


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

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        ...     vocab_size=96,
        ... )
        >>> model = AutoModelForCausalLM.from_config(config).eval()
        >>> tokens = torch.arange(6)[None]
        >>> logits, cache = run_with_cache(model, tokens)
        >>> cache["z", 1].shape  # the mixed values: (batch, position, head, d_head)
        torch.Size([1, 6, 4, 8])
        >>> stack, labels = cache.decompose_resid(return_labels=True)
        >>> labels
        ['embed', '0_attn_out', '0_mlp_out', '1_attn_out', '1_mlp_out']
        >>> attributions = cache.logit_attrs(stack, tokens)  # of each to each token's logit
        >>> of_tokens = logits.gather(-1, tokens[..., None])[..., 0]
        >>> torch.allclose(attributions.sum(0) + cache.logit_bias(tokens), of_tokens, atol=1e-5)
        True
    """
    return Observer(model)(tokens, names, device=device, **inputs)


class Observer(Anatomy):
    """Finds its way in a model once, and then runs tokens through it as often as is wanted."""

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
            names: None keeps everything; a name (`"z"`, of every layer, `"z3"` or
                `"blocks.3.attn.hook_z"`), several of them, or a predicate of whole names.
            device: see `run_with_cache`.
            forced: `hook_resid_pre` and `hook_resid_mid` of blocks -> what the stream is made to
                be there: every component then works on inputs that are given. The cache of
                another model on the same tokens will do.
            inputs: see `run_with_cache`.

        Raises:
            StreamError: the residual stream is not a plain sum, a name is of no activation, or the
                model has no such argument.
        """
        self._require_arguments(inputs)
        tokens = tokens.to(self.model.device)
        captured = capture(
            self.model,
            self.sites,
            lambda: self.model(input_ids=tokens, use_cache=False, **inputs).logits,
            wanted(names, len(self.layers)),
            forced.cache_dict if isinstance(forced, ActivationCache) else forced,
            device,
        )
        if not captured.norms.get(FINAL):
            raise StreamError(
                f"No norm was seen between the last block of this {self.model.config.model_type} "
                "model and its unembedding; such a model is not supported."
            )
        return captured.logits, ActivationCache(self, captured)

    def _require_arguments(self, inputs: Mapping[str, Any]) -> None:
        """Refuse what the model would overlook, as its forward pass takes any keyword."""
        parameters = inspect.signature(self.model.forward).parameters.values()
        known = {x.name for x in parameters if x.kind is not x.VAR_KEYWORD}
        known |= TransformersKwargs.__annotations__.keys()  # which its layers may look at
        if unknown := sorted(inputs.keys() - known):
            raise StreamError(
                f"{', '.join(unknown)}: no argument of a {type(self.model).__name__}. What is kept "
                "is chosen by `names`; a pass goes through all layers."
            )


class ActivationCache(HeadAndNeuronStacks):
    """Activations by name, and the ways to take the residual stream apart.

    `cache["blocks.3.attn.hook_z"]`, `cache["z", 3]`, `cache["z3"]`, `cache["resid_post", -1]`,
    `cache["scale", 3, "ln2"]`, `cache["scale"]` (of the last norm), `cache["embed"]`. Computed when
    they are asked for: `cache["result", 3]`, what every head adds, and `cache["q_input", 3]`
    (k, v), the stream once for each head.

    Wherever a `layer` is asked for, it is the one whose input is taken apart; None, -1
    and the number of layers mean the input of the unembedding. Positions, sequences and neurons
    are chosen as in TransformerLens (`slices.Slice`): (1, 5) is 1:5.
    """
