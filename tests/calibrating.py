"""Windows and small models to calibrate."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Sublayer
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.moments import Moment
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import Accumulators

CPU = torch.device("cpu")
WINDOWS = torch.randint(288, (10, 16), generator=torch.Generator().manual_seed(7))


def load(directory: Path) -> PreTrainedModel:
    return load_model(directory, "float32", CPU)


def selected_of(directory: Path) -> tuple[Sublayer, ...]:
    return classify_model(meta_model(load_config(directory))).selected


def never_saved(directory: Path) -> Checkpoint:
    return Checkpoint(directory / "checkpoint", {"run": 1}, math.inf)


def moments_of(accumulators: Accumulators) -> dict[str, Moment]:
    return {name: accumulator.moment() for name, accumulator in accumulators.items()}


def assert_identical(one: dict[str, Moment], other: dict[str, Moment]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].total, other[name].total), name
        assert torch.equal(one[name].sum, other[name].sum), name
        assert one[name].n_tokens == other[name].n_tokens, name


def count_windows(model: PreTrainedModel) -> list[int]:
    """The size of every batch that goes through the model from now on, the probe included."""
    batches: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return batches
