"""What a run depends on, as digests: a checkpoint belongs to the run of its identity alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sharebasis.io.hashing import digest, path_digest


def digest_of(content: Tensor | Path) -> str:
    """SHA-256 of a tensor's shape and numbers, of a file, or of all files of a directory."""
    if isinstance(content, Path):
        return path_digest(content)
    raw = content.contiguous().cpu().numpy().tobytes()
    return digest(f"{tuple(content.shape)}".encode() + raw)


def identity_of(settings: Any, windows: Tensor, **inputs: Tensor | Path) -> dict[str, object]:
    """What a run depends on: its settings, but for how often it is kept, its text and its inputs.

    Args:
        settings: a dataclass.
        windows: token ids.
        inputs: by name; digests stand for them.
    """
    named = {"windows": windows} | inputs
    return {
        "settings": {
            key: value for key, value in asdict(settings).items() if key != "checkpoint_seconds"
        },
        **{name: digest_of(content) for name, content in named.items()},
    }
