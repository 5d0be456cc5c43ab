"""Cholesky factors of Gram matrices that are singular, and such as no factor can be had of."""

from __future__ import annotations

import pytest
import torch

from sharebasis.errors import CalibrationError
from sharebasis.linalg.gram import cholesky, spectrum


def _rows(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("n", [30, 12, 1])
def test_the_product_is_the_matrix_however_singular_it_is(n: int) -> None:
    rows = _rows(n, 20) * torch.logspace(0, -6, 20, dtype=torch.float64)
    gram = rows.T @ rows
    factor = cholesky(gram)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-8, atol=1e-11 * gram.max().item())


def test_rounding_on_the_diagonal_is_not_taken_for_a_scale() -> None:
    rows = _rows(12, 20)
    gram = rows.T @ rows
    gram[5] = gram[:, 5] = 0
    gram[5, 5] = -1e-17 * gram.max()
    gram[5, 6] = gram[6, 5] = 1e-16 * gram.max()
    factor = cholesky(gram)
    torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-8, atol=1e-9 * gram.max().item())


def test_what_is_not_finite_is_told() -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        cholesky(torch.full((3, 3), torch.nan, dtype=torch.float64))


def test_a_spectrum_is_that_of_the_weight() -> None:
    rows = _rows(6, 20)
    wanted = torch.linalg.svdvals(rows).square()
    torch.testing.assert_close(spectrum(rows.T @ rows, 6), wanted)
    assert (spectrum(rows.T @ rows, 20) >= 0).all()
