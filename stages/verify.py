"""Stage `verify`: the compressed directory against the original, on text not calibrated on."""

from sharebasis import store
from sharebasis.compressed import load_compressed
from sharebasis.compressed_index import present
from sharebasis.config import load_settings
from sharebasis.hub import DTYPES, load_config, load_model, load_tokenizer
from sharebasis.kernels import use_onednn
from sharebasis.provenance import write_metrics
from sharebasis.resources import pick_device
from sharebasis.splitting import rows_by_sublayer, split_selected
from sharebasis.stage import COMPRESSED, MODELS, SUBLAYERS, WEIGHTS, report_errors
from sharebasis.sublayer import Classification
from sharebasis.texts import read_windows, require_positions
from sharebasis.verification import (
    compare,
    continuations,
    lossless_difference,
    side_by_side,
    verify_metrics,
)


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    verify, dtype, device = settings.verify, settings.model.dtype, pick_device(settings.device)
    require_positions(load_config(COMPRESSED), settings.data.window)
    tokenizer = load_tokenizer(COMPRESSED)
    windows = read_windows(tokenizer, settings.data, "evaluation", settings.seed)
    original = load_model(WEIGHTS, dtype, device)
    classification = store.load_record(SUBLAYERS, Classification)
    rows = rows_by_sublayer(split_selected(classification, settings.split.strategy))
    first = windows[: verify.lossless_windows]
    lossless = lossless_difference(original, rows, first)
    compressed = {
        model.name: load_compressed(model, DTYPES[dtype], device) for model in present(MODELS)
    }
    fidelity = compare(original, compressed, windows, settings.data.batch)
    metrics = verify_metrics(fidelity, lossless, len(rows), len(first))
    write_metrics("verify", metrics, settings, device, weights=WEIGHTS, evaluation=windows)
    models = {"original": original, **compressed}
    texts = continuations(models, tokenizer, verify.prompt, verify.new_tokens)
    side_by_side(verify.prompt, texts)


if __name__ == "__main__":
    main()
