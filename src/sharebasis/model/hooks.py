"""What goes into a sublayer while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sharebasis.errors import CalibrationError


class Reached(Exception):  # noqa: N818 (no error)
    """Raised by a hook when nothing that follows in a forward pass is of use."""


def first_call(
    module: nn.Module, run: Callable[[], object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with, args and kwargs; nothing after it runs.

    Args:
        module: that runs in `run`.
        run: called without arguments.

    Raises:
        CalibrationError: the module did not run.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise Reached

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except Reached:
        return found[0]
    finally:
        hook.remove()
    raise CalibrationError(f"A {type(module).__name__} that was to be watched did not run.")


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What modules are first given, by name, in the order in which they run; until the end."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, args[0])

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def tracked(trackers: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Send what modules are given to trackers, every time that they run; until the end."""

    def send(tracker: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: tracker(args[0])

    hooks = [module.register_forward_pre_hook(send(own)) for module, own in trackers.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def forced(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Have modules put out something else than they would, which they do not compute; until the
    end."""

    def say(output: Tensor) -> Callable[..., Tensor]:
        return lambda *_, **__: output

    for module, output in outputs.items():
        module.forward = say(output)
    try:
        yield
    finally:
        for module in outputs:
            del module.forward
