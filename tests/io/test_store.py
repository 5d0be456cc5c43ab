"""Artefacts appear whole or not at all, and say what is wrong with them."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunPython, contents
from safetensors.torch import load_file, save_file

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.sublayers import Classification, Sublayer
from sharebasis.compressed.index import FORMAT, CompressedGroup, CompressedIndex, CompressedPart
from sharebasis.errors import StoreError, WeightsError
from sharebasis.io.atomic import require_disk, writing
from sharebasis.io.manifest import Manifest, TensorOrigin
from sharebasis.io.records import load_record, read_json, save_record, write_json
from sharebasis.io.tensor_files import TensorReader, TensorWriter
from sharebasis.linalg.rows import Rows
from sharebasis.model.sites import Site
from sharebasis.moments.store import MomentIndex

OLD = {"a.txt": b"old a", "b.txt": b"old b"}
NEW = {"b.txt": b"new b", "c.txt": b"new c"}


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    """A directory that holds OLD, alone in its parent."""
    directory = tmp_path / "parent" / "artefact"
    with writing(directory) as out:
        _fill(out, OLD)
    return directory


def _fill(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _is_alone(directory: Path) -> bool:
    return list(directory.parent.iterdir()) == [directory]


def _write_and_raise(directory: Path, error: type[BaseException]) -> None:
    with writing(directory) as out:
        _fill(out, NEW)
        raise error


# Directories


def test_writing_replaces_a_directory_whole(artefact: Path) -> None:
    with writing(artefact) as out:
        _fill(out, NEW)
        assert contents(artefact) == OLD
    assert contents(artefact) == NEW
    assert _is_alone(artefact)


def test_a_link_stays_and_what_it_leads_to_is_replaced(artefact: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "artefact"
    link.parent.mkdir()
    link.symlink_to(artefact)
    for content in (NEW, OLD):
        with writing(link) as out:
            _fill(out, content)
        assert link.is_symlink()
        assert contents(artefact) == content
        assert _is_alone(artefact)
        assert _is_alone(link)


def test_a_leftover_that_cannot_be_removed_is_told_before_anything_is_written(
    artefact: Path, tmp_path: Path
) -> None:
    leftover = artefact.parent / ".artefact.old"
    leftover.symlink_to(tmp_path)
    with (
        pytest.raises(StoreError, match=r"\.artefact\.old.*remove it and run again"),
        writing(artefact),
    ):
        pytest.fail("it has begun")
    assert contents(artefact) == OLD


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content_and_nothing_else(
    artefact: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        _write_and_raise(artefact, error)
    assert contents(artefact) == OLD
    assert _is_alone(artefact)


def test_an_exception_leaves_no_directory_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        _write_and_raise(tmp_path / "deep" / "new", KeyError)
    assert contents(tmp_path) == {}


WRITE_AND_DIE = """
    import os, signal, sys
    from pathlib import Path
    from sharebasis import store, tensor_store

    with store.writing(Path(sys.argv[1])) as out:
        (out / "c.txt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_the_middle_leaves_the_old_content_and_the_next_run_succeeds(
    artefact: Path, run_python: RunPython
) -> None:
    assert run_python(WRITE_AND_DIE, artefact).returncode == -signal.SIGKILL
    assert contents(artefact) == OLD
    assert not _is_alone(artefact)  # what was half written is still there
    with writing(artefact) as out:
        assert contents(out) == {}
        _fill(out, NEW)
    assert contents(artefact) == NEW
    assert _is_alone(artefact)


# Forks a child that is killed at its n-th call of a C function, for every n until one lives.
KILL_EVERYWHERE = """
    import json, os, signal, sys
    from pathlib import Path
    from sharebasis import store, tensor_store

    directory = Path(sys.argv[1])
    os.fsync = lambda _: None  # slow, and no matter to a kill that leaves the machine running

    def write(text):
        with store.writing(directory) as out:
            (out / "one").write_text(text)
            (out / "two").write_text(text)

    def read():
        return sorted((path.name, path.read_text()) for path in directory.iterdir())

    def die_at(n):
        left = n

        def count(frame, event, argument):
            nonlocal left
            if event in ("c_call", "c_return"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)

    n, seen, between = 0, [], 0
    while True:
        n += 1
        write("old")
        child = os.fork()
        if child == 0:
            die_at(n)
            write("new")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        between += not directory.exists()
        store.recover(directory)
        seen.append(read())
        assert list(directory.parent.iterdir()) == [directory], n
        if status == 0:
            break
    print(json.dumps({"seen": seen, "between": between}))
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_content(
    tmp_path: Path, run_python: RunPython
) -> None:
    run = run_python(KILL_EVERYWHERE, tmp_path / "parent" / "artefact")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    old, new = ([[name, text] for name in ("one", "two")] for text in ("old", "new"))
    assert all(state in (old, new) for state in report["seen"])
    assert report["seen"][0] == old
    assert report["seen"][-1] == new
    assert report["between"] > 0  # the kills between the two renames are among them


# A full disk

FILL_THE_DISK = """
    import resource, signal, sys, torch
    from pathlib import Path
    from sharebasis import store, tensor_store
    from sharebasis.errors import StoreError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        with store.writing(Path(sys.argv[1])) as out:
            if sys.argv[2] == "tensors":
                writer = tensor_store.TensorWriter(out, "tensors", 10**9)
                writer.add("large", torch.zeros(100_000))
                writer.flush()
            elif sys.argv[2] == "json":
                store.write_json(out / "large.json", list(range(100_000)))
            else:
                (out / "large").write_bytes(bytes(100_000))
    except StoreError as error:
        print(error)
