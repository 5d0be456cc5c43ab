"""What the stage `vary` costs on a model of some shape, from one pair of layers:

    python benchmarks/variation.py [--layers 36 --d-model 2560 --d-mlp 9728 --heads 32 --kv-heads 8]

A checkpoint of two layers of random weights is written, and one pair of it read and aligned as
the stage does it. All numbers are independent, which is the hardest
case for the assignment of neurons. What the whole model would take is that times its pairs:
consecutive ones, or all; random weights beside it double the consecutive ones.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

from sharebasis.gauge.alignment import distances
from sharebasis.gauge.layers import Layers
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, meta_model


def write_checkpoint(directory: Path, config: LlamaConfig) -> None:
    config.save_pretrained(directory)
    shapes = {name: x.shape for name, x in meta_model(config).named_parameters()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items() if ".layers." in name}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--d-model", type=int, default=2560)
    parser.add_argument("--d-mlp", type=int, default=9728)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--d-head", type=int, default=128)
    parser.add_argument("--alignment", choices=("none", "tied", "exact"), default="exact")
    arguments = parser.parse_args()
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=arguments.d_model,
        intermediate_size=arguments.d_mlp,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.d_head,
        vocab_size=32,
    )
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch), config)
        config = load_config(Path(scratch))
        layers = Layers(DenseWeights(Path(scratch)), classify_model(meta_model(config)), config)
        times = [time.perf_counter()]
        first, second = layers.read(0), layers.read(1)
        times.append(time.perf_counter())
        busy = time.process_time()
        distances(second, first, layers.freedom(1), arguments.alignment)
        times.append(time.perf_counter())
        busy = time.process_time() - busy
    reading, aligning = (after - before for before, after in pairwise(times))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    n, pair = arguments.layers, reading + aligning
    table = Table(title=f"One pair of layers, {torch.get_num_threads()} threads")
    for column in ("what", "cost"):
        table.add_column(column, justify="right" if column == "cost" else "left")
    table.add_row("reading two layers", f"{reading:.1f} s")
    table.add_row(f"distances, alignment {arguments.alignment}", f"{aligning:.1f} s")
    table.add_row("processor time of that", f"{busy:.1f} s")
    table.add_row("peak memory of the process", f"{peak:.1f} GiB")
    table.add_row(
        f"{n} layers, pairs=consecutive, with random weights", f"{2 * (n - 1) * pair / 60:.0f} min"
    )
    table.add_row(
        f"{n} layers, pairs=all, with random weights",
        f"{(n * (n - 1) / 2 + n - 1) * pair / 60:.0f} min",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
