"""What compressed models write: continuations of held-out text, and answers to a few requests.

Each as the likeliest tokens (greedy) and drawn at temperature 0.7. Of every text: what the original
thinks of it (its loss, nats a token), and how much of it repeats itself: rep-4, the fraction of
4-grams that have been there before (Welleck et al., arXiv:1908.04319). Greedy text of small models
repeats itself without being compressed, too: compare with the first row. After `make repro`:

    python benchmarks/generation.py [MODEL ...] [--show 3]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from sharebasis import load_compressed
from sharebasis.data.windows import read_windows
from sharebasis.model.hub import load_model, load_tokenizer
from sharebasis.pipeline.compose import compose_settings
from sharebasis.pipeline.paths import COMPRESSED, WEIGHTS
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.console import print_tables
from sharebasis.runtime.devices import pick_device

REQUESTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a short letter thanking a neighbour for watering the plants.",
    "What are the main duties of a government?",
    "Tell a bedtime story about a fox who wants to learn to swim.",
    "How do I make vegetable soup?",
    "Name five animals that live in the sea.",
    "What is the difference between weather and climate?",
    "Give me three tips for learning a language.",
    "Describe a walk through an old town at night.",
    "Why should people vote?",
    "Summarise what a library is for.",
    "Write an invitation to a birthday party in the garden.",
)
BEGINNING = 32
"""Tokens of a held-out window that are continued."""
DECODING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0},
}
N_GRAM = 4


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote after one prompt."""

    tokens: tuple[int, ...]
    loss: float
    """Of the original, nats a token."""

    @property
    def repeated(self) -> float:
        """rep-4."""
        grams = [self.tokens[i : i + N_GRAM] for i in range(len(self.tokens) - N_GRAM + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, beginnings: Tensor, device: torch.device
) -> Iterator[tuple[str, BatchEncoding]]:
    """Kind and tokens of the prompts, padded on the left."""
    texts = {"continuation": [str(tokenizer.decode(own)) for own in beginnings]}
    if tokenizer.chat_template:
        chats = ([{"role": "user", "content": own}] for own in REQUESTS)
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        texts["answer"] = [str(tokenizer.apply_chat_template(own, **how)) for own in chats]
    for kind, own in texts.items():
        special = {"add_special_tokens": False, "padding": True, "padding_side": "left"}
        yield kind, tokenizer(own, return_tensors="pt", **special).to(device)


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    original: PreTrainedModel,
    prompts: BatchEncoding,
    decoding: Mapping[str, Any],
    n_tokens: int,
    seed: int,
) -> Iterator[Written]:
    """What follows on each of the prompts, up to the end that the model gives it."""
    torch.manual_seed(seed)
    generate: Any = model.generate  # transformers types it for models of another base
    whole = generate(**prompts, max_new_tokens=n_tokens, **decoding)
    n = prompts["input_ids"].shape[1]
    new = whole[:, n:]
    mask = pad(prompts["attention_mask"], (0, new.shape[1]), value=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = original(whole, attention_mask=mask, position_ids=positions).logits[:, n - 1 : -1]
    losses = cross_entropy(logits.float().transpose(1, 2), new, reduction="none")
    ends = torch.tensor(model.generation_config.eos_token_id, device=new.device)
    for tokens, loss in zip(new, losses, strict=True):
        end = torch.isin(tokens, ends).nonzero()
        stop = int(end[0]) + 1 if len(end) else len(tokens)
        yield Written(tuple(tokens[:stop].tolist()), loss[:stop].mean().item())


def row(name: str, kind: str, how: str, written: Sequence[Written]) -> tuple[str, ...]:
    losses = statistics.fmean(own.loss for own in written)
    repeated = [own.repeated for own in written]
    half = sum(own > 0.5 for own in repeated)
    return name, kind, how, f"{losses:.2f}", f"{statistics.fmean(repeated):.2f}", str(half)


def show(
    tokenizer: PreTrainedTokenizerBase, title: str, prompts: BatchEncoding, texts: Sequence[Written]
) -> None:
    for prompt, text in zip(prompts["input_ids"], texts, strict=False):
        asked = str(tokenizer.decode(prompt, skip_special_tokens=True))
        answer = tokenizer.decode(list(text.tokens), skip_special_tokens=True)
        print(f"--- {title}\n{asked}\n...{answer}\n")


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, default=[COMPRESSED])
    parser.add_argument("--original", type=Path, default=WEIGHTS)
    parser.add_argument("--tokens", type=int, default=128, help="that are written, at most")
    parser.add_argument("--show", type=int, default=0, help="texts of each kind to print")
    arguments = parser.parse_args()
    settings = compose_settings([f"data.evaluation.windows={len(REQUESTS)}"])
    device, tokenizer = pick_device(settings.device), load_tokenizer(arguments.original)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    windows = read_windows(tokenizer, settings.data, "evaluation", settings.seed)
    original = load_model(arguments.original, settings.model.dtype, device)
    models = {"original": original}
    models |= {str(own): load_compressed(own, device=device) for own in arguments.models}
    table = Table(title=f"{len(REQUESTS)} texts of at most {arguments.tokens} tokens")
    for column in ("model", "text", "tokens", "loss, original's", "rep-4", "rep-4 > 0.5"):
        table.add_column(column, justify="right" if len(table.columns) > 2 else "left")
    for kind, prompts in prompts_of(tokenizer, windows[:, :BEGINNING], device):
        for how, decoding in DECODING.items():
            for name, model in models.items():
                rest = decoding, arguments.tokens, settings.seed
                written = list(write(model, original, prompts, *rest))
                table.add_row(*row(name, kind, how, written))
                show(tokenizer, f"{name}, {how}", prompts, written[: arguments.show])
    print_tables(table)


if __name__ == "__main__":
    main()
