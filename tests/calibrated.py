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

from sharebasis import compressed_index, store
from sharebasis.calibration import calibrate
from sharebasis.checkpoint import Checkpoint
from sharebasis.classification import classify_model
from sharebasis.compressed_index import CompressedIndex
from sharebasis.decomposition import decompose
from sharebasis.fitting import FittedModel, fit
from sharebasis.hub import load_config, load_model, meta_model
from sharebasis.moment_store import MomentStore, write_moments
from sharebasis.settings import FitSettings, SplitStrategy
from sharebasis.splitting import split_selected
from sharebasis.value_outputs import value_outputs

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
        return store.load_record(self.directory / name / compressed_index.FILE, CompressedIndex)


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
