"""Stage `decompose`: weights and moments -> factors of every rank."""

from pathlib import Path

from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.schema import Settings
from sharebasis.io.records import load_record
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compute import start_computing
from sharebasis.pipeline.paths import MOMENTS, SPECTRA, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.stage import stage
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.structures.layer_distances import read_table


@stage
def main(settings: Settings) -> None:
    device = start_computing(settings)
    classification = load_record(SUBLAYERS, Classification)
    parts = split_selected(classification, settings.split.strategy)
    distances = None
    if settings.grouping.by == "by_distance":
        distances = read_table(Path(settings.grouping.tracked))["aligned"]
    artefacts = WEIGHTS, classification, parts, MomentStore(MOMENTS), settings.fit, SPECTRA
    decompose(*artefacts, device, distances)


if __name__ == "__main__":
    main()
