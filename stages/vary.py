"""Stage `vary`: weights -> how much layers differ, once what is arbitrary in them is removed."""

from functools import partial

from sharebasis import store
from sharebasis.config import load_settings
from sharebasis.hub import load_config
from sharebasis.kernels import use_onednn
from sharebasis.provenance import write_metrics
from sharebasis.stage import PLOTS, SUBLAYERS, VARIATION, WEIGHTS, report_errors
from sharebasis.sublayer import Classification
from sharebasis.variation.distances import (
    measure_variation,
    print_variation,
    variation_metrics,
    write_distances,
)
from sharebasis.variation.figures import draw
from sharebasis.variation.layers import Layers
from sharebasis.weights import DenseWeights


@report_errors
def main() -> None:
    settings = load_settings()
    use_onednn(settings.onednn)
    found = store.load_record(SUBLAYERS, Classification)
    layers_of = partial(Layers, found=found, config=load_config(WEIGHTS))
    tensors = DenseWeights(WEIGHTS)
    variation = measure_variation(tensors, layers_of, settings.vary, settings.seed)
    with store.writing(PLOTS / "vary") as directory:
        draw(variation, settings.vary.alignment, directory)
    write_distances(VARIATION, variation)
    metrics = variation_metrics(variation, settings.vary)
    write_metrics("vary", metrics, settings, weights=WEIGHTS)
    print_variation(metrics)


if __name__ == "__main__":
    main()
