"""The global random generators, so that tracing and building a prefix leave the user's random state as they found it."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomState", "random_state_kept"]


class RandomState:
    """A snapshot of the generators of torch (CPU and, once initialised, CUDA), of ``random`` and of numpy if imported."""

    def __init__(self) -> None:
        self.torch: list[Tensor] = [torch.get_rng_state()]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self.torch += torch.cuda.get_rng_state_all()
        self.python = random.getstate()
        self.numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def unchanged(self) -> bool:
        """Whether nothing has been drawn since the snapshot."""
        now = RandomState()
        return (
            len(self.torch) == len(now.torch)
            and all(torch.equal(a, b) for a, b in zip(self.torch, now.torch, strict=True))
            and self.python == now.python
            and (self.numpy is None or _same_numpy(self.numpy, now.numpy))
        )

    def restore(self) -> None:
        """Put every generator back to the snapshot."""
        torch.set_rng_state(self.torch[0])
        for device, state in enumerate(self.torch[1:]):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _same_numpy(a: Any, b: Any) -> bool:
    return bool(a[0] == b[0] and (a[1] == b[1]).all() and a[2:] == b[2:])


@contextlib.contextmanager
def random_state_kept() -> Iterator[RandomState]:
    """Restore the generators on leaving, whatever was drawn within."""
    state = RandomState()
    try:
        yield state
    finally:
        state.restore()
