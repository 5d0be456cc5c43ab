"""What other arithmetic makes of the time and of the result, in one run. After `make repro`:

    python benchmarks/arithmetic.py [--windows 8] [--steps 20]

Passes of `calibrate` (forward, backward and moments, with the text's tokens as labels, so that
all have the same ones), of `verify` (original and compressed model), and a short training as in
`recover`, its looks at held-out text included. Times are ratios to float32 as torch multiplies by
itself; the arithmetics take turns, a window each, so that a busy machine slows all of
them alike. (Trainings run one after the other.)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis import load_compressed
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.schema import Settings
from sharebasis.config.types import DType
from sharebasis.data.windows import read_windows
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.linalg.fidelity import FidelityMeter
from sharebasis.model.blocks import PROBE_TOKENS
from sharebasis.model.hub import DTYPES, load_model, load_tokenizer
from sharebasis.moments.store import Accumulators
from sharebasis.pipeline.compose import compose_settings
from sharebasis.pipeline.paths import COMPRESSED, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime import matmul
from sharebasis.runtime.console import print_tables
from sharebasis.runtime.devices import pick_device
from sharebasis.stages.calibrate.backward import run_backward
from sharebasis.stages.calibrate.track import start_calibrating
from sharebasis.stages.recover.recover import recover, recovery_windows


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How matrices are multiplied."""

    dtype: DType
    onednn: bool

    @property
    def name(self) -> str:
        return f"{self.dtype}, oneDNN" if self.onednn else self.dtype

    @contextmanager
    def used(self) -> Iterator[None]:
        matmul.use_onednn(self.onednn)
        try:
            yield
        finally:
            matmul.use_onednn(True)


FLOAT32 = Arithmetic("float32", onednn=False)
ALL = (FLOAT32, Arithmetic("float32", onednn=True), Arithmetic("bfloat16", onednn=False))
Row = tuple[Arithmetic, float, str]
"""Seconds, and the result."""


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(
    runs: Mapping[Arithmetic, Callable[[Tensor], object]], windows: Tensor
) -> dict[Arithmetic, float]:
    """Seconds over all windows but the first, which is a warm-up."""
    seconds = dict.fromkeys(runs, 0.0)
    for i, window in enumerate(windows.split(1)):
        for own, run in runs.items():
            with own.used():
                seconds[own] += timed(partial(run, window)) * (i > 0)
    return seconds


def calibrating(settings: Settings, device: torch.device, n_windows: int) -> Iterator[Row]:
    """How far moments are from those of float32, as a fraction of their norm: the furthest."""
    windows = read_windows(load_tokenizer(WEIGHTS), settings.data, "calibration", settings.seed)
    windows = windows[:n_windows].to(device)
    sublayers = load_record(SUBLAYERS, Classification).selected
    runs: dict[Arithmetic, Callable[[Tensor], object]] = {}
    found: dict[Arithmetic, Accumulators] = {}
    for own in ALL:
        model = load_model(WEIGHTS, own.dtype, device)
        probe = windows[:1, :PROBE_TOKENS]
        found[own] = start_calibrating(model, sublayers, probe, gradients=True)[1]
        runs[own] = partial(run_backward, model, labels="text", seed=0)
    seconds = in_turn(runs, windows)
    exact = {name: one.moment().total for name, one in found[FLOAT32].items()}
    for own, moments in found.items():
        furthest = max(
            ((moments[name].moment().total - total).norm() / total.norm()).item()
            for name, total in exact.items()
        )
        yield own, seconds[own], "" if own is FLOAT32 else f"moments differ by {furthest:.1e}"


def verifying(settings: Settings, device: torch.device, n_windows: int) -> Iterator[Row]:
    windows = read_windows(load_tokenizer(WEIGHTS), settings.data, "evaluation", settings.seed)
    meters = {own: FidelityMeter() for own in ALL}
    runs: dict[Arithmetic, Callable[[Tensor], object]] = {}
    for own, meter in meters.items():
        dense = load_model(WEIGHTS, own.dtype, device)
        model = load_compressed(COMPRESSED, DTYPES[own.dtype], device)
        runs[own] = partial(compare_one, dense, model, meter)
    seconds = in_turn(runs, windows[:n_windows].to(device))
    for own, meter in meters.items():
        found = meter.result()
        lost = f"perplexity {found.compressed_perplexity:.3f}, KL {found.kl_mean:.4f} nats"
        yield own, seconds[own], lost


@torch.no_grad()
def compare_one(
    dense: PreTrainedModel, compressed: PreTrainedModel, meter: FidelityMeter, window: Tensor
) -> None:
    with matmul.FastestLinear():
        original, other = (
            model(input_ids=window, use_cache=False).logits[0] for model in (dense, compressed)
        )
    meter.update(original, other, window[0])


def recovering(settings: Settings, device: torch.device, steps: int) -> Iterator[Row]:
    """In one arithmetic after the other, as a training is one call."""
    windows = recovery_windows(
        load_tokenizer(WEIGHTS), settings.data, settings.recover, settings.seed
    )
    for own in ALL:
        if own.onednn:
            continue  # it has no gradients, and what recover multiplies has, but for its teacher
        chosen = replace(settings.recover, steps=steps, look_every=steps, dtype=own.dtype)
        with tempfile.TemporaryDirectory() as work, own.used():
            checkpoint = Checkpoint(Path(work) / "checkpoint", {}, chosen.checkpoint_seconds)
            began = time.perf_counter()
            found = recover(
                WEIGHTS,
                COMPRESSED,
                windows,
                chosen,
                settings.seed,
                checkpoint,
                Path(work) / "recovered",
                settings.fit.shard_bytes,
                device,
            )
            seconds = time.perf_counter() - began
        first, last = found.looks[0].divergence, found.looks[-1].divergence
        yield own, seconds, f"divergence {first:.4f} -> {last:.4f} nats in {steps} steps"


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens; the first warms up")
    parser.add_argument("--steps", type=int, default=20, help="of recovery")
    arguments = parser.parse_args()
    settings = compose_settings(["recover=distill"])
    device = pick_device(settings.device)
    works = {
        "calibrate": lambda: calibrating(settings, device, arguments.windows),
        "verify": lambda: verifying(settings, device, arguments.windows),
        "recover": lambda: recovering(settings, device, arguments.steps),
    }
    table = Table(title="Arithmetic")
    for column in ("work", "arithmetic", "time", "result"):
        table.add_column(column, justify="right" if column == "time" else "left")
    for work, measured in works.items():
        of_float32: float | None = None
        for own, seconds, result in measured():
            of_float32 = of_float32 or seconds
            table.add_row(work, own.name, f"{seconds / of_float32:.2f}", result)
    print_tables(table)


if __name__ == "__main__":
    main()
