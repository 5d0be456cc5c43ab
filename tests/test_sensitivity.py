"""What is measured is what theory and another road say, and what the allocation makes of it."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CORPUS, REPOSITORY, MakeDirectory, MakeSettings, contents, with_changes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.allocation.lagrangian import allocate
from sharebasis.allocation.loss_weights import group_weight, weigh
from sharebasis.allocation.sensitivity import UNWEIGHED, Sensitivity
from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import INDEX_FILE, CompressedIndex
from sharebasis.compressed.loader import linears_by_tensor, load_compressed
from sharebasis.config.analyse import SensitivitySettings
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.errors import CalibrationError
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record, save_record
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_model
from sharebasis.model.late_start import LateStart
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.spectra.store import Spectra
from sharebasis.stages.attribute.error_attribution import attribute
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.sensitivity.corrections import Cell, cells_of, corrections
from sharebasis.stages.sensitivity.draft import Draft, compressed, draft, wrap_parts
from sharebasis.stages.sensitivity.measure import measure_sensitivity
from sharebasis.stages.sensitivity.probes import probe
from sharebasis.structures.curve import Curve

CPU = torch.device("cpu")
WINDOWS = torch.randint(1, 280, (8, 24), generator=torch.Generator().manual_seed(0))
PROBES = SensitivitySettings("probes", 0.3, 3, 3, 24, 2, 1e6)
AUTO = {
    "fit.method": "auto",
    "fit.group_size": 1,
    "fit.shared": [],
    "fit.two_sided": True,
    "fit.allocation": "global",
    "fit.storage": "interpolative",
    "fit.removed": 0.3,
}

STRUCTURES = {
    "private": {},
    "narrowed": {"fit.structures": ["private", "narrowed"], "fit.removed": 0.5},
    "sparse": {"fit.structures": ["private", "sparse"]},
}


@dataclass(frozen=True)
class Case:
    """A small model, decomposed."""

    family: str
    weights: Path
    spectra: Path
    fit: FitSettings
    moments: MomentStore | None = None
    """For structures that are offered."""

    def load(self) -> PreTrainedModel:
        return load_model(self.weights, "float32", CPU)

    @property
    def found(self) -> Classification:
        return classify_model(self.load())

    def measure(
        self, own: SensitivitySettings = PROBES, removed: float | None = None, **changes: Any
    ) -> Sensitivity:
        own, budget = (
            replace(own, removed=removed or self.fit.removed),
            replace(self.fit, **changes),
        )
        models = self.weights, self.spectra, self.moments, self.found
        windows = WINDOWS[: own.windows]
        return measure_sensitivity(*models, windows, own, budget, "float32", self.scratch, CPU)

    @property
    def scratch(self) -> Path:
        return self.spectra.parent / "draft"

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        with draft(self.weights, self.spectra, self.moments, self.fit, self.scratch, CPU) as plan:
            yield plan
        assert not self.scratch.exists()


MakeCase = Callable[..., Case]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, make_case: MakeCase) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module", params=STRUCTURES)
def any_case(request: pytest.FixtureRequest, case: Case, make_case: MakeCase) -> Case:
    """Neurons may go in the second, entries in the third."""
    plain = request.param == "private"
    return case if plain else make_case(case.family, structure=request.param)


@pytest.fixture(scope="module")
def make_case(
    make_directory: MakeDirectory,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeCase:
    def make(family: str, structure: str = "private", split: SplitStrategy = "qkv") -> Case:
        target = tmp_path_factory.mktemp("case")
        return _case(family, structure, split, make_directory(family), target, make_settings)

    return make


def _case(
    family: str,
    structure: str,
    split: SplitStrategy,
    weights: Path,
    target: Path,
    make_settings: MakeSettings,
) -> Case:
    model = load_model(weights, "float32", CPU)
    found = classify_model(model)
    checkpoint = Checkpoint(target / "checkpoint", {}, math.inf)
    write_moments(
        target / "moments", *calibrate(model, found.selected, WINDOWS, 4, checkpoint, "text")
    )
    own = make_settings({**AUTO, **STRUCTURES[structure]}).fit
    parts, moments = split_selected(found, split), MomentStore(target / "moments")
    decompose(weights, parts, moments, own, target / "spectra", CPU)
    return Case(family, weights, target / "spectra", own, moments)


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor = WINDOWS[:3]) -> Tensor:
    return model(input_ids=windows).logits[:, :-1]


# What is measured


def _divergence_of(case: Case, directory: Path, groups: Sequence[int]) -> float:
    """By torch's own divergence, from a model whose weights are written over by hand."""
    model = case.load()
    original, small = _logits(model), load_compressed(directory)
    index = load_record(directory / INDEX_FILE, CompressedIndex)
    linears = linears_by_tensor(small, index)
    with torch.no_grad():
        for i in groups:
            (part,) = index.groups[i].parts
            module: Any = model.get_submodule(part.sublayer)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            new = linears[part.coefficient].dense()
            kept = [list(mlp.kept) for mlp in index.mlps if part.sublayer in mlp.reads]
            columns = [list(mlp.kept) for mlp in index.mlps if part.sublayer == mlp.down]
            if columns:
                weight[:] = 0
                weight[:, columns[0]] = new
            else:
                weight[kept[0] if kept else part.rows.numbers] = new
    p, q = (x.flatten(0, 1).double().log_softmax(-1) for x in (original, _logits(model)))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True).item()


