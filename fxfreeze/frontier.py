"""The boundary at one depth of a trace, as the original hands it over: a row for each sample, and what all share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxfreeze.layouts import Layouts
from fxfreeze.randomness import random_state_kept
from fxfreeze.rehearsal import kept_whole, rehearsed
from fxfreeze.rewrite import place
from fxfreeze.rows import batch_size, take
from fxfreeze.runtime import bound_of, reference, relative_error

__all__ = ["Frontier", "NotRowwise"]

# Of the first sample in the second batch: behind others, between copies of itself. That batch has 7, so that no sample has
# the share of it that it has in one of 2, 3 or 4, and no mean is the same.
_PLACE = 4


class NotRowwise(ValueError):  # noqa: N818 - it says what a network is
    """A prefix that does not treat each sample by itself; the message names the operator."""


class Frontier:
    """What crosses at ``depth``. plain: the traced graph that leads there from the tensors of a call; names: of its values.

    layouts: in which the original hands it over.
    """

    def __init__(self, depth: int, plain: GraphModule, names: tuple[str, ...]) -> None:
        self.depth = depth
        self.plain = plain
        self.names = names
        self.layouts = Layouts(self._first_outputs)
        self._whole = kept_whole(plain)
        self._rows: tuple[bool, ...] | NotRowwise | None = None
        self._shared: dict[tuple[Any, ...], list[Any]] = {}

    def rows(self, inputs: Sequence[Any]) -> tuple[bool, ...]:
        """Which values hold a row for each sample; the others are the same for all batches of one size.

        inputs: of a call, two samples or more. Raises NotRowwise when what a sample's row is depends on the other samples,
        or can't be told.
        """
        if self._rows is None:
            try:
                self._rows = self._find_rows(inputs)
            except NotRowwise as error:
                if (batch_size(inputs) or 0) < 2:
                    raise  # a larger batch may tell
                self._rows = error
        if isinstance(self._rows, NotRowwise):
            raise self._rows.with_traceback(None)
        return self._rows

    def completed(self, rows: Sequence[Tensor], inputs: Sequence[Any]) -> list[Any]:
        """All values, from those that hold rows; ``inputs``: of a call with as many samples, whichever they are."""
        mask = self.rows(inputs)
        supply = iter(rows)
        if all(mask):
            return list(supply)
        shapes = tuple(t.shape if isinstance(t, Tensor) else t for t in inputs)
        if shapes not in self._shared:
            outputs = self._run(inputs)
            self._shared[shapes] = [None if is_row else v for v, is_row in zip(outputs, mask, strict=True)]
        return [next(supply) if is_row else v for v, is_row in zip(self._shared[shapes], mask, strict=True)]

    def chosen(self, values: Sequence[Any], inputs: Sequence[Any]) -> list[Tensor]:
        """Of all values, those that hold rows."""
        return [v for v, is_row in zip(values, self.rows(inputs), strict=True) if is_row]

    def _run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.no_grad(), random_state_kept(), rehearsed(self._whole):
            return tuple(self.plain.forward(*inputs))

    def _first_outputs(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random:
            return reference(self.plain, inputs, random, self._whole)[1]

    def _find_rows(self, inputs: Sequence[Any]) -> tuple[bool, ...]:
        """Runs a sample in two places among different others: whatever of it changes depends on its neighbours."""
        count = batch_size(inputs)
        if count is None or count < 2:
            raise NotRowwise("the inputs have no common first dimension of two samples or more")
        mates = list(range(min(count, 4))), [1, min(2, count - 1), 1, 0, 0, 0, 0]
        few = [_Values(self.plain, [_taken(value, samples) for value in inputs], self._whole) for samples in mates]
        kinds = tuple(_is_row(a, b, few) for a, b in zip(few[0].outputs, few[1].outputs, strict=True))
        for name, a, b, is_row in zip(self.names, few[0].outputs, few[1].outputs, kinds, strict=True):
            if not _agree(a, b, is_row):
                raise NotRowwise(_culprit(name, few))
        if not all(isinstance(value, Tensor) for value in few[0].outputs):
            alike = [_taken(value, [0] * len(mates[0])) for value in inputs]
            self._check_numbers(few[0].outputs, _Values(self.plain, alike, self._whole).outputs)
        return kinds

    def _check_numbers(self, values: Sequence[Any], others: Sequence[Any]) -> None:
        for name, a, b in zip(self.names, values, others, strict=True):
            if not isinstance(a, Tensor) and a != b:
                raise NotRowwise(f"{name} is a number that depends on what is in the batch")


def _taken(value: Any, samples: list[int]) -> Any:
    return take(value, torch.tensor(samples)) if isinstance(value, Tensor) else value


class _Values(Interpreter):
    """A run of a graph on a few samples. outputs: at its end; made: of each node, when it was made; size: of the batch."""

    def __init__(self, plain: GraphModule, inputs: list[Any], whole: list[nn.Module]) -> None:
        super().__init__(plain, garbage_collect_values=False)
        self.size = batch_size(inputs)
        self.made: dict[Node, Any] = {}
        try:
            with torch.inference_mode(False), torch.no_grad(), random_state_kept(), rehearsed(whole):
                self.outputs = self.run(*inputs)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
            raise NotRowwise(f"it can't run other batches than those it was traced with: {error}") from error

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.made[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def _is_row(a: Any, b: Any, runs: Sequence[_Values]) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0 and b.dim() > 0
    return tensors and [a.shape[0], b.shape[0]] == [run.size for run in runs] and a.shape[1:] == b.shape[1:]


def _agree(a: Any, b: Any, is_row: bool) -> bool:
    """Whether the first sample's rows are equal up to rounding; of what all share, that it does not depend on samples."""
    if is_row:
        return relative_error(a[:1], b[_PLACE : _PLACE + 1]) <= bound_of(a.dtype)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    return True


def _culprit(name: str, runs: Sequence[_Values]) -> str:
    """Names the first operator that mixes samples; ``name``: of the value that shows it."""
    for node, a in runs[0].made.items():
        b = runs[1].made.get(node)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and node.op != "placeholder":
            is_row = _is_row(a, b, runs)
            if (is_row or a.shape == b.shape) and not _agree(a, b, is_row):
                what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
                return f"{place(node)} ({str(what).removeprefix('root.')}) mixes the samples of a batch"
    return f"{name} is not a row for each sample: its shape does not follow their number"
