"""Stage `attribute`: two models and text -> who makes the error of the last one made."""

from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import present
from sharebasis.compressed.loader import load_compressed
from sharebasis.data.windows import cut, read_windows, require_positions
from sharebasis.io.atomic import write_text, writing
from sharebasis.io.records import load_record
from sharebasis.model.hub import DTYPES, load_config, load_model, load_tokenizer
from sharebasis.pipeline.paths import MODELS, PLOTS, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.devices import pick_device
from sharebasis.runtime.matmul import use_onednn
from sharebasis.stages.attribute.error_attribution import attribute
from sharebasis.stages.attribute.figures import components_figure, lens_figure
from sharebasis.stages.attribute.tables import (
    attribute_metrics,
    components_csv,
    lens_csv,
    markdown,
    show,
)


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    attribution, dtype = settings.attribute, settings.model.dtype
    device, model = pick_device(settings.device), present(MODELS)[-1]
    data = cut(settings.data, "evaluation", attribution.windows, attribution.window)
    require_positions(load_config(model), attribution.window, "attribute.window")
    tokenizer, seed = load_tokenizer(model), settings.seed
    windows = read_windows(tokenizer, data, "evaluation", seed, "attribute")
    found = attribute(
        load_model(WEIGHTS, dtype, device),
        load_compressed(model, DTYPES[dtype], device),
        windows,
        attribution.batch,
        attribution.lens_predictions,
        load_record(SUBLAYERS, Classification),
    )
    with writing(PLOTS / "attribute") as out:
        write_text(out / "components.csv", components_csv(found))
        write_text(out / "components.md", markdown(found, attribution.top))
        write_text(out / "lens.csv", lens_csv(found))
        components_figure(found, model.name).savefig(out / "components.png", dpi=150)
        lens_figure(found, model.name).savefig(out / "lens.png", dpi=150)
    metrics = {"model": model.name, **attribute_metrics(found, attribution.top)}
    write_metrics("attribute", metrics, settings, device, weights=WEIGHTS, evaluation=windows)
    show(found, attribution.top)


if __name__ == "__main__":
    main()
