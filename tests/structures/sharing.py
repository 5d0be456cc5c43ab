"""Small models whose layers may share, and what they lose by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conftest import REPOSITORY
from small_pipeline import SmallModel
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.groups import Group
from sharebasis.config.fit import FitSettings
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.pipeline.compose import compose_settings
from sharebasis.stages.fit.metrics import FittedModel
from sharebasis.structures.structure import ModelParts
from sharebasis.structures.table import structures_of

WINDOWS = torch.randint(1, 280, (24, 24), generator=torch.Generator().manual_seed(0))
EVERY = "private,joint,experts,shared:2,shared:3,shared:all"
READS, WRITES = ["q", "k", "v", "gate", "up"], ["o", "down"]


def sharing_settings(structures: str, removed: float = 0.4, **changes: object) -> FitSettings:
    overrides = [
        "fit=auto",
        f"fit.structures=[{structures}]",
        f"fit.shared=[{','.join(READS + WRITES)}]",
        f"fit.removed={removed}",
        "fit.value_gauge=false",
        *(f"fit.{key}={value}" for key, value in changes.items()),
    ]
    overrides += ["grouping=by_distance"] * ("by_distance" in structures)
    return compose_settings(overrides, REPOSITORY / "conf").fit


FOUR_LAYERS: dict[str, Any] = {
    "windows": WINDOWS,
    "batch": 6,
    "num_hidden_layers": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def offered_groups(case: SmallModel, settings: FitSettings) -> list[Group]:
    """Those that may share in the place of the baseline."""
    dense = DenseWeights(case.weights)
    model = ModelParts(case.parts(), {}, case.classification, dense, settings)
    _, *offered = structures_of(settings.structures)
    return [g for name, structure in offered if name == "shared" for g in structure.cells(model)]


def errors_of(model: PreTrainedModel, case: SmallModel) -> dict[str, Tensor]:
    """W - Ŵ of every sublayer, the product put together from what is stored."""
    dense = case.unstacked()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitLinear):
            weight = dense.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            found[name] = (weight - module.weight).double().detach()
    return found


def loss_of_error(name: str, error: Tensor, case: SmallModel, settings: FitSettings) -> float:
    """tr(G E C Eᵀ) by Cholesky factors of the damped moments."""
    own = case.moments.gradient(name)
    gradient = own.total / case.moments.n_tokens
    inputs = case.moments.read(case.moments.site(name)).second

    def factor(moment: Tensor, damping: float) -> Tensor:
        extra = damping * moment.diagonal().mean() * torch.eye(len(moment)).double()
        return torch.linalg.cholesky(moment + extra)

    left = factor(gradient, settings.damping_gradients).T
    return (left @ error @ factor(inputs, settings.damping_inputs)).square().sum().item()


def share_basis(modules: Sequence[torch.nn.Linear], rank: int, side: str) -> None:
    """Give weights one basis of a rank on a side."""
    d_out, d_in = modules[0].weight.shape
    common = torch.randn(rank, d_in if side == "input" else d_out)
    for module in modules:
        own = torch.randn(d_out if side == "input" else d_in, rank)
        product = own @ common / rank**0.5
        module.weight.copy_(0.3 * (product if side == "input" else product.T))


def total_loss(fitted: FittedModel) -> float:
    return sum(one.loss for one in fitted.groups)


@torch.no_grad()
def dense_logits(case: SmallModel) -> Tensor:
    return case.load()(input_ids=WINDOWS[:4]).logits
