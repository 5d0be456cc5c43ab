"""States of a ShareLinear, what it computes in each, and what it keeps in memory."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from sharebasis.errors import StateError
from sharebasis.forms.low_rank import LowRankModule
from sharebasis.forms.share_linear import ShareLinear, State
from sharebasis.forms.split_linear import SplitLinear

D_OUT, D_IN, RANK = 6, 5, 3


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def factors(seed=0, rank=RANK, d_out=D_OUT):
    return normal(rank, D_IN, seed=seed), normal(d_out, rank, seed=seed + 1)


def product(basis, coefficient):
    return LowRankModule(basis, coefficient, "input")


def ignore(x):
    """A tracker."""


def original():
    return ShareLinear(normal(D_OUT, D_IN))


def calibrating():
    linear = original()
    linear.calibrate(ignore)
    return linear


def compressed():
    linear = original()
    linear.compress(product(*factors()))
    return linear


def calibrate(linear):
    linear.calibrate(ignore)


def compress(linear):
    linear.compress(product(*factors(seed=5)))


def numbers_held(linear):
    return [name for name, _ in linear.named_parameters()]


@pytest.mark.parametrize(
    ("made", "move", "state", "holds"),
    [
        (original, calibrate, State.CALIBRATING, ["form.weight"]),
        (original, compress, State.COMPRESSED, ["form.basis", "form.coefficient"]),
        (calibrating, compress, State.COMPRESSED, ["form.basis", "form.coefficient"]),
        (compressed, compress, State.COMPRESSED, ["form.basis", "form.coefficient"]),
    ],
)
def test_a_transition_that_is_allowed_changes_the_state_and_what_is_held(made, move, state, holds):
    linear = made()
    move(linear)
    assert linear.state is state
    assert numbers_held(linear) == holds


@pytest.mark.parametrize(
    ("made", "was"), [(calibrating, "calibrating"), (compressed, "compressed")]
)
def test_a_transition_that_is_not_allowed_is_refused_and_changes_nothing(made, was):
    linear = made()
    held, x = numbers_held(linear), normal(4, D_IN, seed=9)
    before = linear(x)
    with pytest.raises(StateError) as error:
        calibrate(linear)
    for said in (
        f"state={was})",
        "cannot be calibrated:",
        "needs state original.",
        "in_features=5",
    ):
        assert said in str(error.value)
    assert (linear.state, numbers_held(linear)) == (was, held)
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("shape", [(D_IN,), (4, D_IN), (2, 3, D_IN)])
def test_it_computes_what_the_dense_weight_does_until_it_is_compressed(shape):
    weight, x = normal(D_OUT, D_IN), normal(*shape, seed=1)
    linear = ShareLinear(weight)
    dense = nn.functional.linear(x, weight)
    assert torch.equal(linear(x), dense)
    linear.calibrate(ignore)
    torch.testing.assert_close(linear(x), dense, rtol=0, atol=1e-5)
    basis, coefficient = factors()
    linear.compress(product(basis, coefficient))
    expected = x.double() @ (coefficient.double() @ basis.double()).T
    torch.testing.assert_close(linear(x).double(), expected, rtol=0, atol=1e-5)
    assert (linear(x) - dense).abs().max() > 0.1


def test_a_tracker_sees_every_input_once_while_calibrating_and_none_before_or_after():
    linear, seen = original(), []
    inputs = [normal(2, D_IN, seed=seed) for seed in range(4)]
    linear(inputs[0])
    linear.calibrate(seen.append)
    linear(inputs[1])
    linear(inputs[2])
    linear.compress(product(*factors()))
    linear(inputs[3])
    assert [id(x) for x in seen] == [id(inputs[i]) for i in (1, 2)]


def test_a_tracker_is_let_go_of_once_calibration_ends():
    class Tracker:
        def __call__(self, x):
            """Any callable will do."""

    tracker, linear = Tracker(), original()
    linear.calibrate(tracker)
    alive = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert alive() is not None
    compress(linear)
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("basis", "coefficient"),
    [((RANK, D_IN + 1), (D_OUT, RANK)), ((RANK, D_IN), (D_OUT - 1, RANK))],
)
def test_factors_that_do_not_fit_the_weight_are_refused_and_change_nothing(basis, coefficient):
    linear = original()
    with pytest.raises(StateError) as error:
        linear.compress(product(normal(*basis), normal(*coefficient)))
    assert str(error.value) == (
        "ShareLinear(in_features=5, out_features=6, form=dense, state=original) cannot hold a form "
        f"of a weight of shape {(coefficient[0], basis[1])}."
    )
    assert linear.state is State.ORIGINAL
    assert numbers_held(linear) == ["form.weight"]


def test_factors_that_do_not_fit_each_other_are_refused():
    with pytest.raises(StateError, match=r"of shapes \(6, 4\) and \(3, 5\) have no product"):
        product(normal(RANK, D_IN), normal(D_OUT, RANK + 1))
    with pytest.raises(StateError, match=r"of shapes \(6, 4\) and \(3, 5\) have no product"):
        LowRankModule(normal(D_OUT, RANK + 1), normal(RANK, D_IN), "output")


@pytest.mark.parametrize("made", [original, calibrating, compressed])
def test_inputs_of_another_width_do_not_go_through(made):
    with pytest.raises(Exception, match=r"shapes cannot be multiplied|Type-check error"):
        made()(normal(2, D_IN + 1))


def test_its_repr_shows_the_shape_the_state_and_once_compressed_the_rank():
    shape = "ShareLinear(in_features=5, out_features=6, "
    assert repr(original()) == shape + "form=dense, state=original)"
    assert repr(calibrating()) == shape + "form=dense, state=calibrating)"
    assert repr(compressed()) == shape + "form=low_rank, rank=3, state=compressed)"


def test_no_parameter_asks_for_a_gradient():
    for linear in (original(), compressed()):
        assert not any(parameter.requires_grad for parameter in linear.parameters())


def split_in_three(weight, bias=None):
    return SplitLinear([ShareLinear(weight[i : i + 2]) for i in (0, 2, 4)], bias)


@pytest.mark.parametrize("bias", [None, normal(D_OUT, seed=3)])
def test_parts_are_put_together_in_row_order_and_get_the_bias_once(bias):
    weight, x = normal(D_OUT, D_IN), normal(2, 4, D_IN, seed=1)
    split = split_in_three(weight, bias)
    torch.testing.assert_close(split(x), nn.functional.linear(x, weight, bias), rtol=0, atol=1e-6)
    pieces = [factors(seed=10 * i, d_out=2) for i in range(3)]
    for part, piece in zip(split.parts, pieces, strict=True):
        part.compress(product(*piece))
    dense = torch.cat([coefficient @ basis for basis, coefficient in pieces])
    torch.testing.assert_close(split(x), nn.functional.linear(x, dense, bias), rtol=0, atol=1e-5)


def test_a_single_part_gives_the_dense_output_to_the_last_bit():
    weight, bias, x = normal(D_OUT, D_IN), normal(D_OUT, seed=3), normal(4, D_IN, seed=1)
    split = SplitLinear([ShareLinear(weight)], bias)
    assert torch.equal(split(x), nn.functional.linear(x, weight) + bias)


def test_a_split_linear_shows_its_shape_its_bias_and_the_states_of_its_parts():
    split = split_in_three(normal(D_OUT, D_IN), normal(D_OUT))
    assert split.state == "original"
    said = "in_features=5, out_features=6, bias=True, state="
    assert split.extra_repr() == said + "original"
    split.parts[1].compress(product(*factors(d_out=2)))
    assert split.extra_repr() == said + "compressed+original"
    assert "rank=3" in repr(split)
    assert "bias=False" in split_in_three(normal(D_OUT, D_IN)).extra_repr()


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_are_views_of_the_original_weight(transposed):
    stored = normal(D_IN, D_OUT) if transposed else normal(D_OUT, D_IN)
    weight = stored.T if transposed else stored
    split = split_in_three(weight)
    x = normal(4, D_IN, seed=1)
    before = split(x)
    storages = {part.dense().untyped_storage().data_ptr() for part in split.parts}
    assert storages == {stored.untyped_storage().data_ptr()}
    stored.mul_(2)
    torch.testing.assert_close(split(x), 2 * before)


def test_the_original_storage_is_freed_with_the_last_part_and_not_before():
    memory = np.ones((D_OUT, D_IN), dtype=np.float32)
    alive = weakref.ref(memory)
    split = split_in_three(torch.from_numpy(memory))
    del memory
    for part in split.parts:
        gc.collect()
        assert alive() is not None
        part.compress(product(*factors(d_out=2)))
    gc.collect()
    assert alive() is None


def ten_that_share():
    basis, _ = factors()
    shared = nn.Parameter(basis, requires_grad=False)
    model = nn.ModuleList(original() for _ in range(10))
    for i, linear in enumerate(model):
        linear.compress(product(shared, normal(D_OUT, RANK, seed=i)))
    return model


def as_it_is(model):
    return model


def in_bfloat16(model):
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("treated", [as_it_is, in_bfloat16, copy.deepcopy])
def test_a_basis_that_ten_share_is_one_storage_and_counts_once(treated):
    model = treated(ten_that_share())
    bases = {id(linear.form.basis) for linear in model}
    storages = {linear.form.basis.untyped_storage().data_ptr() for linear in model}
    assert len(bases) == len(storages) == 1
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers == RANK * D_IN + 10 * D_OUT * RANK
    assert len({linear.form.coefficient.untyped_storage().data_ptr() for linear in model}) == 10


def test_a_copy_has_a_basis_of_its_own():
    model = ten_that_share()
    twin = copy.deepcopy(model)
    before = model[0].form.basis.clone()
    twin[3].form.basis.zero_()
    assert torch.equal(model[0].form.basis, before)
    assert not twin[7].form.basis.any()


def test_a_basis_given_as_a_plain_tensor_is_not_copied_either():
    linear, (basis, coefficient) = original(), factors()
    linear.compress(product(basis, coefficient))
    assert linear.form.basis.data_ptr() == basis.data_ptr()
    assert linear.form.coefficient.data_ptr() == coefficient.data_ptr()


def test_a_state_dict_of_compressed_parts_restores_what_they_compute():
    split, twin = (split_in_three(normal(D_OUT, D_IN), normal(D_OUT)) for _ in range(2))
    for i, (part, other) in enumerate(zip(split.parts, twin.parts, strict=True)):
        part.compress(product(*factors(seed=i, d_out=2)))
        other.compress(product(*factors(seed=50 + i, d_out=2)))
    x = normal(4, D_IN)
    assert not torch.equal(twin(x), split(x))
    twin.load_state_dict(split.state_dict())
    assert torch.equal(twin(x), split(x))
