"""What the pipeline costs, as ratios from one run. To be run after `make repro`:

    python benchmarks/costs.py [--gigabytes 3]

- time: a calibrating pass against a bare forward pass over the same text, in turn, so that
  a busy machine slows both alike.
- memory: calibration against model + moments + one batch; `load_compressed` against the
  files it reads; `extract` on a sharded checkpoint of random weights. Each in a process of
  its own; what importing the libraries takes is left out, but for `extract`, where all
  resident memory counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedModel

from sharebasis import load_compressed
from sharebasis.architecture.sublayers import Classification
from sharebasis.io.records import load_record, write_json
from sharebasis.model.blocks import PROBE_TOKENS, run_blocks
from sharebasis.model.hub import load_model
from sharebasis.moments.store import Accumulators
from sharebasis.pipeline.paths import COMPRESSED, SUBLAYERS, WEIGHTS
from sharebasis.stages.calibrate.track import start_calibrating
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source

MIB = 2**20
ROUNDS, BATCH, WINDOW = 4, 4, 512

Measured = dict[str, float]


def dense() -> PreTrainedModel:
    return load_model(WEIGHTS, "float32", torch.device("cpu"))


def text() -> torch.Tensor:
    return torch.randint(0, 1000, (BATCH, WINDOW))


def calibrating(model: PreTrainedModel) -> Accumulators:
    """Set up a model as the stage `calibrate` does."""
    sublayers = load_record(SUBLAYERS, Classification).selected
    return start_calibrating(model, sublayers, text()[:1, :PROBE_TOKENS])[1]


def measure_time(_: Path) -> Measured:
    bare, wrapped, windows = dense(), dense(), text()
    calibrating(wrapped)
    runs = {
        "bare": lambda: bare(windows, use_cache=False),
        "calibrating": lambda: run_blocks(wrapped, windows),
    }
    seconds = dict.fromkeys(runs, 0.0)
    for i in range(ROUNDS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name] += (time.perf_counter() - began) * (i > 0)  # the first is a warm-up
    return {"ratio": seconds["calibrating"] / seconds["bare"]}


def measure_bare_memory(_: Path) -> Measured:
    return peak_of(lambda: run_blocks(dense(), text()))


def measure_calibration_memory(_: Path) -> Measured:
    def run() -> float:
        model = dense()
        accumulators = calibrating(model)
        for _ in range(ROUNDS):
            run_blocks(model, text())
        return sum(one.total.nbytes for one in accumulators.values()) / MIB

    moments: list[float] = []
    return peak_of(lambda: moments.append(run())) | {"moments": moments[0]}


def measure_load_memory(_: Path) -> Measured:
    sizes = [path.stat().st_size / MIB for path in COMPRESSED.glob("*.safetensors")]
    result = peak_of(lambda: load_compressed(COMPRESSED))
    return result | {"files": sum(sizes), "largest": max(sizes)}


def measure_extract_memory(checkpoint: Path) -> Measured:
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as target:
        extract(find_source(str(checkpoint)), Path(target) / "weights")
    return {"resident": peak()}


def peak_of(run: Callable[[], object]) -> Measured:
    before = peak()
    run()
    return {"peak": peak() - before}


def peak() -> float:
    """Most memory that this process ever had resident, in MiB.

    Not ru_maxrss: a child starts with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024


def write_checkpoint(directory: Path, gigabytes: float) -> None:
    """A Llama of random weights in shards of half a gigabyte, one shard at a time in memory."""
    shape = (8192, 2048)
    per_shard, n_shards = 8, max(1, round(gigabytes * 2**30 / (8 * 8192 * 2048 * 4)))
    LlamaConfig(hidden_size=2048, intermediate_size=8192).save_pretrained(directory)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        tensors = {
            f"model.layers.{i * per_shard + j}.mlp.up_proj.weight": torch.randn(shape)
            for j in range(per_shard)
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})


MEASUREMENTS = {
    "time": measure_time,
    "bare": measure_bare_memory,
    "calibration": measure_calibration_memory,
    "load": measure_load_memory,
    "extract": measure_extract_memory,
}


def in_own_process(name: str, checkpoint: Path) -> Measured:
    command = [sys.executable, __file__, "--measure", name, "--checkpoint", str(checkpoint)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, default=Path(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with torch.no_grad():
            print(json.dumps(MEASUREMENTS[arguments.measure](arguments.checkpoint)))
        return
    with tempfile.TemporaryDirectory(dir=WEIGHTS.parent) as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, arguments.gigabytes)
        found = {name: in_own_process(name, checkpoint) for name in MEASUREMENTS}
        size = sum(path.stat().st_size for path in checkpoint.iterdir()) / MIB
    calibration, load = found["calibration"], found["load"]
    allowed = found["bare"]["peak"] + calibration["moments"]
    on_disk = load["files"] + load["largest"]
    table = Table(title="Costs")
    for column in ("what", "against", "ratio"):
        table.add_column(column, justify="right" if column == "ratio" else "left")
    table.add_row("calibrating pass", "bare forward pass", f"{found['time']['ratio']:.2f}")
    table.add_row(
        f"calibration, peak {calibration['peak']:.0f} MiB",
        f"model + one batch + moments, {allowed:.0f} MiB",
        f"{calibration['peak'] / allowed:.2f}",
    )
    table.add_row(
        f"load_compressed, peak {load['peak']:.0f} MiB",
        f"its files + one shard, {on_disk:.0f} MiB",
        f"{load['peak'] / on_disk:.2f}",
    )
    resident = found["extract"]["resident"]
    table.add_row(
        f"extract, resident {resident:.0f} MiB",
        f"checkpoint of {size:.0f} MiB",
        f"{resident / size:.2f}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
