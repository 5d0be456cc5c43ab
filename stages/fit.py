"""Stage `fit`: losses of every rank -> compressed ShareLinear state within a budget."""

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.fitting import fit, fit_metrics
from sharebasis.moment_store import MomentStore
from sharebasis.resources import pick_device
from sharebasis.stage import COMPRESSED, METRICS, MOMENTS, SPECTRA, WEIGHTS, report_errors


@report_errors
def main() -> None:
    settings = load_settings()
    device, moments = pick_device(settings.device), MomentStore(MOMENTS)
    fitted = fit(WEIGHTS, SPECTRA, settings.fit, COMPRESSED, device, moments)
    store.write_json(METRICS / "fit.json", fit_metrics(fitted, settings.fit))


if __name__ == "__main__":
    main()
