"""Stage `calibrate`: weights and text -> the moment of every distinct input."""

from dataclasses import asdict

from sharebasis import store
from sharebasis.calibration import calibrate, run_identity
from sharebasis.checkpoint import Checkpoint
from sharebasis.config import load_settings
from sharebasis.hub import load_config, load_model, load_tokenizer
from sharebasis.kernels import use_onednn
from sharebasis.moment_store import tokens_of, trimmed_of, write_moments
from sharebasis.provenance import write_metrics
from sharebasis.resources import pick_device
from sharebasis.stage import CHECKPOINT, MOMENTS, SUBLAYERS, WEIGHTS, report_errors
from sharebasis.sublayer import Classification
from sharebasis.texts import read_windows, require_positions


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    sublayers = store.load_record(SUBLAYERS, Classification).selected
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
