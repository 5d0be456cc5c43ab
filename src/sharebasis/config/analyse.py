"""Settings of the stages that measure: `sensitivity`, `curve`, `vary`, `verify`, `attribute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from sharebasis.config.types import PositiveInt

Alignment = Literal["none", "tied", "exact"]

Sensing = Literal["none", "probes"]


@dataclass(frozen=True)
class SensitivitySettings:
    """How far predicted losses are from measured ones, on a draft of what `fit` will make."""

    by: Sensing
    """none: not measured; probes: the divergence of the model when one cell alone is
    compressed."""
    removed: float
    """Of the draft, in (0, 1); as much as `fit.removed`, unless it is set."""
    runs: PositiveInt
    """Runs of layers that the depth is cut into. A cell is a family in one of them."""
    windows: PositiveInt
    """Windows of the calibration text, from its start."""
    window: Annotated[int, Gt(1)]
    """Tokens of each."""
    batch: PositiveInt
    """Windows a forward pass; memory goes with it."""
    clip: Annotated[float, Ge(1)]
    """Weights lie between its inverse and this."""


@dataclass(frozen=True)
class CurveSettings:
    """The budgets at which the loss is measured, beside `fit.removed`."""

    removed: Annotated[tuple[Annotated[float, Gt(0), Lt(1)], ...], MinLen(1)]
    """Fractions of the selected sublayers' numbers to remove."""
    windows: PositiveInt
    """Windows of the evaluation text, from its start."""


@dataclass(frozen=True)
class VarySettings:
    """How the variation between layers is measured."""

    alignment: Alignment
    """What is removed first. none: nothing; exact: what changes no logit; tied: one rotation for
    q, k, v and o of a head and one of all neurons, which is not exact."""
    pairs: Literal["consecutive", "all"]
    """consecutive: each layer and the next; all: every two layers."""
    layers: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] | None
    """The first and the last layer to measure; None: all layers."""


@dataclass(frozen=True)
class VerifySettings:
    """What is compared."""

    lossless_windows: PositiveInt
    """Evaluation windows for the lossless wrap."""
    prompt: Annotated[str, MinLen(1)]
    """Both models continue this."""
    new_tokens: PositiveInt
    """Tokens to continue it by, greedily."""


@dataclass(frozen=True)
class AttributeSettings:
    """Over what the error is split."""

    windows: PositiveInt
    """Windows of the evaluation text, from its start."""
    window: Annotated[int, Gt(1)]
    """Tokens of each."""
    batch: PositiveInt
    """Windows a forward pass; memory goes with it."""
    lens_predictions: PositiveInt
    """About how many of the predictions are read off at every depth."""
    top: PositiveInt
    """Components that the table names."""
