"""What stands for a file, a tensor or settings in an identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor


def digest_of(content: Tensor | Path) -> str:
    """SHA-256 of a tensor's shape and numbers, of a file, or of all files of a directory."""
    if isinstance(content, Tensor):
        raw = content.contiguous().cpu().numpy().tobytes()
        return hashlib.sha256(f"{tuple(content.shape)}".encode() + raw).hexdigest()
    if content.is_file():
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = {path.name: digest_of(path) for path in sorted(content.iterdir())}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def identity_of(settings: Any, windows: Tensor, **inputs: Tensor | Path) -> dict[str, object]:
    """What a run depends on: its settings, but for how often it is kept, its text and its inputs.

    Args:
        settings: a dataclass.
        windows: token ids.
        inputs: by name; digests stand for them.
    """
    own = asdict(settings).items()
    return {
        "settings": {key: value for key, value in own if key != "checkpoint_seconds"},
        **{name: digest_of(content) for name, content in ({"windows": windows} | inputs).items()},
    }
