"""Settings of the stages `propagate` and `recover`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from sharebasis.config.types import DType, PositiveInt

Propagating = Literal["none", "update", "regression"]


@dataclass(frozen=True)
class PropagateSettings:
    """A refit to what errors before make of the inputs."""

    by: Propagating
    """none: the stage is left out. update: coefficients alone, for the inputs that the model has as
    it is, all at once. regression: block by block, with a target that reckons with the drift."""
    amount: Annotated[float, Ge(0), Le(1)]
    """How far the target of a regression goes from the weight."""
    stream: Annotated[float, Ge(0), Le(1)]
    """The same for what writes to the residual stream, whose target then makes up for what the
    stream lacks by then, too; 0 takes `amount` and lets the stream be."""
    mean: bool
    """Whether biases, where there are any, keep the mean of what is put out."""
    windows: PositiveInt
    """Windows of the calibration text, from its start; memory goes with it."""
    held_out: Annotated[int, Ge(0)]
    """Windows of the calibration text after those: what was refitted is kept only if the model
    diverges less on them than it did. 0: it is kept whatever it does."""
    window: Annotated[int, Gt(1)]
    """Tokens of each."""
    batch: PositiveInt
    """Windows that go through a block at once."""
    damping: Annotated[float, Ge(0)]
    """Of the mean diagonal of the moment of inputs, added to it before the regression."""
    skip: Annotated[int, Ge(0)]
    """Tokens at the start of a window that do not count."""
    clip: Annotated[float, Gt(0)] | None
    """Inputs longer than `clip` times the median count as if they were as long as that."""
    dtype: DType
    """Arithmetic of the passes, and of the hidden states that are kept."""
    checkpoint_seconds: Annotated[float, Gt(0)]
    """Longest time between two checkpoints; what a kill can cost."""


@dataclass(frozen=True)
class RecoverSettings:
    """A short distillation of the compressed model against the original."""

    steps: Annotated[int, Ge(0)]
    """Steps of the optimizer; 0 leaves the stage out."""
    batch: PositiveInt
    """Windows a step."""
    window: Annotated[int, Gt(1)]
    """Tokens a window."""
    windows: PositiveInt
    """Windows of the calibration text to train on, in another order every time round."""
    held_out: PositiveInt
    """Windows of the calibration text after those, to see by when to stop."""
    look_every: PositiveInt
    """Steps between two looks at the held-out windows."""
    patience: PositiveInt
    """Looks in a row without a lower divergence that end the training."""
    learning_rate: Annotated[float, Gt(0)]
    """Of Muon at its highest, in units of AdamW's, for a model that diverges by one nat at first;
    in proportion otherwise. A cosine takes it to zero at the last step."""
    warmup: Annotated[float, Ge(0), Lt(1)]
    """Fraction of the steps in which it rises to that."""
    hidden: Annotated[float, Ge(0)]
    """What the distance of the hidden states counts beside the divergence of the logits."""
    dtype: DType
    """Arithmetic of the passes; factors and the optimizer's state are in float32."""
    checkpoint_seconds: Annotated[float, Gt(0)]
    """Longest time between two checkpoints; what a kill can cost."""
