"""Stage `fit`: weights and moments -> compressed ShareLinear state."""

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.fitting import fit, fit_metrics
from sharebasis.moment_store import MomentStore
from sharebasis.resources import pick_device
from sharebasis.splitting import split_selected
from sharebasis.stage import COMPRESSED, METRICS, MOMENTS, SUBLAYERS, WEIGHTS, report_errors
from sharebasis.sublayer import Classification


@report_errors
def main() -> None:
    settings = load_settings()
    classification = store.load_record(SUBLAYERS, Classification)
    parts = split_selected(classification, settings.split.strategy)
    device = pick_device(settings.device)
    fitted = fit(WEIGHTS, parts, MomentStore(MOMENTS), settings.fit, COMPRESSED, device)
    store.write_json(METRICS / "fit.json", fit_metrics(fitted, settings.fit))


if __name__ == "__main__":
    main()
