"""Tables, figures and the page against the points they show."""

from __future__ import annotations

import csv
import io
import json
import re
import runpy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsing import PROBE, browse
from conftest import REPOSITORY, contents
from matplotlib.figure import Figure

from sharebasis.stages.report.figures import figures
from sharebasis.stages.report.page import page, section
from sharebasis.stages.report.points import Point, write_points
from sharebasis.stages.report.series import at_one_budget, labels, series
from sharebasis.stages.report.tables import (
    MISSING,
    PointTable,
    measured_columns,
    point_tables,
    points_csv,
)

FAMILIES = ("up", "q")
EVIL = "a_b & 50% of #1 | {x}^2 ~ \\ $<b>"


def make_point(method: str, removed: float, perplexity: float | None, **changes: Any) -> Point:
    """A point with numbers that no other has."""
    seed = len(method) + removed
    data = {"hash": "12ab", "own": None}
    provenance = {"commit": "c0ffee", "dirty": True, "parameters": f"p{seed}", "data": data}
    machine = {"device": "cpu (x)", "threads": 1, "dtype": "float32", "seed": 0}
    provenance |= machine | {"versions": {"torch": "9.9.9", "scipy": None}}
    families = {name: {"removed_fraction": removed / 2} for name in FAMILIES}
    fit = {"removed_fraction": removed + 1e-6, "stored_numbers": 12345678, "families": families}
    fit |= {"forms": {"masked": 2, "dense": 4, "of_tomorrow": 0}, "structures": {"private": 6}}
    compressed = {"perplexity": perplexity, "kl_mean": seed / 7, "top1_agreement": seed / 9}
    verify = {"dense": {"perplexity": 29.531234}, "compressed": compressed, "n_predictions": 511}
    return replace(
        Point(
            f"{method}-{removed}",
            "e" * 40,
            f"git checkout d00d && dvc exp run -S fit.removed={removed}",
            {
                "model": {"source": "org/small_model"},
                "fit": {"method": method, "removed": removed},
                "split": {"strategy": "none"},
            },
            {"fit": fit | {"provenance": [provenance]}, "verify": verify},
            {"artifacts/weights": "5eed.dir"},
            tuple(
                {
                    "family": name,
                    "layer": layer,
                    "parts": 1,
                    "rank": 8 * (1 - removed),
                    "full_rank": 8.0,
                    "stored": round(100 * (1 - removed)),
                    "original": 100,
                }
                for name in FAMILIES
                for layer in range(3)
            ),
            dict.fromkeys(FAMILIES, (1.0, 0.1 * removed, 0.01)),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def points() -> list[Point]:
    """Two methods at three budgets, one value missing, and one that stopped."""
    stopped = Point(EVIL, None, "true", {"fit": {"method": "auto", "removed": 0.6}}, {}, {})
    return [
        *(make_point("auto", removed, 30 + 100 * removed**2) for removed in (0.2, 0.5, 0.25)),
        *(make_point("svd_llm", removed, ppl) for removed, ppl in ((0.2, 90.4), (0.3, None))),
        make_point("svd_llm", 0.5, 1424.33),
        replace(stopped, error="BudgetError: too small"),
    ]


@pytest.fixture(scope="module")
def drawn(points: list[Point]) -> Mapping[str, Figure]:
    """All figures of them; not to be changed."""
    return figures(points)


# Lines of a figure


def test_a_label_says_in_what_points_of_a_method_differ() -> None:
    def own(method: str, budget: float, **settings: Any) -> Point:
        fit = {"method": method, "removed": budget, "two_sided": method == "auto", **settings}
        return Point("p", None, "", {"fit": fit, "split": {"strategy": "none"}}, {}, {})

    told = labels([own("auto", 0.2), own("auto", 0.3), own("svd", 0.2)])
    assert told == ["auto", "auto", "svd"]
    told = labels([own("share", 0.2, shared=["q", "k"]), own("share", 0.2, shared=[]), own("a", 1)])
    assert told == ["share, shared=q+k", "share, shared=none", "a"]


def test_one_budget_is_chosen_and_every_method_that_has_it(points: Sequence[Point]) -> None:
    assert list(series(points)["auto"]) == [points[0], points[2], points[1], points[6]]
    budget, chosen = at_one_budget(points)
    assert (budget, chosen) == (0.2, {"auto": points[0], "svd_llm": points[3]})
    budget, chosen = at_one_budget([points[0], points[1], points[5]])
    assert (budget, chosen) == (0.5, {"auto": points[1], "svd_llm": points[5]})
    assert at_one_budget(points[6:]) == (None, {})


# Tables


def test_the_csv_holds_every_number_in_full(points: Sequence[Point]) -> None:
    rows = list(csv.DictReader(io.StringIO(points_csv(points))))
    assert [row["point"] for row in rows] == [point.name for point in points]
    for row, point in zip(rows, points, strict=True):
        perplexity = point.metric("verify", "compressed", "perplexity")
        told = row["verify.compressed.perplexity"]
        assert told == ("" if perplexity is None else repr(perplexity))
        assert float(row["params.fit.removed"]) == point.parameter("fit.removed")
        assert row["command"] == point.command
    assert rows[0]["fit.provenance.commit"] == "c0ffee"
    assert rows[0]["fit.provenance.data.hash"] == "12ab"
    assert rows[0]["md5.artifacts/weights"] == "5eed.dir"


def _markdown(text: str) -> list[dict[str, str]]:
    table = [line for line in text.splitlines() if line.startswith("|")]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _latex(text: str) -> list[dict[str, str]]:
    body = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r" \\")]
    names, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in body]
    return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("write", "read"), [(PointTable.markdown, _markdown), (PointTable.latex, _latex)]
)
def test_the_tables_show_the_metrics(
    points: Sequence[Point],
    write: Callable[[PointTable], str],
    read: Callable[[str], list[dict[str, str]]],
) -> None:
    measured, families = point_tables(points)
    rows = read(write(measured))
    shown = [row["perplexity"] for row in rows]
    assert shown == ["34.00", "55.00", "36.25", "90.40", MISSING, "1,424.33", MISSING]
    assert {row["stored"] for row in rows} == {"12,345,678", MISSING}
    assert rows[6]["KL, nats"] == MISSING
    assert (rows[0]["forms"], rows[0]["structures"]) == ("4 dense, 2 masked", "6 private")
    assert [row["removed"] for row in rows[:3]] == ["0.2000", "0.5000", "0.2500"]
    kept = read(write(families))
    assert list(kept[0]) == ["point", "q", "up", "all"]  # in the order of a layer
    assert [kept[1][name] for name in ("q", "all")] == ["0.750", "0.500"]


