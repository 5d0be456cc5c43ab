"""Other text and other seeds: is a figure one of the method, or of the text it was tuned on?

Calibrates on WikiText and on speeches, evaluates each on both, held out; and calibrates on
several runs of windows of one file that do not overlap (a run is a seed), evaluated on two sets of
windows. What the work directory holds already, with the same --set, is not done again.

    python benchmarks/other_text.py --train train.txt --test test.txt
    python benchmarks/other_text.py --train train.txt --test test.txt --seeds 1 \
        --set calibrate.outliers.gradients.treatment=clip
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gathering import gather
from jaxtyping import Int64
from protocol_s import METHODS
from torch import Tensor

from sharebasis.architecture.parts import split_selected
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.schema import Settings
from sharebasis.data.sources import Use
from sharebasis.data.windows import read_windows
from sharebasis.io.records import read_json, write_json
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, load_tokenizer, meta_model
from sharebasis.pipeline.compose import compose_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.devices import pick_device
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.verify.verify import compare

ONE_SHOT = [name for name, own in METHODS.items() if all(one.startswith("fit") for one in own)]
"""Methods that are decompose and fit alone."""
WIKITEXT, SPEECHES = "WikiText", "speeches"
Windows = Int64[Tensor, "windows window"]
Found = Mapping[str, float]
"""Of one compressed model: its removed fraction, and its perplexity on every text; or, of the
original, the latter."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A run of windows of a text, and what is evaluated on after calibrating on it."""

    text: str
    seed: int
    windows: Windows
    evaluations: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.text}-{self.seed}-of-{len(self.windows)}"


def settings_of(
    arguments: argparse.Namespace, text: str, method: str = "auto", removed: float = 0.2
) -> Settings:
    wikitext = [
        "experiment=protocol_s",
        f"data.calibration.path={arguments.train}",
        f"data.evaluation.path={arguments.test}",
        f"data.calibration.windows={arguments.windows * arguments.seeds}",
        f"data.evaluation.windows={2 * arguments.evaluation_windows}",
    ]
    speeches = [
        "data=sotu",
        f"data.calibration.windows={arguments.speech_windows or arguments.windows}",
        f"data.evaluation.windows={arguments.evaluation_windows}",
    ]
    own = wikitext if text == WIKITEXT else speeches
    overrides = [*own, *METHODS[method], f"fit.removed={removed}", *arguments.set]
    return compose_settings(overrides)


def work_of(arguments: argparse.Namespace) -> Path:
    """Where everything but the weights lies; what was made with other settings lies elsewhere."""
    return arguments.work / ("+".join(sorted(arguments.set)).replace("/", "_") or "default")


def read(arguments: argparse.Namespace, text: str, use: Use) -> Windows:
    settings = settings_of(arguments, text)
    tokenizer = load_tokenizer(arguments.work / "weights")
    return read_windows(tokenizer, settings.data, use, settings.seed)


def evaluation_texts(arguments: argparse.Namespace) -> Mapping[str, Windows]:
    """The first windows of both texts, and of WikiText as many again."""
    n, test = arguments.evaluation_windows, read(arguments, WIKITEXT, "evaluation")
    names = f"{WIKITEXT} 0-{n - 1}", f"{WIKITEXT} {n}-{2 * n - 1}", f"{SPEECHES} 0-{n - 1}"
    return dict(zip(names, (*test.split(n), read(arguments, SPEECHES, "evaluation")), strict=True))


def calibrations(arguments: argparse.Namespace, texts: Sequence[str]) -> Iterator[Calibration]:
    """That of the speeches, and every seed of WikiText; the first is evaluated on everything."""
    first, second, speeches = texts
    runs = read(arguments, WIKITEXT, "calibration").split(arguments.windows)
    yield Calibration(WIKITEXT, 0, runs[0], (first, second, speeches))
    own = read(arguments, SPEECHES, "calibration")
    yield Calibration(SPEECHES, 0, own, (first, speeches))
    for seed, windows in enumerate(runs[1:], 1):
        yield Calibration(WIKITEXT, seed, windows, (first, second))


