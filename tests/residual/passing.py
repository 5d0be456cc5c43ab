"""A pass of a small model with its activations kept."""

from __future__ import annotations

from functools import cache as remembered

import torch
from conftest import random_model
from torch import Tensor

from sharebasis.residual.cache import ActivationCache, run_with_cache

D_VOCAB = 96
TOKENS = torch.randint(1, D_VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))

SIDE_BY_SIDE = {"gpt_neox", "codegen", "gptj", "falcon", "phi", "cohere", "cohere2"}
SIDE_BY_SIDE |= {"falcon, one kv head", "falcon, old layout"}


@remembered
def passed(name: str) -> tuple[Tensor, ActivationCache]:
    """Logits and cache of a random model; not to be changed."""
    return run_with_cache(random_model(name, D_VOCAB), TOKENS)


def assert_rounding(a: Tensor, b: Tensor, scale: Tensor | None = None) -> None:
    """Equal up to what float32 rounding makes of the largest number."""
    largest = (b if scale is None else scale).abs().max().item()
    torch.testing.assert_close(a, b, rtol=0, atol=5e-6 * largest)
