"""Stage `decompose`: weights and moments -> factors of every rank."""

from pathlib import Path

from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.io.records import load_record
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.paths import MOMENTS, SPECTRA, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.devices import pick_device
from sharebasis.runtime.matmul import use_onednn
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.structures.layer_distances import read_table


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    classification = load_record(SUBLAYERS, Classification)
    parts = split_selected(classification, settings.split.strategy)
    device = pick_device(settings.device)
    distances = None
    if settings.grouping.by == "by_distance":
        distances = read_table(Path(settings.grouping.tracked))["aligned"]
    artefacts = WEIGHTS, classification, parts, MomentStore(MOMENTS), settings.fit, SPECTRA
    decompose(*artefacts, device, distances)


if __name__ == "__main__":
    main()
