"""SHA-256 of texts, JSON, files and directories. It loads no torch: a sweep hashes, too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(content: bytes | str) -> str:
    """SHA-256, in hexadecimal; a text counts as its UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def json_digest(content: Any) -> str:
    """Of what can be written as JSON, whatever the order of its keys."""
    return digest(json.dumps(content, sort_keys=True))


def path_digest(path: Path) -> str:
    """Of a file, which is read in blocks, or of a directory's names and files."""
    if path.is_dir():
        return json_digest({file.name: path_digest(file) for file in path.iterdir()})
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
