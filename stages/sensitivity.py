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
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors


@report_errors
def main() -> None:
    settings = load_settings()
    found = UNWEIGHED if settings.sensitivity.by == "none" else measure(settings)
    save_record(SENSITIVITY, found)


def measure(settings: Settings) -> Sensitivity:
    # Here, as a run that leaves the stage out need not load torch.
    from sharebasis.architecture.sublayers import Classification
    from sharebasis.data.windows import cut, read_windows, require_positions
    from sharebasis.model.hub import load_config, load_tokenizer
    from sharebasis.moments.store import MomentStore
    from sharebasis.runtime.devices import pick_device
    from sharebasis.runtime.matmul import use_onednn
    from sharebasis.stages.sensitivity.measure import measure_sensitivity

    use_onednn(settings.onednn)
    own, dtype, device = settings.sensitivity, settings.model.dtype, pick_device(settings.device)
    sublayers = load_record(SUBLAYERS, Classification)
    require_positions(load_config(WEIGHTS), own.window, "sensitivity.window")
    data = cut(settings.data, "calibration", own.windows, own.window)
    tokenizer, seed = load_tokenizer(WEIGHTS), settings.seed
    windows = read_windows(tokenizer, data, "calibration", seed, "sensitivity")
    artefacts = WEIGHTS, SPECTRA, MomentStore(MOMENTS), sublayers
    return measure_sensitivity(
        *artefacts, windows, own, settings.fit, dtype, SENSITIVITY_DRAFT, device
    )


if __name__ == "__main__":
    main()
