"""Stage `propagate`: factors that reckon with what errors before make of inputs; optional."""

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.outcomes import write_unpropagated
from sharebasis.settings import Settings
from sharebasis.stage import (
    COMPRESSED,
    MOMENTS,
    PROPAGATED,
    PROPAGATION_CHECKPOINT,
    SUBLAYERS,
    WEIGHTS,
    report_errors,
)


@report_errors
def main() -> None:
    settings = load_settings()
    if settings.propagate.by == "none":
        write_unpropagated(PROPAGATED)
    else:
        refit(settings)


def refit(settings: Settings) -> None:
    # Here, as a run that leaves the stage out need not load torch.
    from sharebasis.checkpoint import Checkpoint
    from sharebasis.hub import load_config, load_tokenizer
    from sharebasis.kernels import use_onednn
    from sharebasis.moment_store import MomentStore
    from sharebasis.propagation import propagate, propagation_identity, propagation_windows
    from sharebasis.resources import pick_device
    from sharebasis.sublayer import Classification
    from sharebasis.texts import require_positions

    use_onednn(settings.onednn)
    own, device = settings.propagate, pick_device(settings.device)
    require_positions(load_config(COMPRESSED), own.window, "propagate.window")
    windows = propagation_windows(load_tokenizer(COMPRESSED), settings.data, own, settings.seed)
    how = {"device": str(device), "onednn": settings.onednn}
    identity = propagation_identity(WEIGHTS, COMPRESSED, windows, own, settings.fit, **how)
    checkpoint = Checkpoint(PROPAGATION_CHECKPOINT, identity, own.checkpoint_seconds)
    classification, moments = store.load_record(SUBLAYERS, Classification), MomentStore(MOMENTS)
    models = WEIGHTS, classification, COMPRESSED, moments
    propagate(*models, windows, own, settings.fit, checkpoint, PROPAGATED, device)


if __name__ == "__main__":
    main()
