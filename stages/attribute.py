"""Stage `attribute`: two models and text -> who makes the error of the last one made."""

from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import present
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.schema import Settings
from sharebasis.data.windows import windows_of
from sharebasis.io.atomic import write_text, writing
from sharebasis.io.records import load_record
from sharebasis.model.hub import DTYPES, load_model
from sharebasis.pipeline.compute import start_computing
from sharebasis.pipeline.paths import MODELS, PLOTS, SUBLAYERS, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.stage import stage
from sharebasis.stages.attribute.error_attribution import attribute
from sharebasis.stages.attribute.figures import components_figure, lens_figure
from sharebasis.stages.attribute.tables import (
    attribute_metrics,
    components_csv,
    lens_csv,
    markdown,
    show,
)


@stage
def main(settings: Settings) -> None:
    options, dtype, device = settings.attribute, settings.model.dtype, start_computing(settings)
    model = present(MODELS)[-1]
    windows = windows_of(
        model, settings, "evaluation", options.windows, options.window, "attribute"
    )
    attribution = attribute(
        load_model(WEIGHTS, dtype, device),
        load_compressed(model, DTYPES[dtype], device),
        windows,
        options.batch,
        options.lens_predictions,
        load_record(SUBLAYERS, Classification),
    )
    with writing(PLOTS / "attribute") as out:
        write_text(out / "components.csv", components_csv(attribution))
        write_text(out / "components.md", markdown(attribution, options.top))
        write_text(out / "lens.csv", lens_csv(attribution))
        components_figure(attribution, model.name).savefig(out / "components.png", dpi=150)
        lens_figure(attribution, model.name).savefig(out / "lens.png", dpi=150)
    metrics = {"model": model.name, **attribute_metrics(attribution, options.top)}
    write_metrics("attribute", metrics, settings, device, weights=WEIGHTS, evaluation=windows)
    show(attribution, options.top)


if __name__ == "__main__":
    main()
