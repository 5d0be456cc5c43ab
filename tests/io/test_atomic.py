"""Artefacts appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from conftest import RunPython, contents

from sharebasis.errors import StoreError
from sharebasis.io.artefact import TensorArtefact, TensorIndex
from sharebasis.io.atomic import require_disk, writing
from sharebasis.io.records import read_json, write_json

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
    from sharebasis.io import atomic, records, tensor_files

    with atomic.writing(Path(sys.argv[1])) as out:
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
    from sharebasis.io import atomic, records, tensor_files

    directory = Path(sys.argv[1])
    os.fsync = lambda _: None  # slow, and no matter to a kill that leaves the machine running

    def write(text):
        with atomic.writing(directory) as out:
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
        atomic.recover(directory)
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
    from sharebasis.io import atomic, records, tensor_files
    from sharebasis.errors import StoreError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        with atomic.writing(Path(sys.argv[1])) as out:
            if sys.argv[2] == "tensors":
                writer = tensor_files.TensorWriter(out, "tensors", 10**9)
                writer.add("large", torch.zeros(100_000))
                writer.flush()
            elif sys.argv[2] == "json":
                records.write_json(out / "large.json", list(range(100_000)))
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


@dataclass(frozen=True)
class Catalogue(TensorIndex):
    """An index with a field before and one after the files."""

    title: str
    files: Mapping[str, str]
    note: str = ""


CATALOGUE = TensorArtefact("catalogue.json", Catalogue, "page")


def _write_catalogue(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    with CATALOGUE.writing(directory, shard_bytes=1) as catalogue:
        for name, tensor in tensors:
            catalogue.add(name, tensor)
        catalogue.finish(lambda files: Catalogue("numbers", files, "none"))


def test_an_artefact_of_tensors_is_opened_as_it_was_written(tmp_path: Path) -> None:
    directory = tmp_path / "catalogue"
    assert not CATALOGUE.is_in(directory)
    _write_catalogue(directory, [("a", torch.arange(3)), ("b", torch.ones(2, 2))])
    assert CATALOGUE.is_in(directory)
    index, reader = CATALOGUE.open(directory)
    files = {"a": "page-00001.safetensors", "b": "page-00002.safetensors"}
    assert index == Catalogue("numbers", files, "none")
    assert list(json.loads((directory / "catalogue.json").read_text())) == [*asdict(index)]
    assert {name: tensor.tolist() for name, tensor in reader.stream()} == {
        "a": [0, 1, 2],
        "b": [[1, 1], [1, 1]],
    }


def test_an_artefact_that_is_not_finished_leaves_the_one_before(tmp_path: Path) -> None:
    directory = tmp_path / "catalogue"
    _write_catalogue(directory, [("a", torch.arange(3))])
    before = contents(directory)
    with pytest.raises(StoreError, match="b is written twice"):
        _write_catalogue(directory, [("b", torch.ones(2)), ("b", torch.ones(2))])
    assert contents(directory) == before


def test_an_artefact_that_is_missing_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"catalogue\.json is missing; run the stage"):
        CATALOGUE.open(tmp_path)
