"""Hashes of what small models become: python tests/golden.py > tests/golden.json.

They are to stay as they are; who changes them says so, and why, in CHANGELOG.md.
"""

# The environment is read when a process begins, or when torch is imported.
# ruff: noqa: E402

from __future__ import annotations

import os
import sys

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F,-AVX,-SSE4_1",
    "HF_HUB_OFFLINE": "1",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Prescott",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Arithmetic that does not hang on which instructions an x86-64 processor has."""

if __name__ == "__main__" and ENVIRONMENT.items() - os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from golden_models import CPU, Calibrated, calibrated, windows
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from sharebasis.architecture.parts import split_selected
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.config.refine import PropagateSettings, RecoverSettings
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.model.hub import load_config, meta_model
from sharebasis.runtime.matmul import use_onednn
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel
from sharebasis.stages.propagate.propagate import propagate
from sharebasis.stages.recover.recover import recover

INDEX = "sharebasis.json"
INDICES = Path(__file__).parent / "data" / "index_format_5"
"""What `INDEX` was in that format, for some cases."""

FIT = FitSettings(
    method="auto",
    group_size=1,
    shared=("q", "k", "v", "o", "gate", "up", "down", "fused"),
    share_experts=False,
    structures=("private",),
    two_sided=True,
    damping_inputs=1e-4,
    damping_gradients=0.05,
    removed=0.3,
    allocation="global",
    storage="plain",
    value_gauge=False,
    exclude=(),
    limits=(),
    rank_multiple=1,
    shard_bytes=20_000,
)
PROPAGATE = PropagateSettings(
    by="regression",
    amount=0.3,
    stream=0.5,
    mean=True,
    windows=12,
    held_out=0,
    window=16,
    batch=4,
    damping=1e-3,
    skip=0,
    clip=None,
    dtype="float32",
    checkpoint_seconds=1e6,
)
RECOVER = RecoverSettings(
    steps=4,
    batch=2,
    window=16,
    windows=8,
    held_out=4,
    look_every=2,
    patience=2,
    learning_rate=0.01,
    warmup=0.1,
    hidden=0.1,
    dtype="float32",
    checkpoint_seconds=1e6,
)


@dataclass(frozen=True)
class Kind:
    """How a model is compressed, and what has to be found in it."""

    changes: Mapping[str, Any]
    """To `FIT`."""
    wanted: str
    splits: tuple[str, ...] = ("none", "qkv", "heads")
    families: tuple[str, ...] = ("llama", "gpt2", "phi3")


def _auto(*structures: str, **others: Any) -> Mapping[str, Any]:
    return {"structures": ("private", *structures), **others}


def _fixed(method: str, group_size: int) -> Mapping[str, Any]:
    own = {"two_sided": False, "damping_inputs": 0.0, "damping_gradients": 0.0}
    fixed = {"structures": ("fixed",), "allocation": "uniform"}
    return {"method": method, "group_size": group_size, **own, **fixed}


KINDS: Mapping[str, Kind] = {
    "private": Kind(_auto(), "private"),
    "narrowed": Kind(_auto("neurons", removed=0.5), "narrowed", ("none", "qkv")),
    "sparse": Kind(_auto("sparse"), "sparse", ("none", "qkv")),
    "joint": Kind(_auto("joint", removed=0.5), "joint", ("none", "qkv")),
    "shared": Kind(_auto("shared:2", removed=0.6), "shared:2"),
    "inner": Kind(_auto("shared:2:inner", removed=0.5), "shared:2:inner", ("none", "heads")),
    "gauge": Kind(
        _auto("neurons", "sparse", removed=0.2, value_gauge=True), "value_gauge", ("qkv",)
    ),
    "svd": Kind(_fixed("svd", 1), "fixed", ("none", "heads")),
    "svd_llm": Kind(_fixed("svd_llm", 2), "fixed", ("none", "heads")),
    "basis_sharing": Kind(_fixed("basis_sharing", 2), "fixed"),
    "tied": Kind(_auto("sparse"), "sparse", ("none",), ("golden_tied",)),
    "tied_factors": Kind(_auto(), "private", ("none",), ("golden_tied",)),
}

LEFT_OUT = {
    "gpt2-none-joint-plain",
    "gpt2-none-joint-interpolative",
    "gpt2-none-shared-plain",
    "gpt2-none-shared-interpolative",
    "gpt2-qkv-shared-plain",
}
"""Cases in which nothing of their kind is picked."""

REFITTED = ("private", "narrowed", "sparse", "shared", "gauge")
"""What `propagate` and `recover` go on from, of Llama."""


@dataclass(frozen=True)
class Case:
    """A model and how it is compressed."""

    family: str
    split: str
    kind: str
    storage: str

    @property
    def name(self) -> str:
        return f"{self.family}-{self.split}-{self.kind}-{self.storage}"

    @property
    def settings(self) -> FitSettings:
        return replace(FIT, **KINDS[self.kind].changes, storage=self.storage)


