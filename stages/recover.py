"""Stage `recover`: the factors, distilled against the original; optional."""

from sharebasis.config import load_settings
from sharebasis.outcomes import write_unrecovered
from sharebasis.settings import Settings
from sharebasis.stage import (
    COMPRESSED,
    PROPAGATED,
    RECOVERED,
    RECOVERY_CHECKPOINT,
    WEIGHTS,
    report_errors,
)


@report_errors
def main() -> None:
    settings = load_settings()
    if settings.recover.steps:
        train(settings)
    else:
        write_unrecovered(RECOVERED)


def train(settings: Settings) -> None:
    # Here, as a run that leaves the stage out need not load torch.
    from sharebasis import compressed_index
    from sharebasis.checkpoint import Checkpoint
    from sharebasis.hub import load_config, load_tokenizer
    from sharebasis.kernels import use_onednn
    from sharebasis.recovery import recover, recovery_identity, recovery_windows
    from sharebasis.resources import pick_device
    from sharebasis.texts import require_positions

    use_onednn(settings.onednn)
    own, device, seed = settings.recover, pick_device(settings.device), settings.seed
    source = PROPAGATED if (PROPAGATED / compressed_index.FILE).exists() else COMPRESSED
    require_positions(load_config(source), own.window, "recover.window")
    windows = recovery_windows(load_tokenizer(source), settings.data, own, seed)
    how = {"seed": seed, "device": str(device), "onednn": settings.onednn}
    identity = recovery_identity(WEIGHTS, source, windows, own, **how)
    checkpoint = Checkpoint(RECOVERY_CHECKPOINT, identity, own.checkpoint_seconds)
    shard_bytes = settings.fit.shard_bytes
    recover(WEIGHTS, source, windows, own, seed, checkpoint, RECOVERED, shard_bytes, device)


if __name__ == "__main__":
    main()
