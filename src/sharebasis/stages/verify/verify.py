"""Prove what was lost: a lossless wrap, then the compressed model against the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharebasis.errors import WeightsError
from sharebasis.linalg.fidelity import Fidelity, FidelityMeter
from sharebasis.linalg.rows import Rows
from sharebasis.model.surgery import wrapped
from sharebasis.runtime.console import print_tables
from sharebasis.runtime.matmul import FastestLinear
from sharebasis.runtime.progress import progress


@torch.no_grad()
def lossless_difference(
    model: PreTrainedModel,
    rows: Mapping[str, Sequence[Rows]],
    windows: Int64[Tensor, "windows window"],
) -> float:
    """The largest absolute difference that wrapping alone makes to any logit.

    Args:
        model: dense; it has its own modules back afterwards.
        rows: HF name -> rows of its parts, for every sublayer to wrap.
        windows: token ids, run one window at a time.
    """
    largest = 0.0
    for window in windows.split(1):
        original = _logits(model, window)
        with wrapped(model, rows):
            largest = max(largest, (_logits(model, window) - original).abs().max().item())
    return largest


@torch.no_grad()
def compare(
    original: PreTrainedModel,
    compressed: Mapping[str, PreTrainedModel],
    windows: Int64[Tensor, "windows window"],
    batch: int,
) -> Mapping[str, Fidelity]:
    """Compare models with the original on text; the original runs once for all of them.

    Args:
        original: the dense model.
        compressed: by the names that the result will have.
        windows: token ids, one sequence a row.
        batch: windows a forward pass.

    Raises:
        WeightsError: a logit of any of them is not finite.
    """
    meters = {name: FidelityMeter() for name in compressed}
    with progress("verify", windows.numel(), "tokens") as advance, FastestLinear():
        for chunk in windows.split(batch):
            dense = _logits(original, chunk)
            for name, model in compressed.items():
                logits = _logits(model, chunk)
                for window in zip(dense, logits, chunk.to(dense.device), strict=True):
                    meters[name].update(*window)
            advance(chunk.numel())
    return {name: meter.result() for name, meter in meters.items()}


@torch.no_grad()
def continuations(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int,
) -> dict[str, str]:
    """Let every model continue a prompt greedily."""
    texts = {}
    for name, model in models.items():
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        generator: Any = model  # generate is typed for a mixin alone
        output = generator.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        texts[name] = str(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def side_by_side(prompt: str, texts: Mapping[str, str]) -> None:
    """Print continuations in columns."""
    table = Table(title=f"“{prompt}” goes on", show_lines=True)
    for name in texts:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*texts.values())
    print_tables(table)


def verify_metrics(
    fidelity: Mapping[str, Fidelity], lossless: float, n_modules: int, lossless_windows: int
) -> dict[str, Any]:
    """metrics/verify.json: a section for each model of `fidelity`."""
    first = next(iter(fidelity.values()))
    return {
        "lossless": {
            "max_abs_logit_diff": lossless,
            "n_modules": n_modules,
            "windows": lossless_windows,
        },
        "dense": {"perplexity": first.dense_perplexity},
        **{name: _section(measured) for name, measured in fidelity.items()},
        "n_predictions": first.n_predictions,
    }


def _section(fidelity: Fidelity) -> dict[str, Any]:
    return {
        "perplexity": fidelity.compressed_perplexity,
        "kl_mean": fidelity.kl_mean,
        "kl_p99": fidelity.kl_p99,
        "top1_agreement": fidelity.top1_agreement,
        "max_abs_logit_diff": fidelity.max_abs_logit_diff,
    }


def _logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=windows.to(model.device), use_cache=False).logits
    # A sum is one pass over what may be the largest tensor of all, and NaN or infinite if any is.
    if not logits.sum(dtype=torch.float32).isfinite():
        raise WeightsError(
            f"Logits of the {type(model).__name__} hold NaN or infinite values in {model.dtype}; "
            "model.dtype=float32 is the safest."
        )
    return logits
