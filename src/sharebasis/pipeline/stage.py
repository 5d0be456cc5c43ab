"""What every script has around it: settings, arguments, logging, errors that a person can read."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from sharebasis.config.schema import Settings
from sharebasis.errors import ShareBasisError
from sharebasis.pipeline.dvc_file import PIPELINE, data_of, outputs, read_stages
from sharebasis.pipeline.ledger import recorded
from sharebasis.pipeline.settings import PARAMS, load_settings
from sharebasis.runtime.malloc import keep_freed_memory

P = ParamSpec("P")


def stage(main: Callable[[Settings], None]) -> Callable[[], None]:
    """Make the script of a stage out of what it does by the settings of params.yaml.

    The script takes no argument but --help, which says what dvc.yaml has the stage read and write.
    """
    script = Path(main.__code__.co_filename)

    @functools.wraps(main)
    def run() -> None:
        _refuse_arguments(script, main.__globals__["__doc__"])
        _reporting(script.stem, lambda: main(load_settings()))

    return run


def report_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Let a script end with one line and status 1 where bad input or the machine stops it."""
    script = Path(main.__code__.co_filename).stem

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _reporting(script, lambda: main(*args, **kwargs))

    return run


def _reporting(script: str, call: Callable[[], None]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sharebasis").setLevel(logging.INFO)
    keep_freed_memory()
    try:
        with recorded(script):
            call()
    except ShareBasisError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _refuse_arguments(script: Path, docstring: str) -> None:
    """Print the help if that is asked for; end with one line if anything else is."""
    if not sys.argv[1:]:
        return
    called = f"stages/{script.name}"
    parser = argparse.ArgumentParser(
        usage=f"python {called}",
        description=f"{docstring}\n\n{_reads_and_writes(script)}",
        epilog="Run it from the repository's top; `dvc repro` runs the stages that have changed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _, unknown = parser.parse_known_args()
    if unknown:
        sys.exit(
            f"{called} takes no argument {unknown[0]!r}; it goes by {PARAMS}. --help says more."
        )


def _reads_and_writes(script: Path) -> str:
    """The diagram of dvc.yaml, for one stage."""
    entry = read_stages(script.parents[1] / PIPELINE)[script.stem]
    listed = {
        "reads": data_of(entry),
        f"parameters, in {PARAMS}": entry.get("params", ()),
        "writes": outputs(entry),
    }
    return "\n".join("\n  ".join([f"{title}:", *paths]) for title, paths in listed.items() if paths)
