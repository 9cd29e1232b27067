"""Random generators, global and held by modules: tracing and building a prefix leave them in the state they found."""

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxfreeze.kept import held

__all__ = ["RandomState", "random_state_kept"]


class RandomState:
    """A snapshot of the generators of torch (CPU and, once initialised, CUDA), of ``random`` and of numpy if imported.

    modules: those whose own generators count too, held directly, in containers or in plain objects.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.torch: list[Tensor] = [torch.get_rng_state()]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self.torch += torch.cuda.get_rng_state_all()
        self.python = random.getstate()
        self.numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        generators = _generators(modules)
        self.own = [(generator, _get_state(generator)) for generator in generators]

    def unchanged(self) -> bool:
        """Whether nothing has been drawn since the snapshot."""
        now = RandomState()
        return (
            len(self.torch) == len(now.torch)
            and all(torch.equal(a, b) for a, b in zip(self.torch, now.torch, strict=True))
            and self.python == now.python
            and (self.numpy is None or _same(self.numpy, now.numpy))
            and all(_same(state, _get_state(generator)) for generator, state in self.own)
        )

    def restore(self) -> None:
        """Put every generator back to the snapshot."""
        torch.set_rng_state(self.torch[0])
        for device, state in enumerate(self.torch[1:]):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        for generator, state in self.own:
            _set_state(generator, state)


def _generators(modules: Iterable[nn.Module]) -> list[Any]:
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        kinds += (numpy.Generator, numpy.RandomState, numpy.BitGenerator)
    found = (value for _, value in held(("", module) for module in modules))
    return [value for value in found if issubclass(type(value), kinds) and not isinstance(value, random.SystemRandom)]


def _get_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):  # torch's, and numpy's older one
        return generator.get_state()
    return getattr(generator, "bit_generator", generator).state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def _same(a: Any, b: Any) -> bool:
    """Whether two states are equal: numbers, strings and arrays, in dicts and tuples."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


@contextlib.contextmanager
def random_state_kept(modules: Iterable[nn.Module] = ()) -> Iterator[RandomState]:
    """Restore the generators, global and of the modules, on leaving, whatever was drawn within."""
    state = RandomState(modules)
    try:
        yield state
    finally:
        state.restore()
