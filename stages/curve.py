"""Stage `curve`: factors of every rank -> what is lost at every budget."""

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.curve import curve_metrics, measure_curve, print_curve, write_curve
from sharebasis.hub import load_config, load_tokenizer
from sharebasis.kernels import use_onednn
from sharebasis.moment_store import MomentStore
from sharebasis.provenance import write_metrics
from sharebasis.resources import pick_device
from sharebasis.sensitivity.outcome import Sensitivity
from sharebasis.stage import CURVE, MOMENTS, PLOTS, SENSITIVITY, SPECTRA, WEIGHTS, report_errors
from sharebasis.texts import cut, read_windows, require_positions


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    own, data = settings.curve, settings.data
    require_positions(load_config(WEIGHTS), data.window)
    text = cut(data, "evaluation", own.windows, data.window)
    windows = read_windows(load_tokenizer(WEIGHTS), text, "evaluation", settings.seed)
    dtype, device = settings.model.dtype, pick_device(settings.device)
    curve = measure_curve(
        WEIGHTS,
        SPECTRA,
        MomentStore(MOMENTS),
        store.load_record(SENSITIVITY, Sensitivity),
        settings.fit,
        own.removed,
        windows,
        data.batch,
        dtype,
        CURVE,
        device,
    )
    write_curve(PLOTS / "curve.csv", curve)
    metrics = curve_metrics(curve)
    write_metrics("curve", metrics, settings, device, weights=WEIGHTS, evaluation=windows)
    print_curve(curve)


if __name__ == "__main__":
    main()
