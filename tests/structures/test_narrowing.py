"""MLPs with fewer neurons, from the moments to a model that runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import Calibrate, Calibrated, fit_settings, maker
from conftest import MakeSettings, random_model, rows_left
from small_pipeline import MakeSmallModel, tokens
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.phi3 import modeling_phi3

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import split_selected
from sharebasis.compressed.edits import PrunedNeurons
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.model.classify import classify_model
from sharebasis.model.hooks import watched
from sharebasis.model.hub import load_config, load_model
from sharebasis.residual.cache import run_with_cache
from sharebasis.residual.head_views import head_views
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.fit.tables import ranks_csv
from sharebasis.stages.recover.outcome import Recovery
from sharebasis.stages.recover.recover import write_recovered
from sharebasis.stages.recover.trainable import named_parameters, trainable
from sharebasis.structures.mlps import find_mlps
from sharebasis.structures.neurons import Neurons

CPU = torch.device("cpu")


@pytest.fixture
def calibrated(small_model: MakeSmallModel, tmp_path: Path) -> Calibrate:
    return maker(small_model, tmp_path)


OWN = {"structures": ["private", "neurons"]}


def _settings(make_settings: MakeSettings, **changes: Any) -> FitSettings:
    return fit_settings(make_settings, **{**OWN, **changes})


class Turns(nn.Module):
    """An MLP of which rows of gate and of up take turns, with biases."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        return self.down_proj(both[..., 1::2] * functional.silu(both[..., ::2]))


@pytest.fixture
def taking_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3 with another MLP, which its row of the table tells."""
    monkeypatch.setattr(modeling_phi3, "Phi3MLP", Turns)
    row = ARCHITECTURES["phi3"]
    own = replace(row.weight_types["mlp_gate_up_proj"], interleave="row")
    types = {**row.weight_types, "mlp_gate_up_proj": own}
    monkeypatch.setitem(ARCHITECTURES, "phi3", replace(row, weight_types=types))  # type: ignore[arg-type]


def _gate_and_up(mlp: nn.Module) -> Iterator[Tensor]:
    """Weights and biases of each."""
    for name, own in mlp.named_parameters():
        if isinstance(mlp, Turns) and "gate_up" in name:
            yield from (own[::2], own[1::2])
        elif "gate_up" in name:
            yield from own.chunk(2)
        elif "down" not in name:
            yield own


def _repeat_neurons(model: PreTrainedModel) -> None:
    """Every other neuron is the one before it again."""
    for layer in model.model.layers:
        for own in _gate_and_up(layer.mlp):
            own[1::2] = own[::2].clone()


def _assert_nothing_is_lost(
    run: Calibrated, split: SplitStrategy, make_settings: MakeSettings
) -> None:
    dense = load_model(run.weights, "float32", CPU)
    d_mlp = dense.config.intermediate_size
    fitted = run.fit(_settings(make_settings, removed=0.2), split=split)
    pruned = run.edits(PrunedNeurons)
    assert pruned
    for mlp in pruned:
        assert len(mlp.kept) >= d_mlp // 2
    metrics = fit_metrics(fitted, _settings(make_settings, removed=0.2))
    assert metrics["relative_loss"] < 1e-6
    assert 0.2 - 1e-9 <= metrics["removed_fraction"] < 0.22
    small = load_compressed(run.directory / "small")
    wanted = dense(input_ids=tokens(4, 1)).logits
    assert (small(input_ids=tokens(4, 1)).logits - wanted).abs().max() < 1e-3 * wanted.abs().max()


CASES: Sequence[tuple[str, SplitStrategy]] = [
    ("llama", "none"),
    ("glm4", "none"),
    ("phi3", "none"),
    ("phi3", "qkv"),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "split"), CASES)
def test_neurons_that_are_there_twice_go_and_nothing_is_lost(
    family: str, split: SplitStrategy, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    _assert_nothing_is_lost(calibrated(family, _repeat_neurons), split, make_settings)


@torch.no_grad()
@pytest.mark.parametrize("split", ["none", "qkv"])
def test_so_do_those_whose_gate_and_up_take_turns(
    split: SplitStrategy, taking_turns: None, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("phi3", _repeat_neurons, code="Turns")
    _assert_nothing_is_lost(run, split, make_settings)


def test_a_layout_that_the_code_does_not_have_is_left_alone(
    calibrated: Calibrate,
    make_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Phi-3's row of the table says halves."""
    monkeypatch.setattr(modeling_phi3, "Phi3MLP", Turns)
    run = calibrated("phi3", code="Turns, by the table of halves")
    run.fit(_settings(make_settings, removed=0.5))
    assert not run.cells(Neurons)
    assert "3 MLPs keep all their neurons" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("split", ["none", "qkv"])
