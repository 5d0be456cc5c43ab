"""Small models, decomposed, whose sensitivity is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeSettings
from small_pipeline import CPU, MakeSmallModel, SmallModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.analyse import SensitivitySettings
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.moments.store import MomentStore
from sharebasis.stages.sensitivity.draft import Draft, draft
from sharebasis.stages.sensitivity.measure import measure_sensitivity

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
    "neurons": {"fit.structures": ["private", "neurons"], "fit.removed": 0.5},
    "sparse": {"fit.structures": ["private", "sparse"]},
}


@dataclass(frozen=True)
class Case:
    """A small model, decomposed."""

    family: str
    model: SmallModel
    spectra: Path
    fit: FitSettings

    @property
    def weights(self) -> Path:
        return self.model.weights

    @property
    def moments(self) -> MomentStore:
        return self.model.moments

    @property
    def found(self) -> Classification:
        return self.model.classification

    def load(self) -> PreTrainedModel:
        return self.model.load()

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


def maker(
    small_model: MakeSmallModel, make_settings: MakeSettings, temporary: pytest.TempPathFactory
) -> MakeCase:
    """`make(family, structure=, split=)`: a small model, decomposed for a structure."""

    def make(family: str, structure: str = "private", split: SplitStrategy = "qkv") -> Case:
        model, target = small_model(family, windows=WINDOWS, batch=4), temporary.mktemp("case")
        settings = make_settings({**AUTO, **STRUCTURES[structure]}).fit
        model.decompose(target / "spectra", settings, split)
        return Case(family, model, target / "spectra", settings)

    return make


@torch.no_grad()
def logits_of(model: nn.Module, windows: Tensor = WINDOWS[:3]) -> Tensor:
    return model(input_ids=windows).logits[:, :-1]
