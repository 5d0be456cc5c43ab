"""Stage `recover`: the factors, distilled against the original; optional."""

from sharebasis.config.schema import Settings
from sharebasis.pipeline.paths import (
    COMPRESSED,
    PROPAGATED,
    RECOVERED,
    RECOVERY_CHECKPOINT,
    WEIGHTS,
)
from sharebasis.pipeline.stage import stage
from sharebasis.stages.recover.outcome import write_unrecovered


@stage
def main(settings: Settings) -> None:
    if settings.recover.steps:
        train(settings)
    else:
        write_unrecovered(RECOVERED)


def train(settings: Settings) -> None:
    # Here, as a run that leaves the stage out need not load torch.
    from sharebasis.compressed.index import INDEX_FILE
    from sharebasis.data.windows import require_positions
    from sharebasis.io.checkpoint import Checkpoint
    from sharebasis.model.hub import load_config, load_tokenizer
    from sharebasis.pipeline.compute import start_computing
    from sharebasis.stages.recover.recover import recover, recovery_identity, recovery_windows

    options, device, seed = settings.recover, start_computing(settings), settings.seed
    source = PROPAGATED if (PROPAGATED / INDEX_FILE).exists() else COMPRESSED
    require_positions(load_config(source), options.window, "recover.window")
    windows = recovery_windows(load_tokenizer(source), settings.data, options, seed)
    machine = {"seed": seed, "device": str(device), "onednn": settings.onednn}
    identity = recovery_identity(WEIGHTS, source, windows, options, **machine)
    checkpoint = Checkpoint(RECOVERY_CHECKPOINT, identity, options.checkpoint_seconds)
    shard_bytes = settings.fit.shard_bytes
    recover(WEIGHTS, source, windows, options, seed, checkpoint, RECOVERED, shard_bytes, device)


if __name__ == "__main__":
    main()
