"""Device and memory of this machine."""

from __future__ import annotations

import logging

import psutil
import torch

from sharebasis.errors import ResourceError, SettingsError

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device that a setting names; `auto` is a GPU where torch sees one.

    Raises:
        SettingsError: torch knows no such device, or has none here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device {name!r} is not available: {reason}") from None
    return device


def require_memory(n_bytes: int, purpose: str, device: torch.device) -> None:
    """Refuse to start what will not fit.

    Args:
        n_bytes: that are needed.
        purpose: what needs them, for the message.
        device: where.

    Raises:
        ResourceError: less than `n_bytes` are free on the device.
    """
    free = _free(device)
    if n_bytes > free:
        raise ResourceError(
            f"{purpose} needs {n_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB of memory are "
            f"free on {device}. Use a smaller model or model.dtype, or a machine with more."
        )


def workers_for(n_bytes: int, device: torch.device) -> int:
    """How many pieces of work may run at once; one is tried even where it may not fit.

    Args:
        n_bytes: that a piece needs. On a CPU there is a piece for each core that torch may use, as
            long as what is free suffices for all; on a GPU there is one.
        device: that they run on.
    """
    free = _free(device)
    if n_bytes > free:
        log.warning(
            "A piece of the work takes about %.2f GB, but only %.2f GB of memory are free on %s: "
            "it may be killed.",
            n_bytes / 1e9,
            free / 1e9,
            device,
        )
    if device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), free // max(n_bytes, 1)))


def _free(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