def test_a_column_that_no_point_has_is_left_out(points: Sequence[Point]) -> None:
    titles = [column.title for column in measured_columns(points)]
    assert "perplexity, recovered" not in titles
    recovered = replace(points[0], metrics={"verify": {"recovered": {"perplexity": 31.0}}})
    assert "perplexity, recovered" in [column.title for column in measured_columns([recovered])]


def test_the_tables_name_the_models(points: Sequence[Point]) -> None:
    for table in point_tables(points):
        assert "org/small_model" in table.title
        assert table.markdown().startswith(f"**{table.title}**\n\n|")
        assert r"\caption{" in table.latex()
        assert r"org/small\_model" in table.latex()


def test_latex_says_special_characters_literally(points: Sequence[Point]) -> None:
    table = point_tables(points)[0].latex()
    assert r"a\_b \& 50\% of \#1" in table
    assert r"\{x\}\^{}2 \textasciitilde{} \textbackslash{} \$" in table
    lines = [line for line in table.splitlines() if line.endswith(r" \\")]
    ends = {len(re.findall(r"(?<!\\)&", line)) for line in lines}
    assert len(ends) == 1  # no row has a column more than another
    assert r"\begin{tabular}{lll" in table
    assert r"\toprule" in table


# Figures


def test_the_lines_of_the_figure_are_the_metrics(
    points: Sequence[Point], drawn: Mapping[str, Figure]
) -> None:
    left, right = drawn["quality"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert lines["auto"] == [[0.200001, 34.0], [0.250001, 36.25], [0.500001, 55.0]]
    assert lines["svd_llm"] == [[0.200001, 90.4], [0.500001, 1424.33]]  # what is missing is not 0
    assert lines["dense, 29.53"][0][1] == 29.531234
    kl = {line.get_label(): line.get_ydata().tolist() for line in right.lines}
    assert kl["svd_llm"] == [
        point.metric("verify", "compressed", "kl_mean") for point in points[3:6]
    ]


def test_a_line_that_is_far_off_does_not_hide_the_others(points: Sequence[Point]) -> None:
    off = [make_point("svd", removed, 3e7) for removed in (0.2, 0.5)]
    left, right = figures([*points, *off])["quality"].axes
    told = [line.get_label() for line in left.lines]
    assert told == ["auto", "svd_llm", "svd (above the axis)", "dense, 29.53"]
    assert left.get_ylim()[1] == pytest.approx(1.4 * 1424.33)
    assert all("above" not in str(line.get_label()) for line in right.lines)


def test_ranks_and_stored_numbers_are_those_of_the_cells(
    points: Sequence[Point], drawn: Mapping[str, Figure]
) -> None:
    q, up = drawn["ranks"].axes
    assert (q.get_title(), up.get_title()) == ("q", "up")
    assert {tuple(line.get_ydata()) for line in q.lines} == {(0.8,) * 3}
    texts = [text.get_text() for text in drawn["families"].axes[0].texts]
    assert texts == ["0.80"] * 6
    assert [line.get_ydata().tolist() for line in drawn["depth"].axes[0].lines] == [[0.8] * 3] * 2
    alone = figures(points[:1])
    assert "quality" not in alone
    heights = [bar.get_height() for bar in alone["depth"].axes[0].patches]
    assert heights == [80] * 6 + [40] * 3  # q and up of three layers, and what was removed of both
    assert figures(points[6:]) == {}


def test_what_a_structure_leaves_is_shown_beside_the_ranks(points: Sequence[Point]) -> None:
    widths = {"up": 0.7, "q": 1.0}
    cells = [{**cell, "width": widths[cell["family"]]} for cell in points[0].cells]
    *families, width = figures([replace(points[0], cells=tuple(cells))])["ranks"].axes
    assert [axes.get_title() for axes in families] == ["q", "up"]
    assert width.get_title() == "width"
    (line,) = width.lines
    assert line.get_xydata().tolist() == [[0, 0.7], [1, 0.7], [2, 0.7]]


@pytest.mark.parametrize("n_methods", [1, 2])
def test_what_has_no_rank_has_no_point_and_every_method_a_name(
    points: Sequence[Point], n_methods: int
) -> None:
    cells = tuple(
        {**cell, "rank": None if cell["family"] == "q" else cell["rank"]}
        for cell in points[0].cells
    )
    others = points[1:] if n_methods > 1 else ()
    figure = figures([replace(points[0], cells=cells), *others])["ranks"]
    q, up = figure.axes
    assert (len(q.lines), len(up.lines)) == (n_methods - 1, n_methods)
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {str(line.get_label()) for line in up.lines}


def test_the_page_counts_its_points(points: Sequence[Point]) -> None:
    for n, said in ((1, "1 point."), (2, "2 points.")):
        assert f"<p>{said} A click" in page([section("one", points[:n], {})])


def test_the_same_points_give_the_same_page(points: Sequence[Point]) -> None:
    once, again = (page([section("one", points[:4], figures(points[:4]))]) for _ in range(2))
    assert once == again


# The stage


@pytest.fixture
def workspace(tmp_path: Path, params: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's own metrics, and parameters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(dict(params)))
    shutil.copytree(REPOSITORY / "metrics", tmp_path / "metrics")
    return tmp_path


def _report() -> dict[str, bytes]:
    runpy.run_path(str(REPOSITORY / "stages/report.py"), run_name="__main__")
    return contents(Path("report"))


def test_without_results_the_workspace_is_reported(workspace: Path) -> None:
    written = _report()
    assert written == _report()
    assert {"index.html", "workspace/points.csv", "workspace/points.tex"} <= written.keys()
    (row,) = csv.DictReader(io.StringIO(written["workspace/points.csv"].decode()))
    verify = json.loads((REPOSITORY / "metrics/verify.json").read_text())
    told = row["verify.compressed.perplexity"]
    assert float(told) == verify["compressed"]["perplexity"]
    assert f"{float(told):.2f}" in written["workspace/points.md"].decode()


def test_results_are_reported_with_their_figures(workspace: Path, points: list[Point]) -> None:
    write_points("ladder", points, workspace / "results")
    written = _report()
    for name in ("quality", "ranks", "families", "depth", "spectrum"):
        assert written[f"ladder/{name}.pdf"].startswith(b"%PDF")
        assert b"CreationDate" not in written[f"ladder/{name}.pdf"]
        assert written[f"ladder/{name}.png"].startswith(b"\x89PNG")
    assert len(list(csv.DictReader(io.StringIO(written["ladder/points.csv"].decode())))) == 7


# The page in a browser


def test_the_page_renders_sorts_and_opens_in_chromium(
    points: list[Point], drawn: Mapping[str, Figure], tmp_path: Path
) -> None:
    html = page([section("ladder", points, drawn)])
    (tmp_path / "page.html").write_text(html.replace("</body>", PROBE + "</body>"))
    dom, console = browse(tmp_path / "page.html", tmp_path)
    assert console == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    seen = json.loads(text)
    values = [point.metric("verify", "compressed", "perplexity") for point in points]
    known = sorted(value for value in values if value is not None)
    shown = [f"{value:,.2f}" for value in known]
    assert seen["heads"] == [column.title for column in measured_columns(points)]
    assert seen["before"] == [MISSING if v is None else f"{v:,.2f}" for v in values]
    assert seen["rising"] == [*shown, MISSING, MISSING]
    assert seen["falling"] == [*reversed(shown), MISSING, MISSING]
    assert seen["names"][0] == EVIL  # text, and no element of the page
    assert seen["bold"] == 0
    assert sorted(seen["names"][1:]) == seen["names"][1:]
    assert seen["opened"] == [EVIL]
    assert "BudgetError: too small" in seen["behind"]
    assert len(seen["images"]) == 5
    assert min(seen["images"]) > 200
    assert seen["fetched"] == []


def test_an_error_on_the_console_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<body><script>nothing.at.all()</script></body>")
    _, console = browse(tmp_path / "page.html", tmp_path)
    assert any("nothing is not defined" in line for line in console)


def test_behind_every_number_stands_what_made_it(points: Sequence[Point]) -> None:
    html = page([section("ladder", points, {})])
    sources = ("c0ffee", "12ab", "torch 9.9.9", "5eed.dir", "cpu (x)", "changes that were not")
    for source in (*sources, "4 dense, 2 masked"):
        assert source in html
    assert "git checkout d00d &amp;&amp; dvc exp run -S fit.removed=0.2" in html
    assert not re.search(r'(src|href)="(?!#|data:)', html)
    assert "nan" not in re.findall(r'data-value="([^"]*)"', html)
