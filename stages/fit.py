"""Stage `fit`: factors of every rank -> compressed ShareLinear state within a budget."""

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.fitting import fit, fit_metrics
from sharebasis.resources import pick_device
from sharebasis.sensitivity.corrections import Sensitivity
from sharebasis.stage import COMPRESSED, METRICS, SENSITIVITY, SPECTRA, WEIGHTS, report_errors


@report_errors
def main() -> None:
    settings = load_settings()
    sensitivity = store.load_record(SENSITIVITY, Sensitivity)
    device = pick_device(settings.device)
    fitted = fit(WEIGHTS, SPECTRA, settings.fit, COMPRESSED, device, sensitivity)
    store.write_json(METRICS / "fit.json", fit_metrics(fitted, settings.fit))


if __name__ == "__main__":
    main()
