"""The loss of two sides: moments of gradients, factors that are best in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from calibrated import fit_settings, maker
from conftest import MakeDirectory, MakeSettings
from low_rank_fits import fit_rank, problems_of
from small_pipeline import MakeSmallModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Sublayer
from sharebasis.config.types import Labels
from sharebasis.errors import CalibrationError
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.low_rank import decompose
from sharebasis.linalg.moments import Moment
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate

CPU = torch.device("cpu")
WINDOWS = torch.randint(1, 280, (6, 12), generator=torch.Generator().manual_seed(0))


def _moment(d: int, seed: int, n_tokens: int = 200) -> Moment:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(d, d, dtype=torch.float64, generator=generator)
    return Moment(x.T @ x, x.sum(0), n_tokens, f"site{seed}")


def _weights(*d_outs: int, d_in: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(d_out, d_in, generator=generator) for d_out in d_outs]


def _loss(errors: Sequence[Tensor], moment: Moment, gradients: Sequence[Moment]) -> float:
    pairs = zip(errors, gradients, strict=True)
    return sum(torch.trace(g.second @ e @ moment.second @ e.T).item() for e, g in pairs)


@pytest.mark.parametrize("case", [((4, 5), 16), ((8, 14, 5), 18)], ids=["small", "large"])
def test_a_group_has_no_more_directions_than_its_stacked_weight(
    case: tuple[tuple[int, ...], int],
) -> None:
    d_outs, d_in = case
    weights, gradients = _weights(*d_outs, d_in=d_in), [_moment(d, d).damped(1.0) for d in d_outs]
    spectrum = decompose(problems_of(weights, None, gradients))
    assert len(spectrum.energies) == min(sum(d_outs), d_in)
    torch.testing.assert_close(
        spectrum.coefficient @ spectrum.basis, torch.cat(weights).double(), rtol=0, atol=1e-8
    )


CASES = {"wide": ((12,), 20), "tall": ((30,), 16), "group": ((8, 14, 5), 18), "small": ((4, 5), 16)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reported_loss_is_that_of_the_product_at_every_rank(
    case: tuple[tuple[int, ...], int],
) -> None:
    d_outs, d_in = case
    weights, moment = _weights(*d_outs, d_in=d_in), _moment(d_in, 1)
    gradients = [_moment(d, 2 + i) for i, d in enumerate(d_outs)]
    spectrum = decompose(problems_of(weights, moment, gradients))
    assert len(spectrum.energies) == min(sum(d_outs), d_in)
    assert (spectrum.energies.diff() <= 0).all()
    stacked = torch.cat(weights).double()
    for rank in range(1, len(spectrum.energies) + 1):
        errors = stacked - spectrum.coefficient[:, :rank] @ spectrum.basis[:rank]
        loss = _loss(errors.split(d_outs), moment, gradients)
        predicted = spectrum.energies[rank:].sum().item()
        assert loss == pytest.approx(predicted, rel=1e-7, abs=1e-9 * spectrum.energies.sum().item())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_neighbour_of_the_factors_is_better(case: tuple[tuple[int, ...], int]) -> None:
    d_outs, d_in = case
    weights, moment = _weights(*d_outs, d_in=d_in), _moment(d_in, 1)
    gradients = [_moment(d, 2 + i) for i, d in enumerate(d_outs)]
    fitted = fit_rank(weights, moment, 3, gradients)
    generator = torch.Generator().manual_seed(5)
    for size in (1e-1, 1e-2, 1e-3):
        basis = fitted.basis * (1 + size * torch.randn(3, d_in, generator=generator))
        errors = [w - a @ basis for w, a in zip(weights, fitted.coefficients, strict=True)]
        assert _loss(errors, moment, gradients) > fitted.loss


def test_it_beats_the_loss_of_one_side_in_its_own_metric() -> None:
    weights, moment, gradient = _weights(30, d_in=16), _moment(16, 1), _moment(30, 2)
    two, one = (fit_rank(weights, moment, 5, gradients) for gradients in ([gradient], None))
    losses = [
        _loss([weights[0] - fit.coefficients[0] @ fit.basis], moment, [gradient])
        for fit in (two, one)
    ]
    assert losses[0] < 0.9 * losses[1]


def test_an_identity_moment_of_gradients_changes_nothing() -> None:
    weights, moment = _weights(30, d_in=16), _moment(16, 1)
    eye = Moment(torch.eye(30, dtype=torch.float64), torch.zeros(30).double(), 1, "eye")
    two, one = (fit_rank(weights, moment, 5, gradients) for gradients in ([eye], None))
    assert two.loss == pytest.approx(one.loss, rel=1e-10)
    torch.testing.assert_close(
        two.coefficients[0] @ two.basis, one.coefficients[0] @ one.basis, rtol=0, atol=1e-9
    )


# Gathering


def _calibrated(
    directory: Path, tmp_path: Path, labels: Labels, batch: int = 3, seed: int = 0
) -> tuple[MomentStore, tuple[Sublayer, ...]]:
    model = load_model(directory, "float32", CPU)
    selected = classify_model(model).selected
    checkpoint = Checkpoint(tmp_path / "checkpoint", {}, math.inf)
    found = calibrate(model, selected, WINDOWS, batch, checkpoint, labels, seed=seed)
    write_moments(tmp_path / "moments", *found)
    return MomentStore(tmp_path / "moments"), selected


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bloom", "olmo2"])
def test_gradients_are_those_that_autograd_gives_the_outputs(
    family: str, make_directory: MakeDirectory, tmp_path: Path
) -> None:
    directory = make_directory(family)
    moments, selected = _calibrated(directory, tmp_path, "text")
    model = load_model(directory, "float32", CPU)
    shifts: dict[str, Tensor] = {}

    def add_zero(name: str):
        def hook(_module: object, _args: object, output: Tensor) -> Tensor:
            shifts[name] = torch.zeros_like(output, requires_grad=True)
            return output + shifts[name]  # a leaf, which nobody changes in place

        return hook

    for sublayer in selected:
        model.get_submodule(sublayer.name).register_forward_hook(add_zero(sublayer.name))
    logits = model(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
    cross_entropy(logits, WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    for sublayer in selected:
        gradient = shifts[sublayer.name].grad
        assert gradient is not None
        rows = gradient.flatten(0, -2).double()
        moment = moments.gradient(sublayer.name)
        assert moment.n_tokens == WINDOWS.numel()
        scale = (rows.T @ rows).abs().max().item()
        torch.testing.assert_close(moment.total, rows.T @ rows, rtol=0, atol=1e-5 * scale)


def test_inputs_have_the_same_moments_with_gradients_as_without(
    llama_directory: Path, tmp_path: Path
) -> None:
    with_them, selected = _calibrated(llama_directory, tmp_path, "text")
    model = load_model(llama_directory, "float32", CPU)
    checkpoint = Checkpoint(tmp_path / "checkpoint", {}, math.inf)
    write_moments(tmp_path / "without", *calibrate(model, selected, WINDOWS, 3, checkpoint))
    without = MomentStore(tmp_path / "without")
    for sublayer in selected:
        one, other = (store.read(store.site(sublayer.name)) for store in (with_them, without))
        torch.testing.assert_close(one.total, other.total, rtol=1e-4, atol=1e-4)
    with pytest.raises(CalibrationError, match=r"calibrate\.gradients=model"):
        without.gradient(selected[0].name)


def test_labels_of_the_model_are_drawn_by_the_seed_and_are_not_those_of_the_text(
    llama_directory: Path, tmp_path: Path
) -> None:
    one, selected = _calibrated(llama_directory, tmp_path / "1", "model")
    again, _ = _calibrated(llama_directory, tmp_path / "2", "model")
    others, _ = _calibrated(llama_directory, tmp_path / "3", "model", seed=1)
    text, _ = _calibrated(llama_directory, tmp_path / "4", "text")
    name = selected[0].name
    assert torch.equal(one.gradient(name).total, again.gradient(name).total)
    for other in (others, text):
        assert not torch.allclose(one.gradient(name).total, other.gradient(name).total, rtol=1e-2)
        torch.testing.assert_close(one.read(name).total, other.read(name).total)


def test_logits_that_are_no_numbers_are_one_error(llama_directory: Path, tmp_path: Path) -> None:
    model = load_model(llama_directory, "float32", CPU)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.inf
    selected = classify_model(model).selected
    checkpoint = Checkpoint(tmp_path / "checkpoint", {}, math.inf)
    with pytest.raises(CalibrationError, match=r"logits are NaN .* model\.dtype=float32"):
        calibrate(model, selected, WINDOWS, 3, checkpoint, "model")


def test_what_no_loss_depends_on_costs_next_to_nothing(
    small_model: MakeSmallModel, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Behind what puts out zeros alone, as in blocks that were added to a trained model."""

    def silence(model: PreTrainedModel) -> None:
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.zero_()

    case = maker(small_model, tmp_path)("llama", silence)
    for structures in (["private"], ["private", "neurons", "sparse", "joint"]):
        fitted = case.fit(fit_settings(make_settings, structures=structures, removed=0.3))
        silent = [
            own
            for own in fitted.groups
            if all(
                part.sublayer.name.startswith("model.layers.1.self_attn")
                for part in own.group.parts
            )
        ]
        assert sum(len(own.group.parts) for own in silent) == 4
        assert sum(own.loss for own in silent) < 1e-12 * sum(own.loss for own in fitted.groups)
        assert sum(own.n_stored for own in silent) < 0.5 * sum(own.n_original for own in silent)
