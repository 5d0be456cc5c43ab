"""kernels: another library's product, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sharebasis.runtime import matmul


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
        y = matmul.linear(a, w)
    exact = a.double() @ w.double().T
    bound = 24 * torch.finfo(dtype).eps * (a.double().abs() @ w.double().abs().T)
    assert y.shape == (*a.shape[:-1], 40)
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_gradients_flow_where_they_are_wanted(needs: str) -> None:
    x, weight = _random(3, 24), _random(40, 24)
    wanted = {"x": x, "weight": weight}[needs].requires_grad_()
    matmul.linear(x, weight).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.shape == wanted.shape


def test_without_onednn_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_ONEDNN", None)
    x, weight = _random(3, 24), _random(40, 24)
    with torch.no_grad():
        assert torch.equal(matmul.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.skipif(matmul._ONEDNN is None, reason="torch has no oneDNN here")
def test_who_does_not_want_onednn_goes_without() -> None:
    x, weight = _random(3, 24), _random(40, 24)
    fastest = matmul._ONEDNN
    try:
        matmul.use_onednn(False)
        with torch.no_grad():
            assert torch.equal(matmul.linear(x, weight), torch.nn.functional.linear(x, weight))
        assert matmul._ONEDNN is None
    finally:
        matmul.use_onednn(True)
    assert matmul._ONEDNN is fastest


@pytest.mark.parametrize("bias", [True, False])
def test_every_linear_is_the_fastest_in_its_context(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = []
    product = matmul._product

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        products.append(weight.shape)
        return product(x, weight)

    monkeypatch.setattr(matmul, "_product", counted)
    module = torch.nn.Sequential(torch.nn.Linear(24, 40, bias), torch.nn.Linear(40, 3, bias))
    x = _random(5, 24)
    with torch.no_grad():
        expected = module(x)
        assert not products
        with matmul.FastestLinear():
            found = module(x)
        assert products == [(40, 24), (3, 40)]
        assert torch.equal(module(x), expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_flow_in_that_context() -> None:
    module = torch.nn.Linear(24, 40)
    with matmul.FastestLinear():
        module(_random(3, 24)).sum().backward()
    assert module.weight.grad is not None
    torch.testing.assert_close(module.bias.grad, torch.full((40,), 3.0))