"""


@pytest.mark.parametrize("what", ["tensors", "json", "bytes"])
def test_a_file_that_cannot_grow_is_told_as_a_full_disk(
    artefact: Path, run_python: RunPython, what: str
) -> None:
    run = run_python(FILL_THE_DISK, artefact, what)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("The disk is full: ")
    assert str(artefact.parent) in run.stdout
    assert "Free some space" in run.stdout
    assert contents(artefact) == OLD
    assert _is_alone(artefact)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_only_at_the_end_leaves_the_old_content(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="disk is full"), writing(artefact) as out:
        _fill(out, NEW)
    assert contents(artefact) == OLD
    assert _is_alone(artefact)


def test_json_on_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})
    (tmp_path / ".metrics.json.partial").symlink_to("/dev/full")  # a device that is always full
    with pytest.raises(StoreError, match="disk is full"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}


def test_other_refusals_of_the_system_are_not_told_as_a_full_disk(artefact: Path) -> None:
    with pytest.raises(PermissionError), writing(artefact):
        raise PermissionError(errno.EACCES, "no")


def test_what_cannot_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "there"
    require_disk(path, 1)
    with pytest.raises(StoreError, match=r"there needs 1000000000\.00 GB, but only .* are free"):
        require_disk(path, 10**18)


# Tensors


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


# Records

_SUBLAYER = Sublayer(
    name="model.layers.3.self_attn.q_proj",
    slot="model.layers.*.self_attn.q_proj",
    layer=3,
    weight_type="q_proj",
    family="q",
    type="Linear",
    shape=(16, 32),
    bias=True,
    role="read",
    evidence="shape",
)
RECORDS: dict[str, Any] = {
    "classification": Classification(
        "llama", Dims(32, 4, 2, 1, 16), ARCHITECTURES["gpt2"], (_SUBLAYER,)
    ),
    "manifest": Manifest(
        "org/name", "abc", (TensorOrigin("w", (2, 3), "F32", "00ff", "m.safetensors", "m.bin"),)
    ),
    "moments": MomentIndex(
        (Site("q", ("q", "k"), 32),), {"q": 7}, {"q.total": "moments-00001.safetensors"}
    ),
    "compressed": CompressedIndex(
        (
            CompressedGroup(
                "g", "q", 5, "g.basis", (CompressedPart("q", Rows(0, 16), "q.coefficient"),)
            ),
        ),
        {"g.basis": "sharebasis-00001.safetensors"},
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    record, path = RECORDS[name], tmp_path / "new" / "record.json"
    save_record(path, record)
    assert load_record(path, type(record)) == record


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_another_version_says_which_field_is_wrong(tmp_path: Path, name: str) -> None:
    record, path = RECORDS[name], tmp_path / "record.json"
    field, *_ = content = asdict(record)
    content[field] = {"surely": ["not"]}
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=rf"no {type(record).__name__} that .*\({field}") as raised:
        load_record(path, type(record))
    assert "dvc repro" in str(raised.value)


def test_a_compressed_model_of_a_later_format_is_refused(tmp_path: Path) -> None:
    record, path = RECORDS["compressed"], tmp_path / "record.json"
    save_record(path, record)
    assert load_record(path, CompressedIndex) == record
    path.write_text(json.dumps({**asdict(record), "format": FORMAT + 1, "unknown": 1}))
    with pytest.raises(StoreError, match=f"format {FORMAT + 1} is of a later version"):
        load_record(path, CompressedIndex)


@pytest.mark.parametrize("name", RECORDS)
def test_a_missing_record_says_what_writes_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match=r"record\.json is missing; run the stage"):
        load_record(tmp_path / "record.json", type(RECORDS[name]))


@pytest.mark.parametrize("content", [b"", b'{"half":', b"\x80\xff\x00"], ids=repr)
def test_a_file_that_is_not_json_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"record\.json is not JSON"):
        load_record(path, Manifest)
