"""A model's layers in each other's coordinates: the same function, nearer weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import random_model
from transformers import PreTrainedModel

from sharebasis.align import align_layers
from sharebasis.errors import SelectionError

TOKENS = torch.randint(1, 280, (2, 24), generator=torch.Generator().manual_seed(3))
FAMILIES = ("q", "k", "v", "o", "gate", "up", "down")


def _apart(model: PreTrainedModel) -> list[float]:
    """How far gates of consecutive layers are from each other."""
    gates = [layer.mlp.gate_proj.weight for layer in model.model.layers]
    return [float((a / a.norm() - b / b.norm()).norm()) for a, b in pairwise(gates)]


@torch.no_grad()
def test_without_distances_every_layer_comes_nearer_to_the_one_before_it() -> None:
    model = random_model("llama", 288, num_hidden_layers=3).double()
    before, apart = model(input_ids=TOKENS).logits, _apart(model)
    align_layers(model)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before, rtol=0, atol=1e-9)
    assert all(now < 0.99 * then for now, then in zip(_apart(model), apart, strict=True))


def test_a_distance_that_was_not_measured_is_told() -> None:
    model = random_model("llama", 288, num_hidden_layers=3)
    consecutive = {family: {(0, 1): 1.0, (1, 2): 1.0} for family in FAMILIES}
    with pytest.raises(SelectionError, match=r"between layers 0 and 2.*vary\.pairs=all"):
        align_layers(model, consecutive)
