"""interpolative: the same product in fewer numbers, with bounded coefficients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharebasis.compressed.index import StoredGroup, StoredPart, load_index
from sharebasis.compressed.writer import CompressedWriter
from sharebasis.forms.interpolative import Interpolative, InterpolativeModule
from sharebasis.forms.low_rank import LowRank
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.forms.table import packed
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
    plain = LowRank(basis.double(), coefficient.double().split(lengths))
    form, linears = Interpolative.of(plain).map(Tensor.float), []
    for length, own in zip(lengths, form.modules(), strict=True):
        linear = ShareLinear(torch.zeros(length, 16))
        linear.compress(own)
        linears.append(linear)
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
    coefficients = own.split(lengths)
    plain = LowRank(shared.T, tuple(rows.T for rows in coefficients), "output")
    form = packed(plain, "interpolative" if interpolative else "plain")
    names = [{"coefficient": f"{i}.coefficient"} for i in range(len(lengths))]
    parts = tuple(StoredPart((f"{i}",), Rows(0, 16), own) for i, own in enumerate(names))
    tensors = {role: role for role in form.tensors().shared}
    assert tensors.keys() == ({"basis", "pivots"} if interpolative else {"basis"})
    writer = CompressedWriter(tmp_path / "out", 10_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "companions").mkdir()
    group = StoredGroup("writes", "down", form.kind, parts, tensors, rank, "output")
    writer.add_group(group, form, torch.float64)
    writer.finish(tmp_path / "companions")
    n_pivots = rank if interpolative else 0
    assert writer.n_numbers == rank * (16 + sum(lengths)) - rank * n_pivots + n_pivots
    index = load_index(tmp_path / "out")
    assert index.groups == (group,)
    stored = dict(TensorReader(tmp_path / "out", index.files).stream())
    stored["basis"] = basis = torch.nn.Parameter(stored["basis"], requires_grad=False)
    loaded = index.groups[0].load(stored, [(16, n) for n in lengths])
    x, multiplied = torch.randn(5, max(lengths)).double(), 0
    for rows, module in zip(coefficients, loaded.modules(), strict=True):
        linear = ShareLinear(torch.zeros(16, len(rows)).double())
        linear.compress(module)
        product = shared.T @ rows.T
        inputs = x[:, : len(rows)]
        torch.testing.assert_close(linear(inputs), inputs @ product.T, rtol=0, atol=1e-9)
        torch.testing.assert_close(linear.dense(), product, rtol=0, atol=1e-10)
        inner, outer = module.factors
        outer = module.plain() if isinstance(module, InterpolativeModule) else outer
        torch.testing.assert_close(outer @ inner, product, rtol=0, atol=1e-10)
        assert module.basis is basis
        multiplied += module.coefficient.numel()
        assert repr(linear).endswith(f"rank={rank}, state=compressed)")
    assert multiplied + basis.numel() + n_pivots == writer.n_numbers