def cases(family: str) -> Iterator[Case]:
    """All of a family. A Llama fuses no weight that could be cut into q, k and v."""
    for kind, own in KINDS.items():
        splits = own.splits if family in own.families else ()
        if family == "llama" and "none" in splits:
            splits = tuple(split for split in splits if split != "qkv")
        for split in splits:
            both = (Case(family, split, kind, storage) for storage in ("plain", "interpolative"))
            yield from (case for case in both if case.name not in LEFT_OUT)


# What is hashed


def files_hash(directory: Path) -> str:
    """Of all files of tensors, names and contents."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(f"{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def dense_weights(directory: Path, model: Calibrated) -> Mapping[str, Tensor]:
    """Weights and biases of the selected sublayers of a compressed model."""
    loaded, found = load_compressed(directory), {}
    for sublayer in model.classification.selected:
        module = loaded.get_submodule(sublayer.name)
        found[f"{sublayer.name}.weight"] = module.weight
        if module.bias is not None:
            found[f"{sublayer.name}.bias"] = module.bias
    return found


def dense_hash(weights: Mapping[str, Tensor]) -> str:
    """Of names, shapes and contents."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def picked(fitted: FittedModel, weights: Mapping[str, Tensor], model: Calibrated) -> Counter[str]:
    """How many groups of every structure there are, narrowed sublayers and values in a gauge."""
    forms = Counter(one.form for one in fitted.groups)
    found = Counter(
        "dense" if one.form in ("dense", "fixed_columns") else one.group.structure
        for one in fitted.groups
    )
    del found["neurons"]  # told by sublayers
    original = meta_model(load_config(model.weights))
    found["narrowed"] = sum(
        weights[f"{own.name}.weight"].numel() < original.get_submodule(own.name).weight.numel()
        for own in model.classification.selected
    )
    found["value_gauge"] = forms["fixed_columns"]
    return +found


# What is made


@dataclass(frozen=True)
class Workshop:
    """Where the models of one family are made."""

    work: Path
    model: Calibrated
    spectra: dict[tuple[str, str], Path] = field(default_factory=dict)
    """By split and kind; the storage plays no part."""

    def compress(self, case: Case) -> tuple[Path, FittedModel]:
        target = self.work / case.name
        spectra = self._spectra(case)
        models = self.model.weights, spectra, case.settings, target
        return target, fit(*models, CPU, self.model.moments)

    def _spectra(self, case: Case) -> Path:
        key = case.split, case.kind
        if key not in self.spectra:
            self.spectra[key] = self.work / f"spectra-{case.split}-{case.kind}"
            model = self.model
            parts = split_selected(model.classification, case.split)  # type: ignore[arg-type]
            own = model.moments, case.settings, self.spectra[key], CPU
            decompose(model.weights, model.classification, parts, *own)
        return self.spectra[key]

    def entry(self, case: Case) -> Mapping[str, Any]:
        """What is told of a case."""
        directory, fitted = self.compress(case)
        weights = dense_weights(directory, self.model)
        found = picked(fitted, weights, self.model)
        if not found[KINDS[case.kind].wanted]:
            raise AssertionError(f"{case.name}: no {KINDS[case.kind].wanted} among {found}")
        told = {"dense": dense_hash(weights), "files": files_hash(directory), "picked": found}
        if (stored := INDICES / f"{case.name}.json").exists():
            told["by_index_format_5"] = self._by_index(directory, stored)
        return told

    def _by_index(self, directory: Path, stored: Path) -> str:
        """The hash of the dense weights of a model with another index in the place of its own."""
        other = directory.with_name(f"{directory.name}-index")
        shutil.copytree(directory, other)
        shutil.copyfile(stored, other / INDEX)
        return dense_hash(dense_weights(other, self.model))

    def refitted(self, case: Case) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What is told of a case that is made already, after `propagate` and `recover`."""
        for what in ("regression", "update", "recover"):
            target = self.work / f"{case.name}-{what}"
            torch.manual_seed(0)
            self._refit(case, what, target)
            told = dense_hash(dense_weights(target, self.model))
            yield target.name, {"dense": told, "files": files_hash(target)}

    def _refit(self, case: Case, what: str, target: Path) -> None:
        compressed, never = self.work / case.name, Checkpoint(self.work / "never", {}, math.inf)
        model, text = self.model, windows(12, seed=2)
        if what == "recover":
            last = RECOVER, 0, never, target, case.settings.shard_bytes, CPU
            recover(model.weights, compressed, text, *last)
            return
        own = replace(PROPAGATE, by=what)
        models = model.weights, model.classification, compressed, model.moments
        propagate(*models, text, own, case.settings, never, target, CPU)


def outcomes(work: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All that there is to tell, by names."""
    for family in ("llama", "gpt2", "phi3", "golden_tied"):
        workshop = Workshop(work / family, calibrated(family, work / family))
        for case in cases(family):
            torch.manual_seed(0)
            yield case.name, workshop.entry(case)
            if family == "llama" and case.kind in REFITTED and case.split != "heads":
                yield from workshop.refitted(case)
        shutil.rmtree(work / family)


def main() -> None:
    logging.disable()
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    use_onednn(False)
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(dict(outcomes(Path(work))), indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
