"""Stage `fit`: factors of every rank -> compressed ShareLinear state within a budget."""

import torch

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.decomposition import Spectra
from sharebasis.fit_tables import RANKS, SPECTRUM, ranks_csv, spectrum_csv
from sharebasis.fitting import fit, fit_metrics
from sharebasis.provenance import write_metrics
from sharebasis.resources import pick_device
from sharebasis.stage import COMPRESSED, PLOTS, SPECTRA, WEIGHTS, report_errors


@report_errors
def main() -> None:
    settings = load_settings()
    device = pick_device(settings.device)
    fitted = fit(WEIGHTS, SPECTRA, settings.fit, COMPRESSED, device)
    energies = Spectra(SPECTRA).energies()
    with store.writing(PLOTS / "fit") as out:
        store.write_text(out / RANKS, ranks_csv(fitted))
        store.write_text(out / SPECTRUM, spectrum_csv(fitted, energies))
    spectra = torch.cat([torch.from_numpy(own) for own in energies])
    metrics = fit_metrics(fitted, settings.fit)
    write_metrics("fit", metrics, settings, device, weights=WEIGHTS, spectra=spectra)


if __name__ == "__main__":
    main()
