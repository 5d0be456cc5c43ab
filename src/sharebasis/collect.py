"""Collect DVC experiments for the report: `python -m sharebasis.collect NAME PATTERN...`."""

from __future__ import annotations

import argparse

from sharebasis.pipeline.stage import report_errors
from sharebasis.stages.report.experiments import collect
from sharebasis.stages.report.points import write_points


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Keep what experiments have measured.")
    parser.add_argument("name", help="of the directory in results/")
    parser.add_argument("patterns", nargs="+", help="names of experiments, as in a shell")
    arguments = parser.parse_args()
    points = collect(arguments.patterns)
    print(f"{write_points(arguments.name, points)}: {len(points)} points")


if __name__ == "__main__":
    main()
