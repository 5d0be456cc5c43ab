"""Every decoder family, small and of random weights, through the whole pipeline.

    python benchmarks/families.py [--dtype bfloat16] [FAMILY ...]

For each config of tests/families.yaml: how many linear sublayers are found and what they do
to the residual stream, how many parts each split strategy makes of them, the largest
difference that the wrap makes to a logit (as a fraction of the largest logit, over all
strategies, against transformers' own forward pass), whether calibrating, fitting and loading
the compressed directory go through, and how long all of it takes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from sharebasis import load_compressed
from sharebasis.architecture.parts import Part, rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.types import DType, SplitStrategy
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import DTYPES, load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.pipeline.compose import compose_settings
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.verify.verify import compare, lossless_difference

FAMILIES = Path(__file__).parents[1] / "tests" / "families.yaml"
STRATEGIES: tuple[SplitStrategy, ...] = get_args(SplitStrategy)
D_VOCAB, WINDOWS, WINDOW, BATCH = 128, 16, 32, 4
CPU = torch.device("cpu")


def save_random(name: str, sizes: Mapping[str, Any], directory: Path, dtype: DType) -> None:
    """A model with weights large enough to matter, in hub format."""
    config = AutoConfig.for_model(
        **{"model_type": name, **sizes},
        vocab_size=D_VOCAB,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(DTYPES[dtype]).save_pretrained(directory)


@torch.no_grad()
def run(name: str, sizes: Mapping[str, Any], work: Path, dtype: DType) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    save_random(name, sizes, work / "source", dtype)
    windows = torch.randint(1, D_VOCAB, (2 * WINDOWS, WINDOW))
    began = time.perf_counter()
    extract(find_source(str(work / "source")), work / "weights")
    found = classify_model(meta_model(load_config(work / "weights")))
    model = load_model(work / "weights", dtype, CPU)
    parts = {strategy: split_selected(found, strategy) for strategy in STRATEGIES}
    scale = model(input_ids=windows[:1]).logits.abs().max().item()
    lossless = max(
        lossless_difference(model, rows_by_sublayer(own), windows[:2]) for own in parts.values()
    )
    compress(work, found, parts["heads"], windows[:WINDOWS], dtype)
    small = load_compressed(work / "compressed")
    fidelity = compare(load_model(work / "weights", dtype, CPU), {"": small}, windows[WINDOWS:], 4)
    assert math.isfinite(fidelity[""].kl_mean)
    seconds = time.perf_counter() - began
    roles = Counter(sublayer.role for sublayer in found.sublayers)
    unknown = len(found.sublayers) - roles["read"] - roles["write"] - roles["neither"]
    return [
        name,
        *(str(roles[role]) for role in ("read", "write", "neither")),
        str(unknown),
        " / ".join(str(len(own)) for own in parts.values()),
        f"{lossless / scale:.0e}",
        f"{seconds:.1f}",
    ]


def compress(
    work: Path, found: Classification, parts: Sequence[Part], windows: Tensor, dtype: DType
) -> None:
    """The stages calibrate and fit."""
    model = load_model(work / "weights", dtype, CPU)
    checkpoint = Checkpoint(work / "checkpoint", {}, math.inf)
    accumulators = calibrate(model, found.selected, windows, BATCH, checkpoint, "text")
    write_moments(work / "moments", *accumulators)
    settings = compose_settings().fit
    moments = MomentStore(work / "moments")
    decompose(work / "weights", found, parts, moments, settings, work / "spectra", CPU)
    fit(work / "weights", work / "spectra", settings, work / "compressed", CPU, moments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    configs = yaml.safe_load(FAMILIES.read_text())
    columns = ("family", "read", "write", "neither", "unknown", "none / qkv / heads")
    table = Table(box=box.MARKDOWN)
    for column in (*columns, "Δ logit", "seconds"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for name in arguments.families or configs:
        with tempfile.TemporaryDirectory() as work:
            table.add_row(*run(name, configs[name], Path(work), arguments.dtype))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
