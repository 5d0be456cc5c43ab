"""What git knows, or nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(directory: Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails, there is no repository, or no git."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
