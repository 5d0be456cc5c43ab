"""Stage `recover`: the factors, distilled against the original; optional."""

from sharebasis.config.schema import Settings
from sharebasis.pipeline.paths import (
    COMPRESSED,
    PROPAGATED,
    RECOVERED,
    RECOVERY_CHECKPOINT,
    WEIGHTS,
)
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.stages.recover.outcome import write_unrecovered


@report_errors
def main() -> None:
    settings = load_settings()
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
    from sharebasis.runtime.devices import pick_device
    from sharebasis.runtime.matmul import use_onednn
    from sharebasis.stages.recover.recover import recover, recovery_identity, recovery_windows

    use_onednn(settings.onednn)
    own, device, seed = settings.recover, pick_device(settings.device), settings.seed
    source = PROPAGATED if (PROPAGATED / INDEX_FILE).exists() else COMPRESSED
    require_positions(load_config(source), own.window, "recover.window")
    windows = recovery_windows(load_tokenizer(source), settings.data, own, seed)
    how = {"seed": seed, "device": str(device), "onednn": settings.onednn}
    identity = recovery_identity(WEIGHTS, source, windows, own, **how)
    checkpoint = Checkpoint(RECOVERY_CHECKPOINT, identity, own.checkpoint_seconds)
    shard_bytes = settings.fit.shard_bytes
    recover(WEIGHTS, source, windows, own, seed, checkpoint, RECOVERED, shard_bytes, device)


if __name__ == "__main__":
    main()
