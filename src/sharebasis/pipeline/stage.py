"""What every script has around it: logging, memory, and errors that a person can read."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from sharebasis.errors import ShareBasisError
from sharebasis.pipeline.ledger import recorded
from sharebasis.runtime.malloc import keep_freed_memory

P = ParamSpec("P")


def report_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Let a script end with one line and status 1 where bad input or the machine stops it."""
    script = Path(main.__code__.co_filename).stem

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("sharebasis").setLevel(logging.INFO)
        keep_freed_memory()
        try:
            with recorded(script):
                main(*args, **kwargs)
        except ShareBasisError as error:
            sys.exit(f"{type(error).__name__}: {error}")

    return run