def test_views_and_activations_know_what_is_left_of_gate_and_up(
    split: SplitStrategy, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("phi3")
    run.fit(_settings(make_settings, removed=0.6), split=split)
    small = load_compressed(run.directory / "small")
    narrowed = {int(mlp.down.split(".")[2]): mlp for mlp in run.edits(PrunedNeurons)}
    assert narrowed
    with watched({f"{i}": small.get_submodule(mlp.reads[0]) for i, mlp in narrowed.items()}) as xs:
        _, cache = run_with_cache(small, tokens(2))
    for i, mlp in narrowed.items():
        views, x, width = head_views(small)[i], xs[f"{i}"], len(mlp.kept)
        assert views.W_in.shape[1] == views.W_gate.shape[1] == width
        hidden = functional.silu(x @ views.W_gate) * (x @ views.W_in)
        for name, wanted in (("pre", x @ views.W_gate), ("post", hidden)):
            torch.testing.assert_close(cache[name, i], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_reported_losses_are_those_of_the_stored_weights(
    family: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated(family)
    settings = _settings(make_settings, removed=0.5, damping_inputs=0.0, damping_gradients=0.0)
    fitted = run.fit(settings)
    mlps = run.edits(PrunedNeurons)
    assert mlps
    dense = load_model(run.weights, "float32", CPU)
    small = load_compressed(run.directory / "small")
    losses = {one.group.parts[0].sublayer.name: one.loss for one in fitted.groups}
    for mlp in mlps:
        kept = list(mlp.kept)
        for name in (*mlp.reads, mlp.down):
            original = dense.get_submodule(name).weight.double()
            rows = rows_left(name, len(original), kept)
            if family == "gpt2":
                original = original.T
            stored = small.get_submodule(name).weight.double()
            gradient, inputs = run.moments.gradient(name), run.moments.read(run.moments.site(name))
            g = gradient.total / run.moments.n_tokens
            if name == mlp.down:
                error = original.clone()
                error[:, kept] -= stored
            else:
                error, g = original[rows] - stored, g[rows][:, rows]
            loss = (g @ error @ inputs.second * error).sum().item()
            scale = (g @ original[: len(g)] @ inputs.second * original[: len(g)]).sum().item()
            assert losses[name] == pytest.approx(loss, rel=1e-3, abs=1e-6 * scale)


def test_more_to_choose_from_never_loses_more_and_the_budget_is_exact(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    for removed in (0.3, 0.6):
        losses = []
        for structures in (["private"], ["private", "neurons"]):
            settings = _settings(make_settings, removed=removed, structures=structures)
            fitted = run.fit(settings)
            metrics = fit_metrics(fitted, settings)
            assert removed - 1e-9 <= metrics["removed_fraction"] < removed + 0.01
            losses.append(sum(one.loss for one in fitted.groups))
        assert losses[1] <= losses[0]


def test_the_table_of_ranks_says_how_many_neurons_are_left(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama", _repeat_neurons)
    table = ranks_csv(run.fit(_settings(make_settings, removed=0.2)))
    d_mlp = load_config(run.weights).intermediate_size
    left = {
        name: len(mlp.kept) / d_mlp
        for mlp in run.edits(PrunedNeurons)
        for name in (*mlp.reads, mlp.down)
    }
    assert left
    for row in csv.DictReader(io.StringIO(table)):
        name = f"model.layers.{row['layer']}.mlp.{row['family']}_proj"
        assert float(row["width"]) == pytest.approx(left.get(name, 1.0), rel=1e-5)


def test_limits_hold_for_what_is_narrowed(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    limits = [{"sublayers": "up", "floor": 0.8, "cap": 1.0}]
    exclude = [r".*layers\.0\.mlp\.down_proj"]
    settings = _settings(
        make_settings, removed=0.5, limits=limits, exclude=exclude, rank_multiple=4
    )
    fitted = run.fit(settings)
    narrowed = {
        one.group.parts[0].sublayer.layer
        for one in fitted.groups
        if one.group.structure == "neurons"
    }
    assert 0 not in narrowed
    for one in fitted.groups:
        if one.group.family == "up":
            assert one.n_stored >= 0.8 * one.n_original
    assert all(len(mlp.kept) % 4 == 0 for mlp in run.edits(PrunedNeurons))


def test_an_mlp_with_a_norm_among_its_neurons_is_left_alone() -> None:
    model = random_model("llama", 288)
    found = classify_model(model)
    groups = [Group((part,)) for part in split_selected(found, "none")]
    twins = {sublayer.name: () for sublayer in found.selected}
    shapes = {name: tuple(own.shape) for name, own in model.named_parameters()}
    d_mlp, n_layers = model.config.intermediate_size, model.config.num_hidden_layers
    assert len(find_mlps(groups, twins, shapes)) == n_layers
    normed = {**shapes, "model.layers.0.mlp.norm.weight": (d_mlp,)}
    assert len(find_mlps(groups, twins, normed)) == n_layers - 1
    shared = {**twins, "model.layers.1.mlp.up_proj": ("model.layers.2.mlp.up_proj",)}
    assert len(find_mlps(groups, shared, shapes)) == n_layers - 1


@pytest.mark.parametrize(
    ("family", "split"), [("llama", "none"), ("phi3", "none"), ("phi3", "qkv")]
)
def test_it_is_trained_and_written_again(
    family: str, split: SplitStrategy, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated(family)
    run.fit(_settings(make_settings, removed=0.6), split=split)
    small, target = run.directory / "small", run.directory / "recovered"
    model = open_compressed(small, torch.float32)
    index, edits = run.index(), run.edits(PrunedNeurons)
    forms = trainable(model)
    trained = dict(named_parameters(model, forms))
    narrowed = {name for mlp in edits for name in (*mlp.reads, mlp.down)}
    of_narrowed = [g for g in index.groups if g.parts[0].sublayer in narrowed]
    assert of_narrowed
    roles = "dense", "coefficient"
    of_parts = (part.tensors.items() for g in of_narrowed for part in g.parts)
    assert {name for own in of_parts for role, name in own if role in roles} <= trained.keys()
    with torch.no_grad():
        for own in trained.values():
            own.mul_(1.01)
        logits = model.model(input_ids=tokens(2)).logits
    write_recovered(target, small, index, forms, Recovery(1, 1, 1, ()), 10_000)
    again = load_compressed(target)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens(2)).logits, logits, rtol=0, atol=2e-4)
    assert run.edits(PrunedNeurons, "recovered") == edits


def test_the_spectra_say_what_every_width_loses(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    run.fit(_settings(make_settings, removed=0.4))
    cells = run.cells(Neurons)
    assert cells
    for cell in cells:
        losses = cell.read("losses").tolist()
        assert losses == sorted(losses)
        assert sorted(cell.read("neurons").tolist()) == list(range(cell.cell.d_mlp))
