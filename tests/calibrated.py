"""Small models and their moments, to be compressed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import MakeDirectory, MakeSettings
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.parts import split_selected
from sharebasis.compressed.index import INDEX_FILE, CompressedIndex
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel
from sharebasis.structures.value_outputs import value_outputs

CPU = torch.device("cpu")
AUTO = {
    "method": "auto",
    "group_size": 1,
    "shared": [],
    "structures": ["private"],
    "two_sided": True,
    "damping_gradients": 0.05,
    "allocation": "global",
    "storage": "interpolative",
}


def fit_settings(make_settings: MakeSettings, **changes: Any) -> FitSettings:
    """Of `fit=auto`, where every part is by itself, with some changes."""
    return make_settings({f"fit.{key}": value for key, value in {**AUTO, **changes}.items()}).fit


def tokens(n: int, seed: int = 0) -> Tensor:
    """Windows of 16."""
    return torch.randint(1, 280, (n, 16), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Calibrated:
    """A small model and its moments."""

    weights: Path
    moments: MomentStore
    directory: Path

    def fit(
        self, settings: FitSettings, name: str = "small", split: SplitStrategy = "none"
    ) -> FittedModel:
        found = classify_model(meta_model(load_config(self.weights)))
        parts, spectra = split_selected(found, split), self.directory / "spectra"
        models = self.weights, parts, self.moments, settings, spectra
        decompose(*models, CPU, values=value_outputs(self.weights, found))
        return fit(self.weights, spectra, settings, self.directory / name, CPU, self.moments)

    def index(self, name: str = "small") -> CompressedIndex:
        return load_record(self.directory / name / INDEX_FILE, CompressedIndex)


Calibrate = Callable[..., Calibrated]


def maker(make_directory: MakeDirectory, tmp_path: Path) -> Calibrate:
    """`make(family, change=)`: `change` is applied to the model before anything else."""

    def make(
        family: str,
        change: Callable[[PreTrainedModel], None] | None = None,
        n_windows: int = 24,
    ) -> Calibrated:
        weights = make_directory(family)
        model = load_model(weights, "float32", CPU)
        if change:
            with torch.no_grad():
                change(model)
            weights = tmp_path / "weights"
            model.save_pretrained(weights)
        selected = classify_model(model).selected
        checkpoint = Checkpoint(tmp_path / "checkpoint", {}, math.inf)
        found = calibrate(model, selected, tokens(n_windows), 8, checkpoint, "text")
        write_moments(tmp_path / "moments", *found)
        return Calibrated(weights, MomentStore(tmp_path / "moments"), tmp_path)

    return make
