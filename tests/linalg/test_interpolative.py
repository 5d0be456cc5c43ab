"""interpolative: the same product in fewer numbers, with bounded coefficients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharebasis.compressed.index import INDEX_FILE, CompressedGroup, CompressedIndex, CompressedPart
from sharebasis.compressed.writer import CompressedWriter
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.io.records import load_record
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg import interpolative
from sharebasis.linalg.interpolative import MAX_COEFFICIENT, interpolate
from sharebasis.linalg.rows import Rows

SHAPES = {
    "tall": (40, 24, 10),
    "wide": (24, 40, 10),
    "every row": (10, 24, 10),
    "rank 1": (9, 7, 1),
}


def _factors(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """With singular values over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    coefficient, basis = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((d_out, rank), (rank, d_in))
    )
    return coefficient * torch.logspace(0, -4, rank, dtype=torch.float64), basis


def _others(d_out: int, pivots: Tensor) -> Tensor:
    return torch.tensor([row for row in range(d_out) if row not in pivots])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_same_product(shape: tuple[int, int, int]) -> None:
    coefficient, basis = _factors(*shape)
    product = coefficient @ basis
    form = interpolate(coefficient, basis)
    assert form.basis.shape == (shape[2], shape[1])
    assert form.coefficient.shape == (shape[0] - shape[2], shape[2])
    tolerance = 1e-13 * product.abs().max().item()
    torch.testing.assert_close(form.basis, product[form.pivots], rtol=0, atol=tolerance)
    if shape[0] > shape[2]:
        rest = product[_others(shape[0], form.pivots)]
        torch.testing.assert_close(form.coefficient @ form.basis, rest, rtol=0, atol=tolerance)
    assert form.pivots.tolist() == sorted(set(form.pivots.tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_no_coefficient_exceeds_the_bound_however_bad_the_first_choice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coefficient, basis = _factors(60, 30, 12, seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).numpy()
    monkeypatch.setattr(interpolative, "qr", lambda *_, **__: (None, order))
    form = interpolate(coefficient, basis)
    assert form.coefficient.abs().max() <= MAX_COEFFICIENT
    rest = (coefficient @ basis)[_others(60, form.pivots)]
    torch.testing.assert_close(form.coefficient @ form.basis, rest, rtol=0, atol=1e-11)
    monkeypatch.setattr(interpolative, "MAX_COEFFICIENT", float("inf"))  # the choice was bad indeed
    assert interpolate(coefficient, basis).coefficient.abs().max() > MAX_COEFFICIENT


@pytest.mark.parametrize("lengths", [(20,), (12, 8), (3, 17)])
def test_a_module_in_interpolative_form_computes_the_product(lengths: tuple[int, ...]) -> None:
    coefficient, basis = (factor.float() for factor in _factors(sum(lengths), 16, 6))
    form = interpolate(coefficient.double(), basis.double())
    shared = torch.nn.Parameter(form.basis.float(), requires_grad=False)
    linears, start, first, row = [], 0, 0, 0
    for length in lengths:
        inside = (form.pivots >= start) & (form.pivots < start + length)
        n = int(inside.sum())
        linear = ShareLinear(torch.zeros(length, 16))
        rest = form.coefficient[row : row + length - n].float()
        linear.compress(shared, rest, form.pivots[inside] - start, first)
        linears.append(linear)
        start, first, row = start + length, first + n, row + length - n
    module, product = SplitLinear(linears), coefficient @ basis
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(module(x), x @ product.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(module.weight, product, rtol=0, atol=1e-4)
    numbers = sum(p.numel() for p in module.parameters())
    assert numbers == 6 * (16 + sum(lengths)) - 36


@pytest.mark.parametrize("rank", [6, 16], ids=["low rank", "full rank"])
@pytest.mark.parametrize("interpolative", [True, False], ids=["interpolative", "plain"])
@pytest.mark.parametrize("lengths", [(20,), (12, 8), (3, 17)])
def test_weights_that_share_their_outputs_compute_their_products_in_as_few_numbers(
    lengths: tuple[int, ...], interpolative: bool, rank: int, tmp_path: Path
) -> None:
    own, shared = _factors(sum(lengths), 16, rank)
    coefficients = {f"{i}.coefficient": rows for i, rows in enumerate(own.split(lengths))}
    pivots = "pivots" if interpolative else None
    parts = tuple(CompressedPart(name[0], Rows(0, 16), name, pivots) for name in coefficients)
    writer = CompressedWriter(tmp_path / "out", 10_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "companions").mkdir()
    group = CompressedGroup("writes", "down", rank, "basis", parts, "output")
    writer.add_factors(group, shared, coefficients, torch.float64)
    writer.finish(tmp_path / "companions")
    n_pivots = rank if interpolative else 0
    assert writer.n_numbers == rank * (16 + sum(lengths)) - rank * n_pivots + n_pivots
    index = load_record(tmp_path / "out" / INDEX_FILE, CompressedIndex)
    stored = dict(TensorReader(tmp_path / "out", index.files).stream())
    basis = torch.nn.Parameter(stored["basis"], requires_grad=False)
    x, multiplied = torch.randn(5, max(lengths)).double(), 0
    for rows, part in zip(coefficients.values(), index.groups[0].parts, strict=True):
        linear = ShareLinear(torch.zeros(16, len(rows)).double())
        chosen = stored["pivots"] if interpolative else None
        linear.compress(basis, stored[part.coefficient], chosen, part.first, "output")
        product = shared.T @ rows.T
        inputs = x[:, : len(rows)]
        torch.testing.assert_close(linear(inputs), inputs @ product.T, rtol=0, atol=1e-9)
        torch.testing.assert_close(linear.dense(), product, rtol=0, atol=1e-10)
        inner, outer = linear.factors()
        torch.testing.assert_close(outer @ inner, product, rtol=0, atol=1e-10)
        assert linear.basis is basis
        multiplied += linear.coefficient.numel()
        assert linear.extra_repr().endswith(f"rank={rank}, state=compressed")
    assert multiplied + basis.numel() + n_pivots == writer.n_numbers
