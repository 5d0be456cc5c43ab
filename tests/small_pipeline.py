"""Small random models: calibrated, decomposed and fitted as the stages do it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture.parts import Part, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.edits import PrunedNeurons, edits_of
from sharebasis.compressed.index import CompressedIndex, StoredGroup, load_index
from sharebasis.config.fit import FitSettings
from sharebasis.config.schema import Settings
from sharebasis.config.types import Labels, SplitStrategy
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.rows import Rows
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.spectra.store import Spectra
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics
from sharebasis.structures.layer_distances import LayerDistances

CPU = torch.device("cpu")

Change = Callable[[PreTrainedModel], object]
MakeSmallModel = Callable[..., "SmallModel"]
MakeSmallPipeline = Callable[..., "SmallPipeline"]


def tokens(n: int, seed: int = 0) -> Tensor:
    """Windows of 16."""
    return torch.randint(1, 280, (n, 16), generator=torch.Generator().manual_seed(seed))


WINDOWS = tokens(24)


def never_saved(directory: Path) -> Checkpoint:
    """A checkpoint that is written at no time."""
    return Checkpoint(directory / "checkpoint", {}, math.inf)


@dataclass(frozen=True)
class SmallModel:
    """A model and its moments; not to be changed."""

    weights: Path
    moments_directory: Path
    classification: Classification

    @cached_property
    def moments(self) -> MomentStore:
        return MomentStore(self.moments_directory)

    def load(self) -> PreTrainedModel:
        return load_model(self.weights, "float32", CPU)

    def unstacked(self) -> PreTrainedModel:
        """With a Linear for every expert."""
        model = self.load()
        unstack(model)
        return model

    def parts(self, split: SplitStrategy = "none") -> Sequence[Part]:
        return split_selected(self.classification, split)

    def decompose(
        self,
        target: Path,
        settings: FitSettings,
        split: SplitStrategy = "none",
        distances: LayerDistances | None = None,
    ) -> Spectra:
        artefacts = self.weights, self.classification, self.parts(split), self.moments
        decompose(*artefacts, settings, target, CPU, distances)
        return Spectra(target)

    def fit(
        self,
        target: Path,
        settings: FitSettings,
        split: SplitStrategy = "none",
        distances: LayerDistances | None = None,
    ) -> FittedModel:
        """Write `spectra` and `compressed` below a directory."""
        self.decompose(target / "spectra", settings, split, distances)
        artefacts = self.weights, target / "spectra", settings, target / "compressed"
        return fit(*artefacts, CPU, self.moments)


def calibrated_model(
    weights: Path, target: Path, windows: Tensor, batch: int, labels: Labels | None = "text"
) -> SmallModel:
    """A model that is on disk already; its moments go to `target/moments`."""
    model = load_model(weights, "float32", CPU)
    classification = classify_model(model)
    selected, checkpoint = classification.selected, never_saved(target)
    found = calibrate(model, selected, windows, batch, checkpoint, labels)
    write_moments(target / "moments", *found)
    return SmallModel(weights, target / "moments", classification)


def pruned(index: CompressedIndex) -> Sequence[PrunedNeurons]:
    """The MLPs of a compressed model that lack neurons."""
    return [edit for edit in edits_of(index) if isinstance(edit, PrunedNeurons)]


def dense_rows(model: PreTrainedModel, sublayer: str, rows: Rows) -> Tensor:
    """A view of rows of the (d_out, d_in) weight, whatever way round it is stored."""
    module = model.get_submodule(sublayer)
    assert isinstance(module.weight, Tensor)
    weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    return rows.take(weight)


@dataclass(frozen=True)
class SmallPipeline:
    """A small model and all that the stages up to `fit` made of it; not to be changed."""

    model: SmallModel
    settings: Settings
    spectra: Path
    compressed: Path
    fitted: FittedModel

    @property
    def weights(self) -> Path:
        return self.model.weights

    @property
    def classification(self) -> Classification:
        return self.model.classification

    @property
    def parts(self) -> Sequence[Part]:
        return self.model.parts(self.settings.split.strategy)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return fit_metrics(self.fitted, self.settings.fit)

    def copy(self, target: Path) -> SmallPipeline:
        """For a test to damage: `weights`, `spectra` and `compressed` below a directory."""
        paths = {"weights": self.weights, "spectra": self.spectra, "compressed": self.compressed}
        weights, spectra, compressed = (
            Path(shutil.copytree(path, target / name)) for name, path in paths.items()
        )
        model = replace(self.model, weights=weights)
        return replace(self, model=model, spectra=spectra, compressed=compressed)

    @cached_property
    def index(self) -> CompressedIndex:
        return load_index(self.compressed)

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Every tensor of the compressed directory; a name in two files is an error."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(self.compressed.glob("*.safetensors")):
            of_file = load_file(file)
            assert not tensors.keys() & of_file.keys()
            tensors |= of_file
        return tensors

    def factors(self) -> set[str]:
        """Names of the bases and coefficients."""
        return {name for group in self.index.groups for name in group.tensor_names}

    def product(self, group: StoredGroup) -> Tensor:
        """The dense rows that a group's factors stand for, stacked."""
        names = [part.tensors["coefficient"] for part in group.parts]
        coefficients = [self.stored[name].double() for name in names]
        return torch.cat(coefficients) @ self.stored[group.tensors["basis"]].double()
