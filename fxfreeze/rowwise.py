"""Whether a graph treats each sample of a batch by itself, found out by running it; and if not, which operator mixes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxfreeze.randomness import random_state_kept
from fxfreeze.rehearsal import rehearsed, state_of
from fxfreeze.rewrite import place
from fxfreeze.rows import batch_size, take
from fxfreeze.runtime import bound_of, relative_error

__all__ = ["NotRowwise", "Undecided", "find_rows"]

_PLACE = 4  # of the first sample in a batch of 7, of which it has another share than it has of 2, 3 or 4 samples


class NotRowwise(ValueError):  # noqa: N818 - it says what a network is
    """A prefix that does not treat each sample by itself; the message names the operator."""


class Undecided(NotRowwise):
    """Samples that can't tell, for they are too few or all the same."""


def find_rows(
    plain: GraphModule, names: Sequence[str], inputs: Sequence[Any], whole: Sequence[nn.Module]
) -> tuple[bool, ...]:
    """Which outputs of ``plain`` hold a row for each sample; the others are the same for all batches of one size.

    names: of the outputs; inputs: of a call; whole: modules that may do more than compute. NotRowwise, Undecided.
    """
    _refuse_hooks(plain)
    count, other = _two_samples(inputs)
    few = list(range(min(count, 4)))
    few = [0, other, *(s for s in few if s not in (0, other))][: max(2, len(few))]
    rest = [other, few[-1], other, 0, 0, 0, 0]
    try:
        first, second = (_Run(plain, inputs, samples, whole) for samples in (few, rest))
        where = _PLACE
    except _FixedSizeError:  # a graph for batches of one size
        few = list(range(count))
        first, second = (_Run(plain, inputs, samples, whole) for samples in (few, [*few[1:], 0]))
        where = count - 1
    third = _Run(plain, inputs, [0] * len(few), whole)
    kinds = tuple(_is_row(a, b, first, second) for a, b in zip(first.outputs, second.outputs, strict=True))
    for number, (name, is_row) in enumerate(zip(names, kinds, strict=True)):
        a, b, c = (run.outputs[number] for run in (first, second, third))
        if not _agree(a, b, c, is_row, where):
            raise NotRowwise(_culprit(name, first, second, third, where))
    return kinds


def _refuse_hooks(plain: GraphModule) -> None:
    for node in plain.graph.nodes:
        if node.op == "call_module":
            module = plain.get_submodule(str(node.target))
            name = str(node.target).removeprefix("root.")
            hooks = [h for m in module.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
            if any(not _is_torchs(hook) for hook in hooks):
                raise NotRowwise(f"{name} has a forward hook, which would not be called")


def _is_torchs(hook: Any) -> bool:
    """Weight norm's, say, which only prepares a weight."""
    return str(getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def _two_samples(inputs: Sequence[Any]) -> tuple[int, int]:
    """The number of samples, and the first that differs from sample 0."""
    count = batch_size(inputs)
    if count is None:
        raise NotRowwise("the inputs have no first dimension in common")
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    other = next((s for s in range(1, count) if any(not torch.equal(t[s], t[0]) for t in tensors)), None)
    if other is None:
        raise Undecided(f"a batch of {count} equal samples can't tell whether samples are mixed")
    return count, other


class _FixedSizeError(NotRowwise):
    """A graph that can't run a batch of another size than it was traced with."""


class _Run(Interpreter):
    """A run of a graph on some samples. outputs: at its end; made: of each node, when it was made; size: of the batch."""

    def __init__(
        self, plain: GraphModule, inputs: Sequence[Any], samples: list[int], whole: Sequence[nn.Module]
    ) -> None:
        super().__init__(plain, garbage_collect_values=False)
        self.size = len(samples)
        self.made: dict[Node, Any] = {}
        taken = [take(value, torch.tensor(samples)) if isinstance(value, Tensor) else value for value in inputs]
        with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random, rehearsed(whole):
            state = state_of(whole)  # as rehearsed, without hooks
            try:
                self.outputs = self.run(*taken)
            except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
                raise _FixedSizeError(f"it can't run a batch of {self.size}: {str(error).splitlines()[0]}") from error
            finally:
                drawn, kept = not random.unchanged(), state.restore()
        if drawn:
            raise NotRowwise("the frozen part draws random numbers")
        if kept is not None:
            raise NotRowwise(f"a frozen module keeps {kept.partition('.')[2]!r}, which would not be renewed")

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.made[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def _is_row(a: Any, b: Any, first: _Run, second: _Run) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0 and b.dim() > 0
    return tensors and (a.shape[0], b.shape[0]) == (first.size, second.size) and a.shape[1:] == b.shape[1:]


def _agree(a: Any, b: Any, c: Any, is_row: bool, where: int) -> bool:
    """Whether the first sample's row stays: exactly among other mates, up to rounding in another place and batch.

    Of what all samples share, whether it is the same.
    """
    if is_row:
        exact = a.device.type == "cpu"
        return _close(a[:1], c[:1], 0.0 if exact else bound_of(a.dtype)) and _close(
            a[:1], b[where : where + 1], bound_of(a.dtype)
        )
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return isinstance(c, Tensor) and a.shape == b.shape == c.shape and _close(a, b, 0.0) and _close(a, c, 0.0)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == c)


def _close(a: Tensor, b: Tensor, bound: float) -> bool:
    """Up to a relative error; what is no number must be so in both."""
    if a.is_floating_point() or a.is_complex():
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        a, b = a.where(finite, 0), b.where(finite, 0)
    return torch.equal(a, b) or (not a.is_complex() and relative_error(a, b) <= bound)


def _culprit(name: str, first: _Run, second: _Run, third: _Run, where: int) -> str:
    """Names the first operator that mixes samples; ``name``: of the value that shows it."""
    for node, a in first.made.items():
        b, c = second.made.get(node), third.made.get(node)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(c, Tensor) and node.op != "placeholder":
            is_row = _is_row(a, b, first, second)
            if (is_row or a.shape == b.shape) and not _agree(a, b, c, is_row, where):
                what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
                return f"{place(node)} ({str(what).removeprefix('root.')}) mixes the samples of a batch"
    return f"{name} is not a row for each sample: its shape does not follow their number"
