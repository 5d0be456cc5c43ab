"""Stage `classify`: config -> a record of every linear sublayer and its residual role."""

import logging
from collections import Counter

from sharebasis.config.schema import Settings
from sharebasis.io.records import save_record
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, meta_model
from sharebasis.pipeline.paths import SUBLAYERS, WEIGHTS
from sharebasis.pipeline.provenance import write_metrics
from sharebasis.pipeline.stage import stage

log = logging.getLogger(__name__)


@stage
def main(settings: Settings) -> None:
    model = meta_model(load_config(WEIGHTS))
    classification = classify_model(
        model, settings.model.block_pattern, settings.model.weight_types
    )
    save_record(SUBLAYERS, classification)
    sublayers = classification.sublayers
    for sublayer in sublayers:
        if sublayer.disagreement:
            log.warning("%s: %s; it is %s.", sublayer.name, sublayer.disagreement, sublayer.role)
    write_metrics(
        "classify",
        {
            "n_sublayers": len(sublayers),
            "n_selected": len(classification.selected),
            "role": Counter(sublayer.role for sublayer in sublayers),
            "evidence": Counter(sublayer.evidence for sublayer in sublayers),
            "category": Counter(sublayer.category for sublayer in sublayers),
            "n_disagreements": sum(bool(sublayer.disagreement) for sublayer in sublayers),
            "n_tied": sum(sublayer.tied_to is not None for sublayer in sublayers),
            "family": Counter(sublayer.family for sublayer in sublayers),
        },
        settings,
        weights=WEIGHTS,
    )


if __name__ == "__main__":
    main()
