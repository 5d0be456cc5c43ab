"""Stage `verify`: the compressed directory against the original, on text not calibrated on."""

from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import present
from sharebasis.compressed.loader import load_compressed
from sharebasis.data.windows import read_windows, require_positions
from sharebasis.io.records import load_record
from sharebasis.model.hub import DTYPES, load_config, load_model, load_tokenizer
from sharebasis.pipeline.paths import COMPRESSED, MODELS, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.devices import pick_device
from sharebasis.runtime.matmul import use_onednn
from sharebasis.stages.verify.verify import (
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
    classification = load_record(SUBLAYERS, Classification)
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
