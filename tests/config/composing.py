"""Settings composed of conf/."""

from __future__ import annotations

from conftest import REPOSITORY

from sharebasis.config.schema import Settings
from sharebasis.pipeline.compose import compose_settings

CONF = REPOSITORY / "conf"


def composed(*overrides: str) -> Settings:
    return compose_settings(overrides, CONF)
