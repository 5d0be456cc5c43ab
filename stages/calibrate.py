"""Stage `calibrate`: weights and text -> the moment of every distinct input."""

from dataclasses import asdict

from sharebasis.architecture.sublayers import Classification
from sharebasis.data.windows import read_windows, require_positions
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.model.hub import load_config, load_model, load_tokenizer
from sharebasis.moments.store import tokens_of, trimmed_of, write_moments
from sharebasis.pipeline.paths import CHECKPOINT, MOMENTS, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.devices import pick_device
from sharebasis.runtime.matmul import use_onednn
from sharebasis.stages.calibrate.calibrate import calibrate, run_identity


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    sublayers = load_record(SUBLAYERS, Classification).selected
    require_positions(load_config(WEIGHTS), settings.data.window)
    windows = read_windows(load_tokenizer(WEIGHTS), settings.data, "calibration", settings.seed)
    dtype, batch, device = settings.model.dtype, settings.data.batch, pick_device(settings.device)
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
    how = batch, checkpoint, gradients, outliers, settings.seed
    sites, sums = calibrate(model, sublayers, windows, *how)
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
