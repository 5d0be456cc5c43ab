"""The lossless wrap on SmolLM2-135M and on a full-size GPT-2 of random weights.

    python benchmarks/lossless.py        after `make repro`

Wraps every linear sublayer of every block, compresses nothing, and prints the largest
difference of any logit from the unwrapped model in float32, for each split strategy.
"""

from __future__ import annotations

from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.config.types import SplitStrategy
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_model, load_tokenizer
from sharebasis.pipeline.paths import WEIGHTS
from sharebasis.stages.verify.verify import lossless_difference

STRATEGIES: tuple[SplitStrategy, ...] = get_args(SplitStrategy)
WINDOWS, WINDOW = 2, 512


def random_gpt2() -> PreTrainedModel:
    """GPT-2 small; its biases too are random, since a fresh model's are all zero."""
    model = GPT2LMHeadModel(GPT2Config()).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def main() -> None:
    torch.manual_seed(0)
    n_tokens = len(load_tokenizer(WEIGHTS))
    models = {
        "SmolLM2-135M-Instruct": load_model(WEIGHTS, "float32", torch.device("cpu")),
        "GPT-2 (124M, random weights)": random_gpt2(),
    }
    table = Table(title="Lossless wrap, float32: largest absolute logit difference")
    for column in ("model", "split", "modules", "parts", "max |Δ logit|"):
        table.add_column(column)
    for name, model in models.items():
        windows = torch.randint(0, min(n_tokens, model.config.vocab_size), (WINDOWS, WINDOW))
        for strategy in STRATEGIES:
            rows = rows_by_sublayer(split_selected(classify_model(model), strategy))
            difference = lossless_difference(model, rows, windows)
            n_parts = sum(len(parts) for parts in rows.values())
            table.add_row(name, strategy, str(len(rows)), str(n_parts), f"{difference:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