def test_a_probe_is_the_divergence_of_the_model_with_one_cell_compressed(
    any_case: Case, tmp_path: Path
) -> None:
    case = any_case
    fit(case.weights, case.spectra, case.fit, tmp_path / "small", CPU, case.moments)
    model = case.load()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with case.draft() as plan:
        cells = cells_of(plan.groups, 3, lambda group: group.family)
        linears = wrap_parts(model, Spectra(case.spectra))
        found = probe(model, linears, plan, cells, WINDOWS[:3], 2, case.found.blocks)
    expected = [_divergence_of(case, tmp_path / "small", cell.groups) for cell in cells]
    assert max(expected) > 1e-3
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    # Afterwards it is the model that it was.
    assert torch.equal(_logits(model), _logits(case.load()))
    assert all(torch.equal(before[name], own) for name, own in case.load().state_dict().items())


def test_with_all_cells_in_place_it_is_the_compressed_model(any_case: Case, tmp_path: Path) -> None:
    case, model = any_case, any_case.load()
    fit(case.weights, case.spectra, case.fit, tmp_path / "small", CPU, case.moments)
    index = load_record(tmp_path / "small" / INDEX_FILE, CompressedIndex)
    assert bool(index.mlps) == ("narrowed" in case.fit.structures)
    masks = [part.mask for group in index.groups for part in group.parts if part.mask]
    assert bool(masks) == ("sparse" in case.fit.structures)
    linears = wrap_parts(model, Spectra(case.spectra))
    with case.draft() as plan, compressed(linears, plan, range(len(plan.groups))):
        found = _logits(model)
    wanted = _logits(load_compressed(tmp_path / "small"))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (_logits(model) - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("split", ["none", "qkv"])
def test_so_it_is_where_gate_and_up_are_one_weight(
    split: SplitStrategy, make_case: MakeCase, tmp_path: Path
) -> None:
    case = make_case("phi3", structure="narrowed", split=split)
    test_with_all_cells_in_place_it_is_the_compressed_model(case, tmp_path)


def test_where_the_loss_is_small_half_of_it_is_the_divergence(
    make_directory: MakeDirectory, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Labels drawn by the model, many of them: the Fisher information is the curvature.

    What is left is what K-FAC neglects; without the half, or the count of tokens, it would be
    off by 2 and more.
    """
    weights = make_directory("llama")
    model = load_model(weights, "float32", CPU)
    found = classify_model(model)
    never = Checkpoint(tmp_path / "checkpoint", {}, math.inf)
    windows = torch.randint(1, 280, (256, 24), generator=torch.Generator().manual_seed(5))
    write_moments(tmp_path / "m", *calibrate(model, found.selected, windows, 32, never, "model"))
    own = replace(make_settings(AUTO).fit, removed=0.02, damping_gradients=0.0)
    parts, moments = split_selected(found, "none"), MomentStore(tmp_path / "m")
    decompose(weights, parts, moments, own, tmp_path / "spectra", CPU)
    sensing = replace(PROBES, removed=0.02, runs=1, windows=16, batch=16)
    models = weights, tmp_path / "spectra", moments, found
    scratch = tmp_path / "draft"
    one = measure_sensitivity(*models, windows[:16], sensing, own, "float32", scratch, CPU)
    assert one.ratio == pytest.approx(1.0, abs=0.35)


def _scaled(case: Case, target: Path, groups: set[int], factor: float) -> Case:
    """The same with wrong energies of some groups."""
    target.mkdir()
    for path in case.spectra.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for i in groups:
                if f"{i}.energies" in tensors:
                    tensors[f"{i}.energies"] = factor * tensors[f"{i}.energies"]
            save_file(tensors, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return replace(case, spectra=target)


@pytest.mark.parametrize("by", ["probes", "attribution"])
def test_a_cell_whose_prediction_is_wrong_by_a_factor_gets_that_factor_back(
    case: Case, by: Any, tmp_path: Path
) -> None:
    # Uniform ranks are the same whatever was predicted, and so is what is measured.
    own, uniform = replace(PROBES, by=by), {"allocation": "uniform", "removed": 0.4}
    right = case.measure(own, **uniform)
    groups = Spectra(case.spectra).groups
    wrong_cell = max((one for one in right.cells if one.weight > 1e-6), key=lambda x: x.measured)
    kind = {"attn": "qkvo", "mlp": ("gate", "up", "down")}
    families = kind.get(wrong_cell.kind, (wrong_cell.kind,))
    wrong = {
        i
        for i, group in enumerate(groups)
        if group.family in families and group.parts[0].sublayer.layer == wrong_cell.layers[0]
    }
    assert len(wrong) == wrong_cell.n_groups
    other = _scaled(case, tmp_path / "wrong", wrong, 7.0)
    found = other.measure(own, **uniform)
    for i, group in enumerate(groups):
        change = (
            group_weight(right, group) * right.ratio / (group_weight(found, group) * found.ratio)
        )
        assert change == pytest.approx(7.0 if i in wrong else 1.0, rel=1e-4)
    # With its factor back, the allocation is what it would have been.
    true, planted = Spectra(case.spectra).energies(), Spectra(other.spectra).energies()
    expected = [right.ratio * own for own in weigh(right, groups, true)]
    for one, other_one in zip(expected, weigh(found, groups, planted), strict=True):
        np.testing.assert_allclose(found.ratio * other_one, one, rtol=1e-4)


def test_attribution_counts_every_part_once_and_measures_what_attribute_says(case: Case) -> None:
    sensing = replace(PROBES, by="attribution")
    found = case.measure(sensing)
    original, other = case.load(), case.load()
    linears = wrap_parts(other, Spectra(case.spectra))
    with case.draft() as plan, compressed(linears, plan, range(len(plan.groups))):
        result = attribute(original, other, WINDOWS[:3])
    made = {(kind, i): 0.0 for kind in ("attn", "mlp") for i in range(3)}
    for one in result.components:
        if one.layer is not None:
            kind = "mlp" if one.label.endswith("MLP") else "attn"
            made[kind, one.layer] += one.own_error["kl"]
    assert {(one.kind, one.layers[0]): one.measured for one in found.cells} == pytest.approx(
        made, rel=1e-3, abs=1e-6
    )
    assert sum(one.n_groups for one in found.cells) == len(plan.groups)
    assert {part.name for group in plan.groups for part in group.parts} == set(found.parts)
    assert sum(one.predicted for one in found.cells) == pytest.approx(sum(plan.losses) / 2)


# Starting a pass later


def test_a_pass_can_start_at_every_block_of_a_plain_stack(case: Case) -> None:
    model = case.load()
    late = LateStart(model, case.found.blocks)
    assert late.exact({0, 1, 2}, lambda: _logits(model)) == {1, 2}
    whole, outputs = late.record({1, 2}, lambda: _logits(model))
    with late.start_at(2, outputs):  # the first blocks do not run, whatever they are given
        assert torch.equal(_logits(model, WINDOWS[3:6]), whole)
    assert torch.equal(_logits(model), whole)
    assert not torch.equal(_logits(model, WINDOWS[3:6]), whole)


class _Remembering(nn.Module):
    """A block that leaves something for a later one."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.linear, self.asks = nn.Linear(4, 4), asks

    def forward(self, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.linear(x) + (memory["first"] if self.asks else 0)
        memory.setdefault("first", y)
        return y


def test_no_pass_starts_where_a_later_block_asks_for_what_an_earlier_one_left() -> None:
    blocks = nn.ModuleList([_Remembering(i == 2) for i in range(4)])
    x = torch.randn(2, 4)

    def run() -> Tensor:
        memory: dict[str, Tensor] = {}
        y = x
        for block in blocks:
            y = block(y, memory)
        return y

    late = LateStart(blocks, {i: str(i) for i in range(4)})
    assert late.exact({1, 2, 3}, run) == {3}
    assert torch.equal(run(), run())


# From losses to weights


def _cells(n: int) -> list[Cell]:
    return [Cell("q", (i, i), (i,)) for i in range(n)]


def test_weights_are_ratios_to_the_ratio_of_the_sums() -> None:
    losses, ratio = corrections(_cells(3), [1.0, 2.0, 1.0], [1.0, 1.0, 4.0], 100.0)
    assert ratio == 1.5
    assert [one.weight for one in losses] == pytest.approx([1 / 1.5, 0.5 / 1.5, 4 / 1.5])


def test_weights_are_clipped_and_a_cell_that_loses_nothing_has_weight_1() -> None:
    losses, ratio = corrections(_cells(4), [1.0, 1.0, 0.0, 8.0], [100.0, -1.0, 3.0, 8.0], 4.0)
    assert ratio == 10.7
    assert [one.weight for one in losses] == pytest.approx([4.0, 0.25, 1.0, 0.25])


@pytest.mark.parametrize(
    ("predicted", "measured"), [([0.0], [1.0]), ([1.0], [0.0]), ([1.0], [math.nan])]
)
def test_a_draft_that_loses_nothing_gives_no_weights(
    predicted: list[float], measured: list[float]
) -> None:
    with pytest.raises(CalibrationError, match=r"Raise sensitivity\.removed"):
        corrections(_cells(1), predicted, measured, 4.0)


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_cells_hold_every_group_once_in_runs_of_neighbours(case: Case, runs: int) -> None:
    groups = Spectra(case.spectra).groups
    cells = cells_of(groups, runs, lambda group: group.family)
    assert sorted(i for cell in cells for i in cell.groups) == list(range(len(groups)))
    for cell in cells:
        for i in cell.groups:
            assert groups[i].family == cell.kind
            assert cell.layers[0] <= groups[i].parts[0].sublayer.layer <= cell.layers[1]
    covered = sorted({cell.layers for cell in cells})
    assert len(covered) == min(runs, 3)
    assert [layer for a, b in covered for layer in range(a, b + 1)] == [0, 1, 2]


# What the allocation makes of them


def _ones(case: Case) -> Sensitivity:
    names = {part.name for group in Spectra(case.spectra).groups for part in group.parts}
    return replace(UNWEIGHED, by="probes", parts=dict.fromkeys(names, 1.0))


def test_weights_of_1_and_none_at_all_give_the_same_bytes(case: Case, tmp_path: Path) -> None:
    found = []
    for i, own in enumerate([(), (UNWEIGHED,), (_ones(case),)]):
        target = tmp_path / str(i)
        fitted = fit(case.weights, case.spectra, case.fit, target, CPU, None, *own)
        found.append((contents(target), [one.rank for one in fitted.groups]))
    assert found[0] == found[1] == found[2]


def test_the_allocation_minimises_the_weighed_loss_and_reports_both(
    case: Case, tmp_path: Path
) -> None:
    sensitivity = case.measure(replace(PROBES, clip=4.0))
    weights = [one.weight for one in sensitivity.cells]
    assert 0.25 <= min(weights) < 0.9 < 1.1 < max(weights) <= 4
    metrics = []
    for own in (UNWEIGHED, sensitivity):
        fitted = fit(case.weights, case.spectra, case.fit, tmp_path / "compressed", CPU, None, own)
        metrics.append(fit_metrics(fitted, case.fit))
    plain, weighed = metrics
    assert plain["sensitivity"]["by"] == "none"
    assert plain["sensitivity"]["relative_weighed_loss"] == plain["relative_loss"]
    assert weighed["sensitivity"]["by"] == "probes"
    assert weighed["sensitivity"]["max_weight"] == pytest.approx(max(weights))
    assert weighed["relative_loss"] > plain["relative_loss"]  # that one was the least there is
    groups, energies = Spectra(case.spectra).groups, Spectra(case.spectra).energies()
    with case.draft() as unweighed:
        pairs = zip(unweighed.groups, unweighed.losses, strict=True)
        of_plain = sum(group_weight(sensitivity, group) * loss for group, loss in pairs)
    of_plain /= sum(own.sum() for own in weigh(sensitivity, groups, energies))
    assert weighed["sensitivity"]["relative_weighed_loss"] < of_plain
    assert load_compressed(tmp_path / "compressed")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    which=st.integers(0, 7),
    factor=st.floats(1, 50),
    removed=st.floats(0.1, 0.6),
)
def test_a_larger_weight_never_lowers_what_is_kept(
    seed: int, which: int, factor: float, removed: float
) -> None:
    generator = np.random.default_rng(seed)
    curves = []
    for i in range(8):
        energies = np.sort(generator.exponential(size=24))[::-1] * generator.uniform(0.1, 10)
        ranks = np.arange(1, 25)
        stored = np.append(ranks * (24 + 40 - ranks) + ranks, 24 * 40)
        tails = np.append(np.cumsum(energies[::-1])[::-1][1:], [0.0, 0.0])
        curves.append(Curve(str(i), stored, tails))
    before = allocate(curves, removed)[which]
    curves[which] = replace(curves[which], loss=factor * curves[which].loss)
    after = allocate(curves, removed)[which]
    assert curves[which].stored[after] >= curves[which].stored[before]


# The stage


def test_the_stage_writes_weights_that_fit_reads(
    case: Case, make_settings: MakeSettings, params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("artifacts").mkdir()
    Path("artifacts/weights").symlink_to(case.weights)
    Path("artifacts/spectra").symlink_to(case.spectra)
    Path("artifacts/moments").symlink_to(case.spectra.parent / "moments")
    save_record(Path("artifacts/sublayers.json"), case.found)
    Path("text.txt").write_text(CORPUS)
    ranges = []
    for by in ("none", "probes", "attribution"):
        changes = {
            **AUTO,
            "sensitivity.by": by,
            "sensitivity.windows": 3,
            "sensitivity.window": 16,
            "sensitivity.clip": 2.0,
            "data.source": "files",
            "data.calibration.path": "text.txt",
            "data.evaluation.path": "nowhere.txt",  # never read
            "device": "cpu",
        }
        Path("params.yaml").write_text(yaml.safe_dump(with_changes(params, changes)))
        for stage in ("sensitivity", "fit"):
            runpy.run_path(str(REPOSITORY / "stages" / f"{stage}.py"), run_name="__main__")
        metrics = json.loads(Path("metrics/fit.json").read_text())["sensitivity"]
        assert metrics["by"] == json.loads(Path("artifacts/sensitivity.json").read_text())["by"]
        assert metrics["by"] == by
        ranges.append((metrics["min_weight"], metrics["max_weight"]))
    assert ranges[0] == (1.0, 1.0)
    assert all(0.5 - 1e-9 <= low < 1 < high <= 2 + 1e-9 for low, high in ranges[1:])