class Results:
    """What was measured, in a file for every compressed model."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def __getitem__(self, name: str) -> Found:
        path = self._work / f"{name}.json"
        return read_json(path) if path.exists() else {}

    def add(self, name: str, found: Found) -> None:
        write_json(self._work / f"{name}.json", {**self[name], **found})


def model_name(calibration: Calibration, method: str, removed: float) -> str:
    return f"{calibration.name}-{method}-{removed}"


def measure(arguments: argparse.Namespace, one: Calibration, texts: Mapping[str, Windows]) -> None:
    """What is missing of one calibration, method after method."""
    results, weights = Results(work_of(arguments)), arguments.work / "weights"
    for method in arguments.methods:
        removed = [
            own
            for own in arguments.removed
            if not {*one.evaluations} <= results[model_name(one, method, own)].keys()
        ]
        if not removed:
            continue
        settings = settings_of(arguments, one.text, method)
        device, own = pick_device(settings.device), work_of(arguments) / one.name
        model = classify_model(meta_model(load_config(weights)))
        moments = gather(weights, own, settings, model, one.windows)
        parts = split_selected(model, "none")
        decompose(weights, model, parts, moments, settings.fit, own / "spectra", device)
        for budget in removed:
            chosen = settings_of(arguments, one.text, method, budget).fit
            fitted = fit(weights, own / "spectra", chosen, own / str(budget), device, moments)
            found = {"removed": fit_metrics(fitted, chosen)["removed_fraction"]}
            results.add(model_name(one, method, budget), found)
        evaluate(arguments, one, method, removed, texts)
        for part in ("spectra", *map(str, removed)):
            shutil.rmtree(own / part)


def evaluate(
    arguments: argparse.Namespace,
    one: Calibration,
    method: str,
    removed: Sequence[float],
    texts: Mapping[str, Windows],
) -> None:
    """Every budget against the original, on every text that has not been measured yet."""
    settings, results = settings_of(arguments, one.text), Results(work_of(arguments))
    device, weights = pick_device(settings.device), arguments.work / "weights"
    dense = load_model(weights, "float32", device)
    models = {
        model_name(one, method, own): load_compressed(
            work_of(arguments) / one.name / str(own), device=device
        )
        for own in removed
    }
    for text in one.evaluations:
        missing = {name: own for name, own in models.items() if text not in results[name]}
        if not missing:
            continue
        for name, found in compare(dense, missing, texts[text], settings.data.batch).items():
            results.add(name, {text: found.compressed_perplexity})
            results.add("dense", {text: found.dense_perplexity})


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def report(arguments: argparse.Namespace, runs: Sequence[Calibration]) -> str:
    """Both tables, in Markdown."""
    results = Results(work_of(arguments))
    first, second, speeches = runs[0].evaluations
    lines = [
        row("calibrated on", "method", "removed", first, speeches),
        row("---", "---", *["---:"] * 3),
        row("(original)", "", "", *(f"{results['dense'][text]:.2f}" for text in (first, speeches))),
    ]
    points = [(method, own) for method in arguments.methods for own in arguments.removed]
    for method, removed in points:
        for one in runs[:2]:
            found = results[model_name(one, method, removed)]
            cells = (f"{found[text]:.2f}" for text in (first, speeches))
            name = f"{one.text}, {len(one.windows)} windows"
            shown = " ".join([method, *arguments.set])
            lines.append(row(name, shown, f"{found['removed']:.4f}", *cells))
    seeds = [one for one in runs if one.text == WIKITEXT]
    if len(seeds) > 1:
        lines += ["", row("evaluated on", "method", "asked", "mean", "std", "every seed")]
        lines.append(row("---", "---", *["---:"] * 4))
    for text in (first, second) if len(seeds) > 1 else ():
        for method, removed in points:
            found = [results[model_name(one, method, removed)][text] for one in seeds]
            mean, spread = statistics.fmean(found), statistics.stdev(found)
            each = ", ".join(f"{own:.2f}" for own in found)
            lines.append(row(text, method, removed, f"{mean:.2f}", f"{spread:.2f}", each))
    return "\n".join(lines)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="WikiText-2 raw, training split")
    parser.add_argument("--test", type=Path, required=True, help="WikiText-2 raw, test split")
    parser.add_argument("--methods", nargs="+", choices=ONE_SHOT, default=["auto"])
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--windows", type=int, default=128, help="of 512 tokens, to calibrate on")
    parser.add_argument("--speech-windows", type=int, help="the same of speeches, if not as many")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluation-windows", type=int, default=64)
    parser.add_argument("--set", nargs="+", default=[], help="further overrides of conf/")
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmarks/other_text"))
    arguments = parser.parse_args()
    source = settings_of(arguments, WIKITEXT).model.source
    extract(find_source(source), arguments.work / "weights")
    texts = evaluation_texts(arguments)
    runs = list(calibrations(arguments, list(texts)))
    for one in runs:
        measure(arguments, one, texts)
    print(report(arguments, runs))


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
