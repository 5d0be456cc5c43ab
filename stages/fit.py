"""Stage `fit`: losses of every rank -> compressed ShareLinear state within a budget."""

import torch

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.config.schema import Settings
from sharebasis.io.atomic import write_text, writing
from sharebasis.io.records import load_record
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compute import start_computing
from sharebasis.pipeline.paths import COMPRESSED, MOMENTS, PLOTS, SENSITIVITY, SPECTRA, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.stage import stage
from sharebasis.spectra.store import Spectra
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.fit.tables import RANKS, SPECTRUM, ranks_csv, spectrum_csv


@stage
def main(settings: Settings) -> None:
    device, moments = start_computing(settings), MomentStore(MOMENTS)
    sensitivity = load_record(SENSITIVITY, Sensitivity)
    fitted = fit(WEIGHTS, SPECTRA, settings.fit, COMPRESSED, device, moments, sensitivity)
    source = Spectra(SPECTRA)
    energies = list(source.energies.values())
    with writing(PLOTS / "fit") as out:
        write_text(out / RANKS, ranks_csv(fitted))
        write_text(out / SPECTRUM, spectrum_csv(source.baseline, energies))
    spectra = torch.cat([torch.from_numpy(of_cell) for of_cell in energies])
    metrics = fit_metrics(fitted, settings.fit)
    write_metrics("fit", metrics, settings, device, weights=WEIGHTS, spectra=spectra)


if __name__ == "__main__":
    main()
