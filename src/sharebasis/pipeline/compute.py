"""How and where a stage computes."""

from __future__ import annotations

import torch

from sharebasis.config.schema import Settings
from sharebasis.runtime.devices import pick_device
from sharebasis.runtime.matmul import use_onednn


def start_computing(settings: Settings) -> torch.device:
    """Multiply as the settings say from here on; returns the device that they name.

    Raises:
        SettingsError: torch knows no such device, or has none here.
    """
    use_onednn(settings.onednn)
    return pick_device(settings.device)
