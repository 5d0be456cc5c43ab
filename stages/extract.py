"""Stage `extract`: a model from anywhere -> safetensors in hub format, with a manifest."""

from sharebasis.config import load_settings
from sharebasis.source import extract, find_source
from sharebasis.stage import WEIGHTS, report_errors


@report_errors
def main() -> None:
    settings = load_settings().model
    extract(find_source(settings.source, settings.revision), WEIGHTS)


if __name__ == "__main__":
    main()
