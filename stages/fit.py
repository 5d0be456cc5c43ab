"""Stage `fit`: losses of every rank -> compressed ShareLinear state within a budget."""

import torch

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.decomposition import Spectra
from sharebasis.fit_tables import RANKS, SPECTRUM, ranks_csv, spectrum_csv
from sharebasis.fitting import fit, fit_metrics
from sharebasis.kernels import use_onednn
from sharebasis.moment_store import MomentStore
from sharebasis.provenance import write_metrics
from sharebasis.resources import pick_device
from sharebasis.sensitivity.outcome import Sensitivity
from sharebasis.stage import (
    COMPRESSED,
    MOMENTS,
    PLOTS,
    SENSITIVITY,
    SPECTRA,
    WEIGHTS,
    report_errors,
)


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    device, moments = pick_device(settings.device), MomentStore(MOMENTS)
    sensitivity = store.load_record(SENSITIVITY, Sensitivity)
    fitted = fit(WEIGHTS, SPECTRA, settings.fit, COMPRESSED, device, moments, sensitivity)
    source = Spectra(SPECTRA)
    energies = source.energies()
    given = source.groups[: source.n_given]
    with store.writing(PLOTS / "fit") as out:
        store.write_text(out / RANKS, ranks_csv(fitted))
        store.write_text(out / SPECTRUM, spectrum_csv(given, energies[: len(given)]))
    spectra = torch.cat([torch.from_numpy(own) for own in energies])
    metrics = fit_metrics(fitted, settings.fit)
    write_metrics("fit", metrics, settings, device, weights=WEIGHTS, spectra=spectra)


if __name__ == "__main__":
    main()
