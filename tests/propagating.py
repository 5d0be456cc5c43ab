"""Small models, compressed, and refitted by `propagate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import MakeDirectory, MakeSettings, fit_at_once
from torch import Tensor
from torch.nn import functional

from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import INDEX_FILE, CompressedIndex
from sharebasis.compressed.loader import linears_by_tensor, load_compressed
from sharebasis.config.schema import Settings
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.io.tensor_files import TensorReader
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.propagate.outcome import Propagation
from sharebasis.stages.propagate.propagate import propagate

WINDOWS = torch.randint(0, 256, (20, 16), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
AUTO = {
    "fit.method": "auto",
    "fit.shared": [],
    "fit.group_size": 1,
    "fit.allocation": "uniform",
    "fit.storage": "interpolative",
    "fit.removed": 0.4,
    "propagate.by": "regression",
    "propagate.amount": 0.3,
    "propagate.stream": 0.0,
    "propagate.windows": 20,
    "propagate.held_out": 0,
    "propagate.window": 16,
    "propagate.batch": 8,
}

SHARED = {
    "fit.method": "basis_sharing",
    "fit.shared": ["q", "k", "v", "gate", "up"],
    "fit.group_size": 2,
}

NARROWED = {
    "fit.structures": ["private", "narrowed"],
    "fit.allocation": "global",
    "fit.removed": 0.5,
}


@dataclass(frozen=True)
class Case:
    """A small model, compressed."""

    work: Path
    classification: Classification
    settings: Settings

    @property
    def index(self) -> CompressedIndex:
        return load_record(self.work / "compressed" / INDEX_FILE, CompressedIndex)

    def propagate(
        self,
        target: Path,
        checkpoint: Checkpoint | None = None,
        text: Tensor = WINDOWS,
        **changes: object,
    ) -> Propagation:
        own = replace(self.settings.propagate, **changes)
        never = Checkpoint(target.parent / "checkpoint", {}, math.inf)
        moments = MomentStore(self.work / "moments")
        models = self.work / "weights", self.classification, self.work / "compressed", moments
        last = checkpoint or never, target, CPU
        return propagate(*models, text, own, self.settings.fit, *last)


MakeCase = Callable[..., Case]


class Killed(Exception):  # noqa: N818
    """Stands for a kill."""


def maker(
    temporary: pytest.TempPathFactory,
    make_directory: MakeDirectory,
    make_settings: MakeSettings,
    always: Mapping[str, object] = {},
) -> MakeCase:
    """`make(family, {"fit.removed": ...})`: a small model, calibrated with gradients and compressed
    as told by `AUTO`, by `always` and then."""

    def make(family: str = "llama", changes: Mapping[str, object] = {}) -> Case:
        work = temporary.mktemp("case")
        extract(find_source(str(make_directory(family))), work / "weights")
        model = classify_model(meta_model(load_config(work / "weights")))
        dense = load_model(work / "weights", "float32", CPU)
        never = Checkpoint(work / "checkpoint", {}, math.inf)
        found = calibrate(dense, model.selected, WINDOWS, 4, never, "text")
        write_moments(work / "moments", *found)
        settings = make_settings({**AUTO, **always, **changes})
        parts = split_selected(model, settings.split.strategy)
        moments = MomentStore(work / "moments")
        fit_at_once(work / "weights", parts, moments, settings.fit, work / "compressed")
        return Case(work, model, settings)

    return make


def products(directory: Path) -> dict[str, Tensor]:
    """The dense weight of every part."""
    index = load_record(directory / INDEX_FILE, CompressedIndex)
    linears = linears_by_tensor(load_compressed(directory), index)
    return {name: linear.dense().detach() for name, linear in linears.items()}


def n_stored(directory: Path) -> int:
    index = load_record(directory / INDEX_FILE, CompressedIndex)
    reader = TensorReader(directory, index.files)
    return sum(math.prod(reader.shape(name)) for name in index.files)


def divergence(case: Case, directory: Path) -> float:
    """By torch's own, on the windows that are held out above."""
    p, q = (
        model(input_ids=WINDOWS[16:]).logits.flatten(0, 1).double().log_softmax(-1)
        for model in (load_model(case.work / "weights", "float32", CPU), load_compressed(directory))
    )
    return functional.kl_div(q, p, reduction="batchmean", log_target=True).item()
