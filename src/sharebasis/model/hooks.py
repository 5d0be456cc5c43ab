"""Hooks on modules while a model runs, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sharebasis.errors import CalibrationError


class Reached(Exception):  # noqa: N818 (no error)
    """Raised by a hook when nothing that follows in a forward pass is of use."""


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks for a while.

    Args:
        handles: of the hooks; may put each of them in when it is asked for. If one cannot be put
            in, those before it are removed.
    """
    with ExitStack() as removals:
        for handle in handles:
            removals.callback(handle.remove)
        yield


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
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise Reached

    with attached([module.register_forward_pre_hook(stop, with_kwargs=True)]):
        try:
            run()
        except Reached:
            return calls[0]
    raise CalibrationError(f"A {type(module).__name__} that was to be watched did not run.")


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What modules are first given, by name, in the order in which they run; until the end."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(name, args[0])

    with attached(
        module.register_forward_pre_hook(partial(keep, name)) for name, module in modules.items()
    ):
        yield inputs


@contextmanager
def tracked(trackers: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Send what modules are given to trackers, every time that they run; until the end."""

    def send(
        tracker: Callable[[Tensor], None], _module: nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        tracker(args[0])

    with attached(
        module.register_forward_pre_hook(partial(send, tracker))
        for module, tracker in trackers.items()
    ):
        yield


@contextmanager
def forced(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Have modules return something else than they would, which they do not compute; until the
    end.

    Args:
        outputs: module -> a tensor, or nested tuples with some; every call is given a copy, since
            whoever called may go on in the same memory.
    """
    for module, output in outputs.items():
        module.forward = partial(_answer, output)
    try:
        yield
    finally:
        for module in outputs:
            del module.forward


def _answer(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return copied(output)


def copied(output: Any) -> Any:
    """An output whose tensors are copies, in nested tuples too."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(copied, output)) if isinstance(output, tuple) else output
