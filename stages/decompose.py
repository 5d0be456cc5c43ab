"""Stage `decompose`: weights and moments -> factors of every rank."""

from pathlib import Path

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.decomposition import decompose
from sharebasis.kernels import use_onednn
from sharebasis.moment_store import MomentStore
from sharebasis.resources import pick_device
from sharebasis.splitting import split_selected
from sharebasis.stage import MOMENTS, SPECTRA, SUBLAYERS, WEIGHTS, report_errors
from sharebasis.sublayer import Classification
from sharebasis.value_outputs import value_outputs
from sharebasis.variation.table import read_table


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    classification = store.load_record(SUBLAYERS, Classification)
    parts = split_selected(classification, settings.split.strategy)
    device = pick_device(settings.device)
    distances = None
    if settings.grouping.by == "by_distance":
        distances = read_table(Path(settings.grouping.tracked))["aligned"]
    artefacts = WEIGHTS, parts, MomentStore(MOMENTS), settings.fit, SPECTRA
    decompose(*artefacts, device, distances, value_outputs(WEIGHTS, classification))


if __name__ == "__main__":
    main()
