"""Stage `curve`: factors of every rank -> what is lost at every budget."""

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.data.windows import cut, read_windows, require_positions
from sharebasis.io.records import load_record
from sharebasis.model.hub import load_config, load_tokenizer
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.paths import CURVE, MOMENTS, PLOTS, SENSITIVITY, SPECTRA, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.devices import pick_device
from sharebasis.runtime.matmul import use_onednn
from sharebasis.stages.curve.curve import curve_metrics, measure_curve, print_curve, write_curve


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
        load_record(SENSITIVITY, Sensitivity),
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
