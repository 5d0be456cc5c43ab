"""The commands in README.md and docs/: list them, or try them in a fresh clone.

    python docs/check_commands.py                # every command, with its page
    python docs/check_commands.py --run fast     # what can be tried without computing

Of a command that computes, `fast` tries what a text can have wrong: that overrides compose to valid
settings, that a script exists and knows the options, that make has the target. Links between pages
are checked, too.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from os import environ
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md")
COMPOSE = """
import sys
from sharebasis.pipeline.compose import compose_settings
from sharebasis.sweep.points import expand
[compose_settings(point) for point in expand(sys.argv[1:])]
"""
SHELL = re.compile("&&|^PYTHONPATH=")
"""In commands that are listed, and not tried."""
EXAMPLES = "extending.md"
"""Its commands run what the reader has written by then, and are not tried."""


def commands(page: Path) -> Iterator[str]:
    """Those of the console blocks of a page, without the comments behind them."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if not line.startswith("$ "):
                raise SystemExit(f"{page.name}: {line!r} in a console block is no command.")
            yield line[2:].split("  #")[0].strip()


def broken_links(page: Path) -> Iterator[str]:
    """Links to files, or to headings of files, that do not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if target.startswith("http"):
            continue
        if not file.exists() or (heading and heading not in anchors(file)):
            yield f"{page.relative_to(ROOT)}: {target} does not exist"


def anchors(page: Path) -> set[str]:
    """Headings as GitHub addresses them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def trial(command: str) -> list[str] | None:
    """What is run to try a command fast; None where there is nothing to try."""
    words = shlex.split(command)
    python = sys.executable
    match words:
        case _ if SHELL.search(command):
            return None
        case ["make", *_]:
            return ["make", "--dry-run", *words[1:]]
        case ["dvc", "exp", "run", *rest]:
            overrides = [value for flag, value in pairwise(rest) if flag == "-S"]
            return [python, "-c", COMPOSE, *overrides] if overrides else None
        case ["dvc", "repro", stage]:
            return [python, "-m", "dvc", "dag", stage]
        case ["python", "-m", "sharebasis.sweep", *rest]:
            return [python, "-c", COMPOSE, *(word for word in rest if word != "-m")]
        case ["python", "-m", "sharebasis.params", *_]:
            return [python, *words[1:]]
        case ["python", "-m", "pytest", *_]:
            return [python, *words[1:], "--collect-only", "-q", "-p", "no:cacheprovider"]
        case ["python", "-m", *_]:
            return [python, *words[1:], "--help"]
        case ["python", script, *rest]:
            if (ROOT / script).exists() and "argparse" in (ROOT / script).read_text():
                return [python, script, *rest, "--help"]
            return [python, "-m", "py_compile", script]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", choices=["fast"], help="try them in a fresh clone")
    arguments = parser.parse_args()
    faults = [fault for page in PAGES for fault in broken_links(page)]
    listed = [(page, command) for page in PAGES for command in commands(page)]
    with tempfile.TemporaryDirectory() as clone:
        if arguments.run:
            subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        environment = {**environ, "PYTHONPATH": f"{clone}/src"}
        for page, command in listed:
            tried = trial(command) if arguments.run and page.name != EXAMPLES else None
            verdict, where = "", f"{page.relative_to(ROOT)}: {command}"
            if tried is not None:
                run = subprocess.run(
                    tried, cwd=clone, env=environment, capture_output=True, text=True
                )
                verdict = "FAILED" if run.returncode else "ok"
                faults += [f"{where}\n{run.stderr.strip()[-500:]}"] if run.returncode else []
            print(f"{verdict:7}{where}", flush=True)
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
