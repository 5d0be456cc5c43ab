"""Stage `attribute`: two models and text -> who makes the error of the last one made."""

from sharebasis import store
from sharebasis.attribution.error_attribution import attribute
from sharebasis.attribution.figures import components_figure, lens_figure
from sharebasis.attribution.report import (
    attribute_metrics,
    components_csv,
    lens_csv,
    markdown,
    show,
)
from sharebasis.compressed import load_compressed
from sharebasis.compressed_index import present
from sharebasis.config import load_settings
from sharebasis.hub import DTYPES, load_config, load_model, load_tokenizer
from sharebasis.kernels import use_onednn
from sharebasis.provenance import write_metrics
from sharebasis.resources import pick_device
from sharebasis.stage import ATTRIBUTION, MODELS, SUBLAYERS, WEIGHTS, report_errors
from sharebasis.sublayer import Classification
from sharebasis.texts import cut, read_windows, require_positions


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
        store.load_record(SUBLAYERS, Classification),
    )
    with store.writing(ATTRIBUTION) as out:
        store.write_text(out / "components.csv", components_csv(found))
        store.write_text(out / "components.md", markdown(found, attribution.top))
        store.write_text(out / "lens.csv", lens_csv(found))
        components_figure(found, model.name).savefig(out / "components.png", dpi=150)
        lens_figure(found, model.name).savefig(out / "lens.png", dpi=150)
    metrics = {"model": model.name, **attribute_metrics(found, attribution.top)}
    write_metrics("attribute", metrics, settings, device, weights=WEIGHTS, evaluation=windows)
    show(found, attribution.top)


if __name__ == "__main__":
    main()
