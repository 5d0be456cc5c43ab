"""Every method against the truncated SVD of the weight that it scales by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, MakeSettings
from small_pipeline import MakeSmallModel, SmallModel
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.config.fit import FitSettings
from sharebasis.config.methods import METHODS
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compose import compose_settings

WINDOWS = torch.randint(1, 280, (12, 24), generator=torch.Generator().manual_seed(0))
RANK = 5


@pytest.fixture(scope="module")
def small(small_model: MakeSmallModel) -> SmallModel:
    return small_model("llama", windows=WINDOWS, batch=4)


def _of(method: str) -> FitSettings:
    return compose_settings([f"fit={method}"], REPOSITORY / "conf").fit


def _diagonal(moment: Tensor, power: float = 1.0) -> Tensor:
    return moment.diagonal().pow(power).diag()


def _damped(moment: Tensor, fraction: float) -> Tensor:
    return moment + fraction * moment.diagonal().mean() * torch.eye(len(moment)).double()


def _scales(method: str, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """(L, R) of the SVD of L W R, as the papers put it; Cholesky factors of what is whole."""
    left, right = torch.eye(len(gradients)).double(), torch.eye(len(inputs)).double()
    match method:
        case "asvd":
            right = _diagonal(inputs, 0.25)
        case "svd_llm" | "basis_sharing":
            right = torch.linalg.cholesky(inputs)
        case "fwsvd":
            left = _diagonal(gradients, 0.5)
        case "kfac" | "auto":
            right = torch.linalg.cholesky(_damped(inputs, 1e-4))
            left = torch.linalg.cholesky(_damped(gradients, 0.05)).T
    return left, right


def _by_hand(left: Tensor, weight: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of rank RANK, and the squared singular values."""
    u, s, v = torch.linalg.svd(left @ weight.double() @ right, full_matrices=False)
    scaled = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    return torch.linalg.solve(left, torch.linalg.solve(right.T, scaled.T).T), s.square()


def _moments(store: MomentStore, group: Group) -> tuple[Tensor, Tensor]:
    (part,) = group.parts
    name = part.sublayer.name
    return store.read(store.site(name)).second, store.gradient(name).second


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_the_truncated_svd_of_the_scaled_weight(
    method: str,
    small: SmallModel,
    make_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    settings, dense = _of(method), DenseWeights(small.weights)
    if method == "basis_sharing":  # of groups of one
        settings = make_settings({"fit.group_size": 1}).fit
    spectra = small.decompose(tmp_path / "spectra", settings)
    _, cells = spectra.by_structure[0]
    assert len(cells) == len(small.parts())
    all_energies = spectra.energies
    for cell in cells:
        group, energies = cell.cell, all_energies[cell.number]
        weight = dense.read(f"{group.parts[0].sublayer.name}.weight", group.parts[0].rows)
        left, right = _scales(method, *_moments(small.moments, group))
        product, squares = _by_hand(left, weight, right)
        basis = cell.read("basis", slice(0, RANK)).double()
        coefficient = cell.read("coefficient", columns=slice(0, RANK)).double()
        scale = product.abs().max().item()
        torch.testing.assert_close(coefficient @ basis, product, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(
            torch.from_numpy(energies), squares, rtol=1e-6, atol=1e-9 * squares.sum().item()
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_choice_of_its_own(method: str) -> None:
    assert _of(method).method == method


@pytest.mark.parametrize("method", ["asvd", "fwsvd", "kfac"])
def test_a_baseline_takes_the_same_of_every_weight_and_stores_plain_factors(method: str) -> None:
    found: Mapping[str, Any] = vars(_of(method))
    assert (found["allocation"], found["storage"], found["shared"]) == ("uniform", "plain", ())
