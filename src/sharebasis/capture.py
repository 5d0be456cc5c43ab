"""What goes into a sublayer while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from sharebasis.errors import CalibrationError
from sharebasis.moments import Site


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


def find_sites(
    model: nn.Module,
    names: Iterable[str],
    run: Callable[[], object],
    idle: Collection[str] = (),
) -> tuple[Site, ...]:
    """Find out, by running the model once, which sublayers read the same tensor.

    Two sublayers share a site if they are given the same memory, seen the same way;
    q, k and v do, and gate and up, whatever the family calls them.

    Args:
        model: that holds the sublayers.
        names: HF names of the sublayers.
        run: called without arguments, runs a few tokens through `model`.
        idle: sublayers that need not run on them, as experts; each is a site of its own then.

    Raises:
        CalibrationError: a sublayer did not run.
    """
    names = tuple(names)
    # What was seen is held, so that no memory is used twice.
    with watched({name: model.get_submodule(name) for name in names}) as seen:
        run()
    if silent := [name for name in names if name not in seen and name not in idle]:
        raise CalibrationError(
            f"{len(silent)} selected sublayers did not run on the probe, {silent[0]} among them; "
            "exclude them from the selection (model.weight_types)."
        )
    readers: dict[tuple[int | str, int, int], list[str]] = {}
    for name in names:
        if name in seen:
            x = seen[name]
            key: tuple[int | str, int, int] = (x.data_ptr(), x.numel(), x.shape[-1])
        else:
            key = (name, 0, cast(int, model.get_submodule(name).in_features))
        readers.setdefault(key, []).append(name)
    return tuple(Site(same[0], tuple(same), key[2]) for key, same in readers.items())
