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
from sharebasis.pipeline.stage import stage
from sharebasis.stages.propagate.outcome import write_unpropagated


@stage
def main(settings: Settings) -> None:
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
    from sharebasis.pipeline.compute import start_computing
    from sharebasis.stages.propagate.propagate import (
        propagate,
        propagation_identity,
        propagation_windows,
    )

    options, device = settings.propagate, start_computing(settings)
    require_positions(load_config(COMPRESSED), options.window, "propagate.window")
    tokenizer = load_tokenizer(COMPRESSED)
    windows = propagation_windows(tokenizer, settings.data, options, settings.seed)
    machine = {"device": str(device), "onednn": settings.onednn}
    identity = propagation_identity(WEIGHTS, COMPRESSED, windows, options, settings.fit, **machine)
    checkpoint = Checkpoint(PROPAGATION_CHECKPOINT, identity, options.checkpoint_seconds)
    classification, moments = load_record(SUBLAYERS, Classification), MomentStore(MOMENTS)
    models = WEIGHTS, classification, COMPRESSED, moments
    propagate(*models, windows, options, settings.fit, checkpoint, PROPAGATED, device)


if __name__ == "__main__":
    main()
