"""Tensors in shards: written whole, read in part, and what is damaged is named."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import contents
from safetensors.torch import load_file, save_file

from sharebasis.errors import StoreError, WeightsError
from sharebasis.io.tensor_files import TensorReader, TensorWriter


def test_shards_close_at_their_size_and_hold_every_tensor(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(5)}  # 400 bytes each
    writer = TensorWriter(tmp_path, "stem", shard_bytes=700)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.flush()
    files = [f"stem-{n:05d}.safetensors" for n in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert [writer.files[name] for name in tensors] == [files[i // 2] for i in range(5)]
    assert writer.n_numbers == 100 * len(tensors)
    stored = {name: t for file in files for name, t in load_file(tmp_path / file).items()}
    torch.testing.assert_close(stored, tensors, rtol=0, atol=0)


def test_flushing_with_nothing_pending_writes_nothing(tmp_path: Path) -> None:
    TensorWriter(tmp_path, "stem", 1).flush()
    assert contents(tmp_path) == {}


def test_a_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    fused = torch.randn(1000, 100)
    writer = TensorWriter(tmp_path, "stem", 10**9)
    writer.add("rows", fused[:3])
    writer.add("columns", fused[:, :3].T)
    assert len(pickle.dumps(writer)) < fused.nbytes / 10  # pickle writes whole storages
    expected = {"rows": fused[:3].clone(), "columns": fused[:, :3].T.clone()}
    fused.zero_()
    writer.flush()
    stored = load_file(tmp_path / "stem-00001.safetensors")
    torch.testing.assert_close(stored, expected, rtol=0, atol=0)


def test_a_name_is_written_once(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, "stem", 1)  # closes a shard after every tensor
    writer.add("weight", torch.zeros(2))
    with pytest.raises(StoreError, match="weight is written twice"):
        writer.add("weight", torch.ones(2))
    assert load_file(tmp_path / "stem-00001.safetensors")["weight"].tolist() == [0, 0]


def test_written_tensors_can_be_read_by_whoever_the_umask_allows(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, "stem", 1)
    writer.add("weight", torch.zeros(2))
    (tmp_path / "plain").touch()
    modes = {path.name: oct(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["stem-00001.safetensors"] == modes["plain"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards in hub format: `a` and `b` in the first, `c` in the second."""
    torch.manual_seed(0)
    save_file({"a": torch.randn(6, 4), "b": torch.randn(3)}, tmp_path / "1.safetensors")
    save_file({"c": torch.randn(2, 2)}, tmp_path / "2.safetensors")
    names = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_reading_takes_rows_columns_or_all(checkpoint: Path) -> None:
    a = load_file(checkpoint / "1.safetensors")["a"]
    reader = TensorReader.of_checkpoint(checkpoint)
    read = {
        "all": (reader.read("a"), a),
        "rows": (reader.read("a", slice(1, 3)), a[1:3]),
        "columns": (reader.read("a", columns=slice(2, 4)), a[:, 2:4]),
    }
    for name, (found, expected) in read.items():
        assert torch.equal(found, expected), name
        assert found.untyped_storage().nbytes() == expected.numel() * 4, name


def test_streaming_gives_every_tensor_of_every_shard(checkpoint: Path) -> None:
    expected = load_file(checkpoint / "1.safetensors") | load_file(checkpoint / "2.safetensors")
    streamed = list(TensorReader.of_checkpoint(checkpoint).stream())
    assert len(streamed) == len(expected)
    torch.testing.assert_close(dict(streamed), expected, rtol=0, atol=0)


def _truncate(n_bytes: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, n_bytes)


def _overwrite(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


DAMAGES = {
    "empty": (_truncate(0), r"\(0 bytes\) is truncated or no safetensors file"),
    "cut in the header": (_truncate(20), r"\(20 bytes\) is truncated or no safetensors file"),
    "cut in the data": (_truncate(200), r"\(200 bytes\) is truncated or no safetensors file"),
    "another format": (_overwrite, "is truncated or no safetensors file"),
    "missing": (Path.unlink, "is missing, though its index names it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda reader: reader.read("a"), id="read"),
        pytest.param(lambda reader: reader.read("a", slice(0, 1)), id="rows"),
        pytest.param(lambda reader: list(reader.stream()), id="stream"),
    ],
)
def test_a_damaged_shard_is_named(
    checkpoint: Path, damage: str, use: Callable[[TensorReader], object]
) -> None:
    reader = TensorReader.of_checkpoint(checkpoint)
    apply, text = DAMAGES[damage]
    apply(checkpoint / "1.safetensors")
    with pytest.raises(WeightsError, match=rf"1\.safetensors.*{text}"):
        use(reader)


@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)], ids=["all", "rows"])
def test_a_tensor_that_the_index_puts_in_the_wrong_file_is_named(
    checkpoint: Path, rows: slice
) -> None:
    reader = TensorReader(checkpoint, {"a": "2.safetensors"})
    with pytest.raises(WeightsError, match=r"\ba\b"):
        reader.read("a", rows)


def test_a_tensor_that_is_nowhere_is_named(checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match="holds no tensor nowhere"):
        TensorReader.of_checkpoint(checkpoint).read("nowhere")


def test_a_directory_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor"):
        TensorReader.of_checkpoint(tmp_path)


def test_an_index_without_a_weight_map_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises((StoreError, WeightsError), match=r"model\.safetensors\.index\.json"):
        TensorReader.of_checkpoint(tmp_path)
