"""Stage `verify`: the compressed directory against the original, on text not calibrated on."""

from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import present
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.schema import Settings
from sharebasis.data.windows import windows_of
from sharebasis.io.records import load_record
from sharebasis.model.hub import DTYPES, load_model, load_tokenizer
from sharebasis.pipeline.compute import start_computing
from sharebasis.pipeline.paths import COMPRESSED, MODELS, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.stage import stage
from sharebasis.stages.verify.verify import (
    compare,
    continuations,
    lossless_difference,
    side_by_side,
    verify_metrics,
)


@stage
def main(settings: Settings) -> None:
    verify, dtype, device = settings.verify, settings.model.dtype, start_computing(settings)
    windows = windows_of(COMPRESSED, settings, "evaluation")
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
    texts = continuations(models, load_tokenizer(COMPRESSED), verify.prompt, verify.new_tokens)
    side_by_side(verify.prompt, texts)


if __name__ == "__main__":
    main()
