"""Small models and their moments, to be compressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conftest import MakeSettings
from small_pipeline import CPU, MakeSmallModel, SmallModel

from sharebasis.compressed.edits import Edit, edits_of
from sharebasis.compressed.index import CompressedIndex, load_index
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.moments.store import MomentStore
from sharebasis.spectra.store import Spectra
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel
from sharebasis.structures.structure import MeasuredCell, Structure

E = TypeVar("E", bound=Edit)

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


@dataclass(frozen=True)
class Calibrated:
    """A small model that is compressed in a directory of the test's own."""

    model: SmallModel
    directory: Path

    @property
    def weights(self) -> Path:
        return self.model.weights

    @property
    def moments(self) -> MomentStore:
        return self.model.moments

    def fit(
        self, settings: FitSettings, name: str = "small", split: SplitStrategy = "none"
    ) -> FittedModel:
        spectra = self.directory / "spectra"
        self.model.decompose(spectra, settings, split)
        artefacts = self.weights, spectra, settings, self.directory / name
        return fit(*artefacts, CPU, self.moments)

    def index(self, name: str = "small") -> CompressedIndex:
        return load_index(self.directory / name)

    def edits(self, kind: type[E], name: str = "small") -> list[E]:
        """Those of one kind."""
        return [edit for edit in edits_of(self.index(name)) if isinstance(edit, kind)]

    def cells(self, kind: type[Structure]) -> list[MeasuredCell]:
        """What a structure was measured on."""
        cells = Spectra(self.directory / "spectra").cells
        return [cell for cell in cells if isinstance(cell.structure, kind)]


Calibrate = Callable[..., Calibrated]


def maker(small_model: MakeSmallModel, tmp_path: Path) -> Calibrate:
    """`make(family, change=, windows=)`: of what `small_model` makes."""

    def make(*arguments: Any, **others: Any) -> Calibrated:
        return Calibrated(small_model(*arguments, **others), tmp_path)

    return make
