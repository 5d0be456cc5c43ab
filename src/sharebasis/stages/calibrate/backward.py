"""The backward pass of calibration."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sharebasis.config.types import Labels
from sharebasis.errors import CalibrationError

SEEDS_APART = 1_000_003
"""Batches draw by seeds that follow each other; a generator on a CPU looks at 32 bits of one."""


def run_backward(
    model: PreTrainedModel,
    windows: Int64[Tensor, "windows window"],
    labels: Labels,
    seed: int,
) -> None:
    """Run a forward and a backward pass of the summed loss of every next token.

    Args:
        model: parameters need no gradient; that of the embeddings' output is asked for.
        windows: token ids.
        labels: text takes the next token of the window, model one drawn from what the model
            says (the true Fisher information in place of the empirical one).
        seed: of the draw.

    Raises:
        CalibrationError: there is nothing to draw from, as the logits are not finite.
    """
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.requires_grad_()
    )
    try:
        with torch.enable_grad():
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = windows[:, 1:].flatten()
            if labels == "model":
                targets = _draw(logits.detach(), seed)
            cross_entropy(logits.float(), targets, reduction="sum").backward()
    finally:
        handle.remove()


def _draw(logits: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(logits.device).manual_seed(seed)
    probabilities = logits.float().softmax(-1)
    if not probabilities.sum().isfinite():
        raise CalibrationError(
            "The model's logits are NaN or infinite. It overflows in this dtype, try "
            "model.dtype=float32; or its weights are damaged."
        )
    return torch.multinomial(probabilities, 1, generator=generator).flatten()
