"""What every form promises, of weights of random sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sharebasis.forms.dense import Dense
from sharebasis.forms.fixed_columns import FixedColumns
from sharebasis.forms.form import Form, RoleTensors
from sharebasis.forms.interpolative import Interpolative
from sharebasis.forms.low_rank import LowRank
from sharebasis.forms.masked import Masked
from sharebasis.forms.table import FORMS
from sharebasis.linalg.value_gauge import fix_values


@dataclass(frozen=True)
class Sizes:
    """Of the weights of a group."""

    width: int
    """Of the side that the parts share."""
    lengths: tuple[int, ...]
    """Of the other side, of each part."""
    rank: int
    seed: int

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    width = draw(st.integers(1, 9))
    lengths = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rank = draw(st.integers(1, min(width, sum(lengths))))
    return Sizes(width, lengths, rank, draw(st.integers(0, 999)))


def _dense(sizes: Sizes) -> Dense:
    stacked = sizes.draw(sum(sizes.lengths), sizes.width)
    return Dense(tuple(stacked.split(sizes.lengths)))


def _low_rank(sizes: Sizes) -> LowRank:
    both = sizes.draw(sizes.rank, sizes.width + sum(sizes.lengths))
    basis, stacked = both[:, : sizes.width], both[:, sizes.width :].T
    return LowRank(basis, tuple(stacked.split(sizes.lengths)))


def _of_writes(sizes: Sizes) -> LowRank:
    """The parts share on the output side."""
    form = _low_rank(sizes)
    return LowRank(form.basis.T, tuple(own.T for own in form.coefficients), "output")


def _masked(sizes: Sizes) -> Masked:
    weight = sizes.draw(sizes.lengths[0], sizes.width)
    kept = torch.rand(weight.shape, generator=sizes.generator) < 0.5
    return Masked(weight * kept, kept)


def _fixed_columns(sizes: Sizes) -> FixedColumns:
    """Of as many heads as a group has parts."""
    n_heads, d_value = len(sizes.lengths), sizes.width
    values = fix_values(sizes.draw(n_heads * d_value, d_value + sizes.lengths[0]), n_heads)
    return FixedColumns(values.pivots, values.coefficient)


MAKERS: Mapping[str, Callable[[Sizes], Form]] = {
    "dense": _dense,
    "low_rank": _low_rank,
    "low_rank, writes": _of_writes,
    "interpolative": lambda sizes: Interpolative.of(_low_rank(sizes)),
    "interpolative, writes": lambda sizes: Interpolative.of(_of_writes(sizes)),
    "masked": _masked,
    "fixed_columns": _fixed_columns,
}
SHARING = [name for name in MAKERS if name.startswith(("low_rank", "interpolative"))]
STAYING = ("masked", "fixed_columns")
"""Those whose inputs stay in the basis that they are in."""

of_every_form = pytest.mark.parametrize("name", MAKERS)
few = settings(max_examples=25)


def test_every_form_of_the_table_is_tried() -> None:
    assert {name.partition(",")[0] for name in MAKERS} == FORMS.keys()
    for name, make in MAKERS.items():
        form = make(Sizes(4, (3, 5), 2, 0))
        assert FORMS[name.partition(",")[0]] is type(form)
        assert form.tensors().side == ("output" if name.endswith("writes") else "input")
        assert form.rank == (2 if name in SHARING else None)


def _assert_same(weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Up to rounding, in float64."""
    for weight, other in zip(weights, others, strict=True):
        scale = max(1.0, weight.abs().max().item())
        torch.testing.assert_close(other, weight, rtol=0, atol=1e-9 * scale)


def _shapes(form: Form) -> list[tuple[int, int]]:
    return [(weight.shape[0], weight.shape[1]) for weight in form.dense()]


@of_every_form
@few
@given(sizes=sizes())
def test_what_is_stored_is_loaded_as_it_was(name: str, sizes: Sizes) -> None:
    form = MAKERS[name](sizes)
    again = type(form).load(form.tensors(), _shapes(form))
    assert type(again) is type(form)
    assert again.rank == form.rank
    for weight, other in zip(form.dense(), again.dense(), strict=True):
        assert torch.equal(weight, other)
    before, after = _named(form.tensors()), _named(again.tensors())
    assert before.keys() == after.keys()
    for role, tensor in before.items():
        assert tensor.dtype == after[role].dtype
        assert torch.equal(tensor, after[role])


def _named(tensors: RoleTensors) -> dict[tuple[int, str], Tensor]:
    """By the part (-1: all of them) and the role."""
    own = {(i, role): t for i, part in enumerate(tensors.parts) for role, t in part.items()}
    return own | {(-1, role): tensor for role, tensor in tensors.shared.items()}


@of_every_form
@few
@given(sizes=sizes())
def test_modules_multiply_by_the_dense_weights(name: str, sizes: Sizes) -> None:
    form = MAKERS[name](sizes)
    modules = form.modules()
    for module, weight in zip(modules, form.dense(), strict=True):
        assert module.shape == tuple(weight.shape)
        assert module.rank == form.rank
        assert torch.equal(module.dense(), weight)
        x = sizes.draw(2, 3, weight.shape[1])
        _assert_same([x @ weight.T], [module(x)])


