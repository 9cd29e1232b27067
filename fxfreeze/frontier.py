"""The boundary at one depth of a trace, as the original hands it over: a row for each sample, and what all share."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxfreeze.randomness import random_state_kept
from fxfreeze.rehearsal import kept_whole, rehearsed
from fxfreeze.rowwise import NotRowwise, Undecided, find_rows
from fxfreeze.runtime import layouts_of

__all__ = ["Frontier"]

_SIZES = 16  # of batches, of which the values that all samples share are kept


class Frontier:
    """What crosses at ``depth``. plain: the traced graph that leads there from the tensors of a call; names: of its values.

    layouts: in which the original hands it over; whole: modules on the way that may do more than compute.
    """

    def __init__(self, depth: int, plain: GraphModule, names: tuple[str, ...]) -> None:
        self.depth = depth
        self.plain = plain
        self.names = names
        self.whole = kept_whole(plain)
        self.layouts = layouts_of(plain, self.whole)
        self._rows: tuple[bool, ...] | NotRowwise | None = None
        self._shared: dict[tuple[Any, ...], list[Any]] = {}

    def rows(self, inputs: Sequence[Any]) -> tuple[bool, ...]:
        """Which values hold a row for each sample; the others are the same for all batches of one size.

        inputs: of a call, with two different samples. Raises NotRowwise when what a sample's row is depends on the other
        samples, Undecided when these can't tell.
        """
        if self._rows is None:
            try:
                self._rows = find_rows(self.plain, self.names, inputs, self.whole)
            except Undecided:
                raise  # other samples may tell
            except NotRowwise as error:
                self._rows = error
        if isinstance(self._rows, NotRowwise):
            raise self._rows.with_traceback(None)
        return self._rows

    def tells(self, inputs: Sequence[Any]) -> bool:
        """Whether inputs that nobody gave show which values hold rows. That they do not shows nothing."""
        if self._rows is None:
            try:
                self._rows = find_rows(self.plain, self.names, inputs, self.whole)
            except Exception:  # noqa: BLE001 - a forward may raise anything for a sample that nobody would give it
                return False
        return not isinstance(self._rows, NotRowwise)

    def completed(self, rows: Sequence[Tensor], inputs: Sequence[Any]) -> list[Any]:
        """All values, from those that hold rows; ``inputs``: of a call with as many samples, whichever they are.

        Those that all samples share are copies: a caller may be handed them, and write into them.
        """
        mask = self.rows(inputs)
        supply = iter(rows)
        if all(mask):
            return list(supply)
        shapes = tuple(t.shape if isinstance(t, Tensor) else t for t in inputs)
        if shapes not in self._shared:
            if len(self._shared) == _SIZES:
                del self._shared[next(iter(self._shared))]
            outputs = self._run(inputs)
            self._shared[shapes] = [None if is_row else v for v, is_row in zip(outputs, mask, strict=True)]
        return [next(supply) if is_row else _copy(v) for v, is_row in zip(self._shared[shapes], mask, strict=True)]

    def chosen(self, values: Sequence[Any], inputs: Sequence[Any]) -> list[Tensor]:
        """Of all values, those that hold rows."""
        return [v for v, is_row in zip(values, self.rows(inputs), strict=True) if is_row]

    def _run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.no_grad(), random_state_kept(), rehearsed(self.whole):
            return tuple(self.plain.forward(*inputs))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
