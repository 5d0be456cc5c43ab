"""Stage `sensitivity`: what losses count for in `fit`, measured on a draft; optional."""

from sharebasis.allocation.sensitivity import UNWEIGHED, Sensitivity
from sharebasis.config.schema import Settings
from sharebasis.io.records import load_record, save_record
from sharebasis.pipeline.paths import (
    MOMENTS,
    SENSITIVITY,
    SENSITIVITY_DRAFT,
    SPECTRA,
    SUBLAYERS,
    WEIGHTS,
)
from sharebasis.pipeline.stage import stage


@stage
def main(settings: Settings) -> None:
    left_out = settings.sensitivity.by == "none"
    save_record(SENSITIVITY, UNWEIGHED if left_out else measure(settings))


def measure(settings: Settings) -> Sensitivity:
    # Here, as a run that leaves the stage out need not load torch.
    from sharebasis.architecture.sublayers import Classification
    from sharebasis.data.windows import windows_of
    from sharebasis.moments.store import MomentStore
    from sharebasis.pipeline.compute import start_computing
    from sharebasis.stages.sensitivity.measure import measure_sensitivity

    options, dtype, device = settings.sensitivity, settings.model.dtype, start_computing(settings)
    windows = windows_of(
        WEIGHTS, settings, "calibration", options.windows, options.window, "sensitivity"
    )
    artefacts = WEIGHTS, SPECTRA, MomentStore(MOMENTS), load_record(SUBLAYERS, Classification)
    return measure_sensitivity(
        *artefacts, windows, options, settings.fit, dtype, SENSITIVITY_DRAFT, device
    )


if __name__ == "__main__":
    main()
