"""Every stage of the pipeline up to `fit`, on a small model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from conftest import fit_at_once
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture.parts import Part, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import INDEX_FILE, CompressedGroup, CompressedIndex
from sharebasis.config.fit import FitSettings
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.linalg.rows import Rows
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics

CPU = torch.device("cpu")
CALIBRATION = torch.randint(288, (12, 32), generator=torch.Generator().manual_seed(1))

SHARE = {"fit.method": "basis_sharing", "fit.group_size": 2}


@dataclass
class Run:
    """A model and all that the pipeline made of it."""

    weights: Path
    compressed: Path
    classification: Classification
    parts: Sequence[Part]
    settings: FitSettings
    fitted: FittedModel
    moments: Path

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return fit_metrics(self.fitted, self.settings)

    @cached_property
    def index(self) -> CompressedIndex:
        return load_record(self.compressed / INDEX_FILE, CompressedIndex)

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Every tensor of the compressed directory; a name in two files is an error."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(self.compressed.glob("*.safetensors")):
            own = load_file(file)
            assert not tensors.keys() & own.keys()
            tensors |= own
        return tensors

    def factors(self) -> set[str]:
        """Names of the bases and coefficients."""
        coefficients = {part.coefficient for group in self.index.groups for part in group.parts}
        return coefficients | {group.basis for group in self.index.groups}

    def dense(self) -> PreTrainedModel:
        model = load_model(self.weights, "float32", CPU)
        unstack(model)
        return model

    def dense_rows(self, model: PreTrainedModel, sublayer: str, rows: Rows) -> Tensor:
        """A view of rows of the (d_out, d_in) weight, whatever way round it is stored."""
        module = model.get_submodule(sublayer)
        assert isinstance(module.weight, Tensor)
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        return rows.take(weight)

    def product(self, group: CompressedGroup) -> Tensor:
        """The dense rows that a group's factors stand for, stacked."""
        coefficients = [self.stored[part.coefficient].double() for part in group.parts]
        return torch.cat(coefficients) @ self.stored[group.basis].double()


def compress(
    source: Path, target: Path, strategy: str, settings: FitSettings, shard_bytes: int = 20_000
) -> Run:
    """Every stage of the pipeline but `verify`, by the functions that the scripts call."""
    weights = target / "weights"
    extract(find_source(str(source)), weights)
    config = load_config(weights)
    classification = classify_model(meta_model(config))
    model = load_model(weights, "float32", CPU)
    checkpoint = Checkpoint(target / "checkpoint", {}, math.inf)
    sites, sums = calibrate(model, classification.selected, CALIBRATION, 4, checkpoint)
    write_moments(target / "moments", sites, sums)
    parts = split_selected(classification, strategy)  # type: ignore[arg-type]
    moments = MomentStore(target / "moments")
    fitted = fit_at_once(weights, parts, moments, settings, target / "compressed")
    return Run(
        weights,
        target / "compressed",
        classification,
        parts,
        settings,
        fitted,
        target / "moments",
    )
