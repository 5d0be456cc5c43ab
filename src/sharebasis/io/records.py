"""Records of what a stage has found, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sharebasis.errors import StoreError
from sharebasis.io.atomic import write_text

Record = TypeVar("Record")


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that `path` is whole or as it was."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StoreError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; run the stage that writes it (dvc repro).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not JSON ({error}); remove it and run dvc repro.") from None


def save_record(path: Path, record: Any) -> None:
    """Write a record as JSON."""
    write_json(path, TypeAdapter(type(record)).dump_python(record, mode="json"))


def load_record(path: Path, record_type: type[Record]) -> Record:
    """Read a record back.

    Raises:
        StoreError: the file is missing, or another version of the code wrote it.
    """
    return record_of(path, read_json(path), record_type)


def record_of(path: Path, content: Any, record_type: type[Record]) -> Record:
    """A record, of what a file holds.

    Raises:
        StoreError: another version of the code wrote it.
    """
    try:
        return TypeAdapter(record_type).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise StoreError(
            f"{path} is no {record_type.__name__} that this version can read ({where or 'all'}: "
            f"{first['msg']}); run dvc repro to write it again."
        ) from None
