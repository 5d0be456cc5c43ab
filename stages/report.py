"""Stage `report`: results/ and what the workspace measured -> tables, figures, an HTML page."""

from collections.abc import Sequence
from pathlib import Path

from sharebasis.config.schema import Settings
from sharebasis.io.atomic import write_text, writing
from sharebasis.pipeline.paths import REPORT, RESULTS
from sharebasis.pipeline.stage import stage
from sharebasis.stages.report.figures import figures
from sharebasis.stages.report.page import Section, page, section
from sharebasis.stages.report.panels import DETERMINED
from sharebasis.stages.report.points import FILE, Point, read_points, workspace_point
from sharebasis.stages.report.tables import point_tables, points_csv


@stage
def main(_: Settings) -> None:  # valid ones: a point is shown with parameters that hold
    files = sorted(RESULTS.glob(f"*/{FILE}"))
    results = {path.parent.name: read_points(path) for path in files}
    results["workspace"] = (workspace_point(),)
    with writing(REPORT) as out:
        sections = [write(name, points, out / name) for name, points in results.items()]
        write_text(out / "index.html", page(sections))
    n_points = sum(map(len, results.values()))
    print(f"{REPORT / 'index.html'}: {n_points} point{'' if n_points == 1 else 's'}")


def write(name: str, points: Sequence[Point], directory: Path) -> Section:
    directory.mkdir()
    write_text(directory / "points.csv", points_csv(points))
    for table in point_tables(points):
        write_text(directory / f"{table.name}.md", table.markdown())
        write_text(directory / f"{table.name}.tex", table.latex())
    drawn = figures(points)
    for figure_name, figure in drawn.items():
        for kind in ("pdf", "png"):
            figure.savefig(directory / f"{figure_name}.{kind}", **DETERMINED[kind])
    return section(name, points, drawn)


if __name__ == "__main__":
    main()
