"""artifacts/weights -> which values of attention may lack some of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sharebasis.architecture.sublayers import Classification
from sharebasis.gauge.layers import Layers
from sharebasis.linalg.value_gauge import ValueOutput
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.hub import load_config


def value_outputs(weights: Path, model: Classification) -> Sequence[ValueOutput]:
    """Values of a model's attention that may lack some columns, and their outputs.

    Args:
        weights: artifacts/weights.
        model: its sublayers.

    Raises:
        SourceError, WeightsError: it is not usable.
    """
    return Layers(DenseWeights(weights), model, load_config(weights)).value_outputs
