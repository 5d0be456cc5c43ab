"""Stage `sensitivity`: what losses count for in `fit`, measured on a draft; optional."""

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.sensitivity.outcome import UNWEIGHED, Sensitivity
from sharebasis.settings import Settings
from sharebasis.stage import (
    MOMENTS,
    SENSITIVITY,
    SENSITIVITY_DRAFT,
    SPECTRA,
    SUBLAYERS,
    WEIGHTS,
    report_errors,
)


@report_errors
def main() -> None:
    settings = load_settings()
    found = UNWEIGHED if settings.sensitivity.by == "none" else measure(settings)
    store.save_record(SENSITIVITY, found)


def measure(settings: Settings) -> Sensitivity:
    # Here, as a run that leaves the stage out need not load torch.
    from sharebasis.hub import load_config, load_tokenizer
    from sharebasis.kernels import use_onednn
    from sharebasis.moment_store import MomentStore
    from sharebasis.resources import pick_device
    from sharebasis.sensitivity.measurement import measure_sensitivity
    from sharebasis.sublayer import Classification
    from sharebasis.texts import cut, read_windows, require_positions

    use_onednn(settings.onednn)
    own, dtype, device = settings.sensitivity, settings.model.dtype, pick_device(settings.device)
    sublayers = store.load_record(SUBLAYERS, Classification)
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
