"""Stage `extract`: a model from anywhere -> safetensors in hub format, with a manifest."""

from sharebasis.config.schema import Settings
from sharebasis.pipeline.paths import WEIGHTS
from sharebasis.pipeline.stage import stage
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source


@stage
def main(settings: Settings) -> None:
    model = settings.model
    extract(find_source(model.source, model.revision), WEIGHTS)


if __name__ == "__main__":
    main()
