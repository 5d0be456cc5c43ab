"""Stage `extract`: a model from anywhere -> safetensors in hub format, with a manifest."""

from sharebasis.pipeline.paths import WEIGHTS
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source


@report_errors
def main() -> None:
    settings = load_settings().model
    extract(find_source(settings.source, settings.revision), WEIGHTS)


if __name__ == "__main__":
    main()