@of_every_form
@few
@given(sizes=sizes())
def test_what_is_made_editable_and_back_is_the_same(name: str, sizes: Sizes) -> None:
    form = MAKERS[name](sizes)
    edited = form.editable()
    assert edited.editable() is edited
    assert edited.rank == form.rank
    _assert_same(form.dense(), edited.dense())
    if isinstance(form, FixedColumns):  # its edit chooses columns anew
        return
    again = type(form).of(edited)
    assert type(again) is type(form)
    _assert_same(form.dense(), again.dense())


@of_every_form
@few
@given(sizes=sizes(), data=st.data())
def test_inputs_in_another_basis_are_the_weight_times_it(
    name: str, sizes: Sizes, data: st.DataObject
) -> None:
    if name in SHARING and not name.endswith("writes"):  # which read the same inputs
        sizes = Sizes(sizes.width, (sum(sizes.lengths),), sizes.rank, sizes.seed)
    form = MAKERS[name](sizes)
    part = data.draw(st.integers(0, len(form.dense()) - 1))
    before = form.dense()
    basis = sizes.draw(before[part].shape[1], before[part].shape[1])
    if name in STAYING:
        with pytest.raises(NotImplementedError, match=f"{name} stays in the basis"):
            form.change_inputs(part, lambda factor: factor @ basis)
        return
    changed = form.change_inputs(part, lambda factor: factor @ basis)
    assert type(changed) is type(form)
    expected = [weight @ basis if i == part else weight for i, weight in enumerate(before)]
    _assert_same(expected, changed.dense())


@pytest.mark.parametrize("name", SHARING)
@few
@given(sizes=sizes())
def test_a_shared_basis_is_one_parameter(name: str, sizes: Sizes) -> None:
    form = MAKERS[name](sizes)
    modules = nn.ModuleList(form.modules())
    assert len(modules) == len(sizes.lengths)
    assert len({id(module.basis) for module in modules}) == 1
    tensors = _named(form.tensors()).values()
    n_numbers = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    assert sum(parameter.numel() for parameter in modules.parameters()) == n_numbers
    assert not any(parameter.requires_grad for parameter in modules.parameters())
    parameter = nn.Parameter(form.tensors().shared["basis"], requires_grad=False)
    stored = form.tensors()
    stored = RoleTensors({**stored.shared, "basis": parameter}, stored.parts, stored.side)
    for module in type(form).load(stored, _shapes(form)).modules():
        assert module.basis is parameter


@of_every_form
@few
@given(sizes=sizes())
def test_another_dtype_is_that_of_numbers_alone(name: str, sizes: Sizes) -> None:
    form = MAKERS[name](sizes)
    mapped, doubled = form.map(Tensor.float), form.map(lambda tensor: 2 * tensor)
    before, after = _named(form.tensors()), _named(mapped.tensors())
    assert type(mapped) is type(doubled) is type(form)
    assert before.keys() == after.keys() == _named(doubled.tensors()).keys()
    for role, tensor in before.items():
        twice = _named(doubled.tensors())[role]
        if tensor.is_floating_point():
            assert torch.equal(after[role], tensor.float())
            assert torch.equal(twice, 2 * tensor)
        else:
            assert after[role].dtype == tensor.dtype
            assert torch.equal(after[role], tensor)
            assert torch.equal(twice, tensor)
    assert all(weight.dtype == torch.float32 for weight in mapped.dense())


@of_every_form
@few
@given(sizes=sizes())
def test_trained_parameters_are_the_same_weights(name: str, sizes: Sizes) -> None:
    form = MAKERS[name](sizes)
    made = form.editable().trainable(edited=True)
    assert made is not None
    for weight, other in zip(form.dense(), made.dense(), strict=True):
        assert other.dtype == torch.float32
        scale = max(1.0, weight.abs().max().item())
        torch.testing.assert_close(other.double(), weight, rtol=0, atol=1e-4 * scale)
    parameters = _named(made.parameters())
    assert all(isinstance(own, nn.Parameter) for own in parameters.values())
    assert all(own.requires_grad for own in parameters.values())
    if made.support is not None:
        assert all((own[~made.support] == 0).all() for own in parameters.values())
    untouched = form.editable().trainable(edited=False)
    assert (untouched is None) == (form.editable().kind == "dense")


@of_every_form
@few
@given(sizes=sizes())
def test_what_takes_more_memory_than_it_stores_says_so(name: str, sizes: Sizes) -> None:
    form = MAKERS[name](sizes)
    told = type(form).n_in_memory(_shapes(form))
    held = sum(p.numel() for p in nn.ModuleList(form.modules()).parameters())
    tensors = _named(form.tensors()).values()
    n_numbers = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    assert held == (n_numbers if told is None else told)
