"""conf/ -> params.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from sharebasis.config.schema import Settings
from sharebasis.errors import SettingsError
from sharebasis.pipeline.settings import parse_settings

CONF = Path("conf")


def compose_params(conf: Path = CONF, overrides: Sequence[str] = ()) -> str:
    """Compose the groups of `conf/` into the text of a params.yaml.

    Raises:
        SettingsError: an override names a group, choice or key that does not exist.
    """
    # Here, as stages do not compose.
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf.absolute()), version_base=None):
            config = compose("config", overrides=list(overrides))
        OmegaConf.resolve(config)
        return OmegaConf.to_yaml(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(f"{conf} with {list(overrides)} cannot be composed: {error}") from None


def compose_settings(overrides: Sequence[str] = (), conf: Path = CONF) -> Settings:
    """What the stages would go by, composed of `conf/` and not written to a params.yaml.

    Raises:
        SettingsError: as of `compose_params` and `parse_settings`.
    """
    where = f"{conf} with {list(overrides)}"
    return parse_settings(yaml.safe_load(compose_params(conf, overrides)), where)
