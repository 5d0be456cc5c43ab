"""The error of a compressed model by component: sums over predictions, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.stages.attribute.error_split import MEASURES, Measure

NORM, UNEMBEDDING = "last norm's scale", "unembedding"


@dataclass(frozen=True, slots=True)
class Component:
    """What one component has to answer for, a prediction, by measure."""

    label: str
    """`L3H1`, `L3 MLP`, ..."""
    layer: int | None
    head: int | None
    own_error: Mapping[Measure, float]
    """What its weights do on the input that the original has there."""
    inherited_error: Mapping[Measure, float]
    """What is there because its input has changed already."""

    def total(self, measure: Measure) -> float:
        return self.own_error[measure] + self.inherited_error[measure]


@dataclass(frozen=True, slots=True)
class Depth:
    """The logit lens between two blocks; nats a prediction."""

    layer: int
    """The block that reads this stream; the number of blocks: the unembedding."""
    loss: float
    compressed_loss: float
    kl: float
    """KL(the original's final distribution ‖ the original's here)."""
    compressed_kl: float
    """KL(the original's final distribution ‖ the compressed model's here)."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """The error of a compressed model and its parts, a prediction."""

    components: tuple[Component, ...]
    """Every part but the quadrature; in the order of the stream."""
    total: Mapping[Measure, float]
    quadrature: Mapping[Measure, float]
    """What the integration along the line of logits missed: total less all parts."""
    lens: tuple[Depth, ...]
    n_predictions: int
    n_lens_predictions: int

    def ranked(self, measure: Measure) -> list[Component]:
        """Components by their own error, the worst first."""
        return sorted(self.components, key=lambda component: -component.own_error[measure])


@dataclass(slots=True)
class AttributionSums:
    """Sums over predictions, in float64."""

    n_layers: int
    parts: dict[tuple[str, int | None, int | None], Float[Tensor, "2 m"]] = field(
        default_factory=dict
    )
    total: Tensor = field(default_factory=lambda: torch.zeros(len(MEASURES), dtype=torch.float64))
    linear: Tensor = field(default_factory=lambda: torch.zeros(len(MEASURES), dtype=torch.float64))
    n_predictions: int = 0
    depths: list[list[float]] = field(default_factory=list)
    n_lens: int = 0

    def add(
        self,
        label: str,
        own_error: Float[Tensor, "m ..."],
        inherited_error: Float[Tensor, "m ..."],
        layer: int | None = None,
        head: int | None = None,
    ) -> None:
        """Add predictions of a component; m measures."""
        errors = own_error, inherited_error
        both = torch.stack([error.double().flatten(1).sum(1).cpu() for error in errors])
        key = label, layer, head
        self.parts[key] = self.parts[key] + both if key in self.parts else both

    def result(self) -> Attribution:
        """Means over the predictions."""
        n = self.n_predictions
        return Attribution(
            tuple(
                Component(*key, _by_measure(own_error / n), _by_measure(inherited_error / n))
                for key, (own_error, inherited_error) in self.parts.items()
            ),
            _by_measure(self.total / n),
            _by_measure((self.total - self.linear) / n),
            tuple(Depth(i, *(x / self.n_lens for x in sums)) for i, sums in enumerate(self.depths)),
            n,
            self.n_lens,
        )


def _by_measure(values: Tensor) -> Mapping[Measure, float]:
    return dict(zip(MEASURES, values.tolist(), strict=True))
