"""Profiles made of chosen figures, and a clock that moves only when it is told to."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfreeze.iterations import Iteration, Parts, predict
from fxfreeze.profiled import Profile
from fxfreeze.runtime import Segment

UNITS = ("stem", "block", "head")
FLOPS = (10, 20, 30)
DATA, PREFIX, SUFFIX, BACKWARD, STEP = 2.0, 1.0, 5.0, 7.0, 3.0  # seconds that the fake clock moves by


def make_profile(*measured: Parts, scatter: float = 0.0, rounds: int = 16, fetched: bool = True) -> Profile:
    """Of depths 0, 1, ... as measured; the quartiles lie ``scatter`` seconds apart."""
    iterations = [
        Iteration(
            depth=depth,
            backend="library" if depth else None,
            measured=parts,
            quartiles=(parts.total - scatter / 2, parts.total + scatter / 2),
            predicted=predict(measured[0], FLOPS, depth),
        )
        for depth, parts in enumerate(measured)
    ]
    return Profile(tuple(iterations), UNITS, FLOPS, 4, fetched, rounds, "a chip", 2, torch.__version__)


class FakeClock:
    """Seconds that pass only in the parts of an iteration, in each as many as the constants above say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("fxfreeze.ranges.Stopwatch._mark", lambda _: self.now)
        run = Segment.__call__

        def prefix(segment: Segment, *inputs: Any) -> Any:
            self.now += PREFIX
            return run(segment, *inputs)

        monkeypatch.setattr(Segment, "__call__", prefix)

    def loader(self, batch: Any) -> Iterator[Any]:
        """The batch, again and again."""
        while True:
            self.now += DATA
            yield batch

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.now += SUFFIX
        loss = nn.functional.cross_entropy(outputs, targets)
        loss.register_hook(self._backward)
        return loss

    def _backward(self, gradient: Tensor) -> None:
        self.now += BACKWARD

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(self._step)
        return optimizer

    def _step(self, *_: Any) -> None:
        self.now += STEP


def recorded(batches: Iterable[Any], note: Callable[[Any], None]) -> Iterator[Any]:
    """The same, each noted when it is fetched."""
    for batch in batches:
        note(batch)
        yield batch
