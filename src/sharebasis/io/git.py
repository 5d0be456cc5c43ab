"""What git says, or an error; or what it knows, or nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sharebasis.errors import GitError

PATIENCE = 60.0
"""Seconds until git counts as not knowing."""


def git(directory: Path, *arguments: str, timeout: float | None = None) -> str:
    """What a git command prints.

    Raises:
        GitError: git refuses; with its words. Or there is none, or it takes too long.
    """
    command = ["git", *arguments]
    try:
        ran = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=False, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GitError(f"{' '.join(command)} cannot run in {directory}: {error}") from None
    if ran.returncode:
        raise GitError(f"{' '.join(command)} failed in {directory}: {ran.stderr.strip()}")
    return ran.stdout.strip()


def known_to_git(directory: Path, *arguments: str) -> str | None:
    """The same; None where it fails, there is no repository, or no git."""
    try:
        return git(directory, *arguments, timeout=PATIENCE)
    except GitError:
        return None
