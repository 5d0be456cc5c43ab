"""On a GPU every stage that uses one gives what it gives on a CPU, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from conftest import MakeSettings
from propagating import AUTO, NARROWED, products
from transformers import PreTrainedModel

from sharebasis.allocation.sensitivity import UNWEIGHED, Sensitivity
from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.config.analyse import SensitivitySettings
from sharebasis.config.schema import Settings
from sharebasis.forms.masked import Masked
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.spectra.store import Spectra
from sharebasis.stages.attribute.error_attribution import attribute
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.curve.curve import measure_curve
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel
from sharebasis.stages.propagate.outcome import Propagation
from sharebasis.stages.propagate.propagate import propagate
from sharebasis.stages.recover.outcome import Recovery
from sharebasis.stages.recover.recover import recover
from sharebasis.stages.sensitivity.measure import measure_sensitivity
from sharebasis.stages.verify.verify import compare, lossless_difference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

WINDOWS = torch.randint(0, 256, (20, 16), generator=torch.Generator().manual_seed(1))
SENSITIVITY = SensitivitySettings("probes", 0.2, 2, 4, 16, 2, 10.0)


@dataclass(frozen=True)
class Pipeline:
    """Its stages on a device, in a directory of its own, each on what the one before it left."""

    work: Path
    settings: Settings
    device: torch.device

    @property
    def never(self) -> Checkpoint:
        return Checkpoint(self.work / "checkpoint", {}, math.inf)

    @property
    def original(self) -> PreTrainedModel:
        return load_model(self.work / "weights", "float32", self.device)

    @property
    def classification(self) -> Classification:
        return classify_model(meta_model(load_config(self.work / "weights")))

    @cached_property
    def moments(self) -> MomentStore:
        sublayers = self.classification.selected
        found = calibrate(self.original, sublayers, WINDOWS, 4, self.never, "text")
        write_moments(self.work / "moments", *found)
        return MomentStore(self.work / "moments")

    @cached_property
    def spectra(self) -> Path:
        parts, target = split_selected(self.classification, "none"), self.work / "spectra"
        artefacts = self.work / "weights", self.classification, parts, self.moments
        decompose(*artefacts, self.settings.fit, target, self.device)
        return target

    @cached_property
    def sensitivity(self) -> Sensitivity:
        artefacts = self.work / "weights", self.spectra, self.moments, self.classification
        own, draft = (SENSITIVITY, self.settings.fit, "float32"), self.work / "draft"
        return measure_sensitivity(*artefacts, WINDOWS[:4], *own, draft, self.device)

    @cached_property
    def fitted(self) -> FittedModel:
        models = self.work / "weights", self.spectra, self.settings.fit, self.work / "compressed"
        return fit(*models, self.device, self.moments, UNWEIGHED)

    @cached_property
    def propagation(self) -> Propagation:
        models = self.work / "weights", self.classification, self.compressed, self.moments
        own, target = (self.settings.propagate, self.settings.fit), self.work / "propagated"
        return propagate(*models, WINDOWS, *own, self.never, target, self.device)

    @cached_property
    def recovery(self) -> Recovery:
        own, target = replace(self.settings.recover, dtype="float32"), self.work / "recovered"
        models, last = (self.work / "weights", self.compressed), (10_000, self.device)
        return recover(*models, WINDOWS, own, 0, self.never, target, *last)

    @property
    def compressed(self) -> Path:
        assert self.fitted
        return self.work / "compressed"

    def load(self) -> PreTrainedModel:
        return load_compressed(self.compressed, device=self.device)


Pair = tuple[Pipeline, Pipeline]
"""On a CPU and on a GPU."""
MakePair = Callable[[Mapping[str, object]], Pair]


@pytest.fixture(scope="module")
def make_pair(
    tmp_path_factory: pytest.TempPathFactory, llama_directory: Path, make_settings: MakeSettings
) -> MakePair:
    changes = {
        "propagate.stream": 0.5,
        "propagate.held_out": 4,
        "propagate.windows": 16,
        "recover.steps": 6,
        "recover.batch": 2,
        "recover.window": 16,
        "recover.windows": 16,
        "recover.held_out": 4,
        "recover.look_every": 3,
        "recover.learning_rate": 0.01,
    }

    def make(others: Mapping[str, object] = {}) -> Pair:
        settings = make_settings({**AUTO, **NARROWED, **changes, **others})
        pipelines = []
        for device in ("cpu", "cuda"):
            work = tmp_path_factory.mktemp(device)
            extract(find_source(str(llama_directory)), work / "weights")
            pipelines.append(Pipeline(work, settings, torch.device(device)))
        cpu, gpu = pipelines
        return cpu, gpu

    return make


@pytest.fixture(scope="module")
def pair(make_pair: MakePair) -> Pair:
    return make_pair({})


def test_moments(pair: Pair) -> None:
    cpu, gpu = (one.moments for one in pair)
    for sublayer in pair[0].classification.selected:
        for one, other in (
            (cpu.read(cpu.site(sublayer.name)), gpu.read(gpu.site(sublayer.name))),
            (cpu.gradient(sublayer.name), gpu.gradient(sublayer.name)),
        ):
            assert one.n_tokens == other.n_tokens
            difference = (one.total - other.total).norm()
            assert difference < 1e-4 * one.total.norm()


def test_drawn_tokens_give_moments_too(pair: Pair) -> None:
    """Others than on a CPU, as generators are."""
    _, gpu = pair
    sublayers = gpu.classification.selected
    _, found = calibrate(gpu.original, sublayers, WINDOWS, 4, gpu.never, "model")
    assert all(one.moment().total.trace() > 0 for one in found.values())


def test_spectra(pair: Pair) -> None:
    cpu, gpu = (Spectra(one.spectra).energies for one in pair)
    assert gpu.keys() == cpu.keys()
    for number, energies in cpu.items():
        assert abs(energies - gpu[number]).max() < 1e-3 * energies.max()


def test_structures_that_share(make_pair: MakePair) -> None:
    changes = {"fit.structures": ["private", "joint", "shared:2"], "fit.shared": ["k", "v", "o"]}
    cpu, gpu = make_pair(changes)
    losses = [sum(group.loss for group in one.fitted.groups) for one in (cpu, gpu)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_weights_that_lack_entries(make_pair: MakePair) -> None:
    pair = make_pair({"fit.structures": ["private", "sparse"], "fit.removed": 0.3})
    losses = [sum(group.loss for group in one.fitted.groups) for one in pair]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    _, gpu = pair
    assert any(group.group.structure == "sparse" for group in gpu.fitted.groups)
    assert gpu.recovery.looks[-1].divergence < gpu.recovery.looks[0].divergence
    recovered = open_compressed(gpu.work / "recovered", device=gpu.device)
    fitted = open_compressed(gpu.compressed, device=gpu.device)
    for group in fitted.index.groups:
        form = fitted.stored(group)
        if isinstance(form, Masked):
            (linear,) = recovered.linears(group)
            assert (linear.dense()[~form.kept] == 0).all()


def test_what_is_fitted(pair: Pair) -> None:
    cpu, gpu = pair
    stored = [sum(group.n_stored for group in one.fitted.groups) for one in pair]
    losses = [sum(group.loss for group in one.fitted.groups) for one in pair]
    assert stored[1] == stored[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    ours = products(gpu.compressed)
    for name, product in products(cpu.compressed).items():
        assert (ours[name] - product).norm() < 1e-2 * product.norm()


def test_sensitivity(pair: Pair) -> None:
    cpu, gpu = (one.sensitivity for one in pair)
    for one, other in zip(cpu.cells, gpu.cells, strict=True):
        assert other.measured == pytest.approx(one.measured, rel=1e-2)


def test_propagation(pair: Pair) -> None:
    cpu, gpu = (one.propagation for one in pair)
    assert gpu.distances == pytest.approx(cpu.distances, rel=1e-2)
    assert gpu.after == pytest.approx(cpu.after, rel=1e-2)


def test_recovery(pair: Pair) -> None:
    cpu, gpu = ([look.divergence for look in one.recovery.looks] for one in pair)
    assert gpu == pytest.approx(cpu, rel=2e-2)
    assert gpu[-1] < gpu[0]


def test_recovery_in_bfloat16(pair: Pair) -> None:
    _, gpu = pair
    own, target = replace(gpu.settings.recover, dtype="bfloat16"), gpu.work / "bfloat16"
    models = gpu.work / "weights", gpu.compressed
    found = recover(*models, WINDOWS, own, 0, gpu.never, target, 10_000, gpu.device)
    assert found.looks[-1].divergence < found.looks[0].divergence


def test_verification(pair: Pair) -> None:
    _, gpu = pair
    rows = rows_by_sublayer(split_selected(gpu.classification, "heads"))
    assert lossless_difference(gpu.original, rows, WINDOWS[:2]) < 1e-4
    found = [compare(one.original, {"it": one.load()}, WINDOWS, 4)["it"] for one in pair]
    assert found[1].compressed_perplexity == pytest.approx(found[0].compressed_perplexity, rel=1e-2)
    assert found[1].kl_mean == pytest.approx(found[0].kl_mean, rel=1e-2)


def test_curve(pair: Pair) -> None:
    _, gpu = pair
    last = WINDOWS, 4, "float32", gpu.work / "curve", gpu.device
    artefacts = gpu.work / "weights", gpu.spectra, gpu.moments, UNWEIGHED
    less, more = measure_curve(*artefacts, gpu.settings.fit, [0.3, 0.6], *last).points
    assert 0 < less.kl_mean < more.kl_mean


def test_attribution(pair: Pair) -> None:
    found = [attribute(one.original, one.load(), WINDOWS[:4]) for one in pair]
    cpu, gpu = ({one.label: one.total("kl") for one in every.components} for every in found)
    assert cpu.keys() == gpu.keys()
    size = sum(map(abs, cpu.values()))
    assert all(abs(cpu[label] - gpu[label]) < 1e-2 * size for label in cpu)
