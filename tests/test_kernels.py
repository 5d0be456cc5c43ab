"""kernels: another library's product, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sharebasis import kernels


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "whole": lambda: _random(40, 24),
    "rows of a larger one": lambda: _random(90, 24)[30:70],
    "transposed (Conv1D)": lambda: _random(24, 90).T[30:70],
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "one row": lambda: _random(1, 24),
    "a batch": lambda: _random(3, 5, 24),
    "no rows": lambda: _random(0, 24),
    "columns of a wider one": lambda: _random(3, 5, 30)[..., 2:26],
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_is_the_product_whatever_the_layout(
    x: Callable[[], Tensor], weight: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    a, w = x().to(dtype), weight().to(dtype)
    with torch.no_grad():
        y = kernels.linear(a, w)
    exact = a.double() @ w.double().T
    bound = 24 * torch.finfo(dtype).eps * (a.double().abs() @ w.double().abs().T)
    assert y.shape == (*a.shape[:-1], 40)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_gradients_flow_where_they_are_wanted(needs: str) -> None:
    x, weight = _random(3, 24), _random(40, 24)
    wanted = {"x": x, "weight": weight}[needs].requires_grad_()
    kernels.linear(x, weight).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.shape == wanted.shape


def test_without_onednn_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ONEDNN", None)
    x, weight = _random(3, 24), _random(40, 24)
    with torch.no_grad():
        assert torch.equal(kernels.linear(x, weight), torch.nn.functional.linear(x, weight))
