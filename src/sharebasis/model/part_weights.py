"""The weights of parts, from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharebasis.architecture.parts import Part
from sharebasis.model.checkpoint_weights import DenseWeights


def read_parts(
    dense: DenseWeights, device: torch.device, parts: Sequence[Part]
) -> Sequence[Tensor]:
    return [read_part(dense, part).to(device) for part in parts]


def read_part(dense: DenseWeights, part: Part) -> Tensor:
    """The (d_out, d_in) weight of a part.

    Raises:
        WeightsError: the checkpoint does not hold it.
    """
    name, conv1d = part.sublayer.name, part.sublayer.type == "Conv1D"
    return dense.read(f"{name}.weight", part.rows, transposed=conv1d)
