"""Stage `classify`: config -> a record of every linear sublayer and its residual role."""

from collections import Counter

from sharebasis import store
from sharebasis.architecture import architecture_of, dims
from sharebasis.config import load_settings
from sharebasis.hub import empty_model, load_config
from sharebasis.stage import METRICS, SUBLAYERS, WEIGHTS, report_errors
from sharebasis.sublayer import Classification, classify
from sharebasis.surgery import linear_modules


@report_errors
def main() -> None:
    settings = load_settings().model
    config = load_config(WEIGHTS)
    sizes = dims(config)
    architecture = architecture_of(config.model_type, settings.block_pattern, settings.weight_types)
    sublayers = classify(linear_modules(empty_model(config)), architecture, sizes.d_model)
    found = Classification(config.model_type, sizes, architecture, sublayers)
    store.save_record(SUBLAYERS, found)
    store.write_json(
        METRICS / "classify.json",
        {
            "n_sublayers": len(sublayers),
            "n_selected": sum(sublayer.selected for sublayer in sublayers),
            "role": Counter(sublayer.role for sublayer in sublayers),
            "evidence": Counter(sublayer.evidence for sublayer in sublayers),
            "family": Counter(sublayer.family for sublayer in sublayers),
        },
    )


if __name__ == "__main__":
    main()
