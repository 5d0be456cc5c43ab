"""sharebasis: make a transformer smaller by letting layers share what they have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharebasis.compressed.loader import load_compressed

__all__ = ["load_compressed"]


def __getattr__(name: str) -> Any:
    # On demand, so that a part of the package can be imported without torch and transformers,
    # and a stage depends on no more code than it runs.
    if name == "load_compressed":
        from sharebasis.compressed.loader import load_compressed

        return load_compressed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
