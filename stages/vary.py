"""Stage `vary`: weights -> how much layers differ, once what is arbitrary in them is removed."""

from functools import partial

from sharebasis.architecture.sublayers import Classification
from sharebasis.config.schema import Settings
from sharebasis.gauge.layers import Layers
from sharebasis.io.atomic import writing
from sharebasis.io.records import load_record
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.hub import load_config
from sharebasis.pipeline.paths import PLOTS, SUBLAYERS, VARIATION, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.stage import stage
from sharebasis.runtime.matmul import use_onednn
from sharebasis.stages.vary.figures import draw
from sharebasis.stages.vary.tables import print_variation, variation_metrics, write_distances
from sharebasis.stages.vary.variation import measure_variation


@stage
def main(settings: Settings) -> None:
    use_onednn(settings.onednn)
    classification = load_record(SUBLAYERS, Classification)
    layers_of = partial(Layers, classification=classification, config=load_config(WEIGHTS))
    tensors = DenseWeights(WEIGHTS)
    variation = measure_variation(tensors, layers_of, settings.vary, settings.seed)
    with writing(PLOTS / "vary") as directory:
        draw(variation, settings.vary.alignment, directory)
    write_distances(VARIATION, variation)
    metrics = variation_metrics(variation, settings.vary)
    write_metrics("vary", metrics, settings, weights=WEIGHTS)
    print_variation(metrics)


if __name__ == "__main__":
    main()
