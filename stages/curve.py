"""Stage `curve`: factors of every rank -> what is lost at every budget."""

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.config.schema import Settings
from sharebasis.data.windows import windows_of
from sharebasis.io.records import load_record
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compute import start_computing
from sharebasis.pipeline.paths import CURVE, MOMENTS, PLOTS, SENSITIVITY, SPECTRA, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.stage import stage
from sharebasis.stages.curve.curve import curve_metrics, measure_curve, print_curve, write_curve


@stage
def main(settings: Settings) -> None:
    device = start_computing(settings)
    windows = windows_of(WEIGHTS, settings, "evaluation", settings.curve.windows)
    curve = measure_curve(
        WEIGHTS,
        SPECTRA,
        MomentStore(MOMENTS),
        load_record(SENSITIVITY, Sensitivity),
        settings.fit,
        settings.curve.removed,
        windows,
        settings.data.batch,
        settings.model.dtype,
        CURVE,
        device,
    )
    write_curve(PLOTS / "curve.csv", curve)
    metrics = curve_metrics(curve)
    write_metrics("curve", metrics, settings, device, weights=WEIGHTS, evaluation=windows)
    print_curve(curve)


if __name__ == "__main__":
    main()
