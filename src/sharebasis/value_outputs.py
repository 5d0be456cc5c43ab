"""artifacts/weights -> which values of attention may lack some of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sharebasis.hub import load_config
from sharebasis.sublayer import Classification
from sharebasis.value_gauge import ValueOutput
from sharebasis.variation.layers import Layers
from sharebasis.weights import DenseWeights


def value_outputs(weights: Path, model: Classification) -> Sequence[ValueOutput]:
    """Values of a model's attention that may lack some columns, and their outputs.

    Args:
        weights: artifacts/weights.
        model: its sublayers.

    Raises:
        SourceError, WeightsError: it is not usable.
    """
    return Layers(DenseWeights(weights), model, load_config(weights)).value_outputs
