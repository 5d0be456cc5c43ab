"""Stage `propagate`: factors that reckon with what errors before make of inputs; optional."""

from sharebasis.config.schema import Settings
from sharebasis.io.records import load_record
from sharebasis.pipeline.paths import (
    COMPRESSED,
    MOMENTS,
    PROPAGATED,
    PROPAGATION_CHECKPOINT,
    SUBLAYERS,
    WEIGHTS,
)
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.stages.propagate.outcome import write_unpropagated


@report_errors
def main() -> None:
    settings = load_settings()
    if settings.propagate.by == "none":
        write_unpropagated(PROPAGATED)
    else:
        refit(settings)


def refit(settings: Settings) -> None:
    # Here, as a run that leaves the stage out need not load torch.
    from sharebasis.architecture.sublayers import Classification
    from sharebasis.data.windows import require_positions
    from sharebasis.io.checkpoint import Checkpoint
    from sharebasis.model.hub import load_config, load_tokenizer
    from sharebasis.moments.store import MomentStore
    from sharebasis.runtime.devices import pick_device
    from sharebasis.runtime.matmul import use_onednn
    from sharebasis.stages.propagate.propagate import (
        propagate,
        propagation_identity,
        propagation_windows,
    )

    use_onednn(settings.onednn)
    own, device = settings.propagate, pick_device(settings.device)
    require_positions(load_config(COMPRESSED), own.window, "propagate.window")
    windows = propagation_windows(load_tokenizer(COMPRESSED), settings.data, own, settings.seed)
    how = {"device": str(device), "onednn": settings.onednn}
    identity = propagation_identity(WEIGHTS, COMPRESSED, windows, own, settings.fit, **how)
    checkpoint = Checkpoint(PROPAGATION_CHECKPOINT, identity, own.checkpoint_seconds)
    classification, moments = load_record(SUBLAYERS, Classification), MomentStore(MOMENTS)
    models = WEIGHTS, classification, COMPRESSED, moments
    propagate(*models, windows, own, settings.fit, checkpoint, PROPAGATED, device)


if __name__ == "__main__":
    main()
