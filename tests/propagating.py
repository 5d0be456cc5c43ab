"""Small models, compressed, and refitted by `propagate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from small_pipeline import CPU, MakeSmallPipeline, SmallPipeline, never_saved
from torch import Tensor
from torch.nn import functional

from sharebasis.compressed.index import StoredPart, load_index
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.tensor_files import TensorReader
from sharebasis.stages.propagate.outcome import Propagation
from sharebasis.stages.propagate.propagate import propagate

WINDOWS = torch.randint(0, 256, (20, 16), generator=torch.Generator().manual_seed(1))
AUTO = {
    "fit.method": "auto",
    "fit.shared": [],
    "fit.group_size": 1,
    "fit.allocation": "uniform",
    "fit.storage": "interpolative",
    "fit.removed": 0.4,
    "propagate.by": "regression",
    "propagate.amount": 0.3,
    "propagate.stream": 0.0,
    "propagate.windows": 20,
    "propagate.held_out": 0,
    "propagate.window": 16,
    "propagate.batch": 8,
}

SHARED = {
    "fit.method": "basis_sharing",
    "fit.shared": ["q", "k", "v", "gate", "up"],
    "fit.group_size": 2,
}

NARROWED = {
    "fit.structures": ["private", "neurons"],
    "fit.allocation": "global",
    "fit.removed": 0.5,
}


class Case(SmallPipeline):
    """A small model, compressed."""

    def propagate(
        self,
        target: Path,
        checkpoint: Checkpoint | None = None,
        text: Tensor = WINDOWS,
        **changes: object,
    ) -> Propagation:
        own = replace(self.settings.propagate, **changes)
        models = self.weights, self.classification, self.compressed, self.model.moments
        last = checkpoint or never_saved(target.parent), target, CPU
        return propagate(*models, text, own, self.settings.fit, *last)


MakeCase = Callable[..., Case]


class Killed(Exception):  # noqa: N818
    """Stands for a kill."""


def maker(small_pipeline: MakeSmallPipeline, always: Mapping[str, object] = {}) -> MakeCase:
    """`make(family, {"fit.removed": ...})`: a small model, calibrated with gradients and compressed
    as told by `AUTO`, by `always` and then."""

    def make(family: str = "llama", changes: Mapping[str, object] = {}) -> Case:
        told = {**AUTO, **always, **changes}
        small = small_pipeline(family, told, windows=WINDOWS, batch=4)
        return Case(**{field.name: getattr(small, field.name) for field in fields(small)})

    return make


def name_of(part: StoredPart) -> str:
    """The sublayer of a part and its first row."""
    return f"{part.sublayer}.{part.rows.start}"


def products(directory: Path) -> dict[str, Tensor]:
    """The dense weight of every part, by its name."""
    loaded = open_compressed(directory)
    return {
        name_of(part): linear.dense().detach()
        for group in loaded.index.groups
        for part, linear in zip(group.parts, loaded.linears(group), strict=True)
    }


def n_stored(directory: Path) -> int:
    index = load_index(directory)
    reader = TensorReader(directory, index.files)
    return sum(math.prod(reader.shape(name)) for name in index.files)


def divergence(case: Case, directory: Path) -> float:
    """By torch's own, on the windows that are held out above."""
    p, q = (
        model(input_ids=WINDOWS[16:]).logits.flatten(0, 1).double().log_softmax(-1)
        for model in (case.model.load(), load_compressed(directory))
    )
    return functional.kl_div(q, p, reduction="batchmean", log_target=True).item()
