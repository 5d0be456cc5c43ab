"""Small models, decomposed, whose sensitivity is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from conftest import MakeSettings
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.analyse import SensitivitySettings
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.sensitivity.draft import Draft, draft
from sharebasis.stages.sensitivity.measure import measure_sensitivity

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


def decomposed_case(
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
def logits_of(model: nn.Module, windows: Tensor = WINDOWS[:3]) -> Tensor:
    return model(input_ids=windows).logits[:, :-1]
