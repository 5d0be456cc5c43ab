"""Stage `calibrate`: weights and text -> the moment of every distinct input."""

from dataclasses import asdict

from sharebasis.architecture.sublayers import Classification
from sharebasis.config.schema import Settings
from sharebasis.data.windows import windows_of
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.model.hub import load_model
from sharebasis.moments.store import tokens_of, trimmed_of, write_moments
from sharebasis.pipeline.compute import start_computing
from sharebasis.pipeline.paths import CHECKPOINT, MOMENTS, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.stage import stage
from sharebasis.stages.calibrate.calibrate import calibrate, run_identity


@stage
def main(settings: Settings) -> None:
    device = start_computing(settings)
    sublayers = load_record(SUBLAYERS, Classification).selected
    windows = windows_of(WEIGHTS, settings, "calibration")
    dtype, batch = settings.model.dtype, settings.data.batch
    gradients, outliers = settings.calibrate.gradients, settings.calibrate.outliers
    identity = run_identity(
        WEIGHTS,
        sublayers,
        windows,
        dtype=dtype,
        batch=batch,
        device=str(device),
        onednn=settings.onednn,
        gradients=gradients,
        outliers=asdict(outliers),
        seed=settings.seed,
    )
    checkpoint = Checkpoint(CHECKPOINT, identity, settings.calibrate.checkpoint_seconds)
    model = load_model(WEIGHTS, dtype, device)
    sites, sums = calibrate(
        model, sublayers, windows, batch, checkpoint, gradients, outliers, settings.seed
    )
    write_moments(MOMENTS, sites, sums)
    checkpoint.remove()
    counts = list(tokens_of(sums).values())
    write_metrics(
        "calibrate",
        {
            "n_tokens": windows.numel(),
            "n_moments": len(counts),
            "n_unseen": counts.count(0),
            "n_trimmed": sum(trimmed_of(sums).values()),
        },
        settings,
        device,
        weights=WEIGHTS,
        calibration=windows,
    )


if __name__ == "__main__":
    main()
