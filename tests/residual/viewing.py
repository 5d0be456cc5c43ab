"""Small models and all that their views hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from conftest import SIZES, random_model
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Classification
from sharebasis.errors import SelectionError
from sharebasis.residual.head_views import LayerViews, MlpViews, head_views

D_VOCAB = 96
ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
LATENT = ("W_UQ", "W_UK", "W_UV")
MLP = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")

MORE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2, square": ("gpt2", {"n_inner": 32}),
    "llama, square": ("llama", {"intermediate_size": 32, "num_key_value_heads": 4}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "falcon, one kv head, biases": ("falcon, one kv head", {"bias": True}),
    "falcon, old layout, biases": ("falcon, old layout", {"bias": True}),
    "codegen, 8 heads": ("codegen", {"n_head": 8}),
}
"""Variants of what is in families.yaml."""
CASES = {**{name: (name, {}) for name in SIZES}, **MORE}

MLA = {"W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V"}
"""What latent attention does not have."""


def model_of(case: str) -> PreTrainedModel:
    name, changes = CASES[case]
    return random_model(name, D_VOCAB, **changes)


def existing(views: LayerViews | MlpViews, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Views by name, but for those that are refused."""
    found = {}
    for name in names:
        try:
            found[name] = getattr(views, name)
        except SelectionError:
            continue
    return found


def everything(model: PreTrainedModel, found: Classification | None = None) -> dict[str, Tensor]:
    """Every view of a model: `3.W_Q`, `3.experts.0.W_in`, `3.shared_experts.W_in`."""
    views: dict[str, Tensor | None] = {}
    for i, layer in enumerate(head_views(model, found)):
        mlps = {f"experts.{e}": own for e, own in enumerate(layer.experts)}
        if layer.shared_experts is not None:
            mlps["shared_experts"] = layer.shared_experts
        views |= {f"{i}.{name}": x for name, x in existing(layer, ATTENTION + LATENT + MLP).items()}
        for place, mlp in mlps.items():
            views |= {f"{i}.{place}.{name}": x for name, x in existing(mlp, MLP).items()}
    return {name: x for name, x in views.items() if x is not None}


def assert_same(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 0
) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(
            x, theirs[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def by_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, d_model) -> (batch, heads, d_head)."""
    y = torch.einsum("bm,hmd->bhd", x, weight)
    return y if bias is None else y + bias
