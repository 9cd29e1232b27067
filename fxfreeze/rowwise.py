"""Whether a graph treats each sample of a batch by itself, found out by running it; and if not, which operator mixes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxfreeze.fidelity import bound_of, relative_error
from fxfreeze.randomness import random_state_kept
from fxfreeze.rehearsal import rehearsed, state_of
from fxfreeze.rewrite import place
from fxfreeze.rows import batch_size, take

__all__ = ["NotRowwise", "Undecided", "find_rows"]

_COPIED = 3  # samples that are tried in batches of copies
_PLACE = 4  # of the first sample in a batch of 7, of which it has another share than it has of 2, 3 or 4 samples


class NotRowwise(ValueError):  # noqa: N818 - it says what a network is
    """A prefix that does not treat each sample by itself; the message names the operator."""


class Undecided(NotRowwise):
    """Samples that can't tell, for they are too few or all the same."""


def find_rows(
    plain: GraphModule, names: Sequence[str], inputs: Sequence[Any], whole: Sequence[nn.Module]
) -> tuple[bool, ...]:
    """Which outputs of ``plain`` hold a row for each sample; the others are the same for all batches of one size.

    names: of the outputs; inputs: of a call with as many samples as the largest batch, for what mixes samples may show in no
    smaller one; whole: modules that may do more than compute. NotRowwise, Undecided.
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
    _check_whole_batch(plain, names, inputs, whole, kinds, few)
    return kinds


def _check_whole_batch(
    plain: GraphModule,
    names: Sequence[str],
    inputs: Sequence[Any],
    whole: Sequence[nn.Module],
    kinds: Sequence[bool],
    samples: Sequence[int],
) -> None:
    """Of some samples that each row in a batch of copies of it is what it is in its place of the whole batch.

    So each has other mates, is in every place, and is once without each of the others. NotRowwise.
    """
    count = batch_size(inputs)
    assert count is not None
    batch = _Run(plain, inputs, [*range(count)], whole, keep=False)
    for sample in samples[:_COPIED]:
        copies = _Run(plain, inputs, [sample] * count, whole, keep=False)
        for name, a, b, is_row in zip(names, batch.outputs, copies.outputs, kinds, strict=True):
            if not _same_in_copies(a, b, is_row, sample):
                batch, copies = (_Run(plain, inputs, each, whole) for each in ([*range(count)], [sample] * count))
                raise NotRowwise(_culprit_in_copies(name, batch, copies, sample))


def _same_in_copies(batch: Any, copies: Any, is_row: bool, sample: int) -> bool:
    """Exactly in its own place, up to rounding in the others."""
    if not is_row:
        return _agree(batch, copies, copies, is_row, 0)
    row, alone = batch[sample : sample + 1], copies[sample : sample + 1]
    return _close(row, alone, _exact(batch)) and _close(
        copies, alone.expand_as(copies), bound_of(copies.dtype, copies.device.type)
    )


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
    """A run of a graph on some samples. outputs: at its end; made: of each node, when it was made; size: of the batch.

    keep: what each node makes, and not the outputs alone.
    """

    def __init__(
        self,
        plain: GraphModule,
        inputs: Sequence[Any],
        samples: list[int],
        whole: Sequence[nn.Module],
        *,
        keep: bool = True,
    ) -> None:
        super().__init__(plain, garbage_collect_values=not keep)
        self.size = len(samples)
        self.keep = keep
        self.made: dict[Node, Any] = {}
        taken = [take(value, torch.tensor(samples)) if isinstance(value, Tensor) else value for value in inputs]
        with torch.inference_mode(False), torch.no_grad(), random_state_kept() as random, rehearsed(whole):
            state = state_of(whole)  # as rehearsed, without hooks
            buffers = [(name, b, b._version) for module in whole for name, b in module.named_buffers()]
            try:
                self.outputs = self.run(*taken)
            except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
                raise _FixedSizeError(f"it can't run a batch of {self.size}: {str(error).splitlines()[0]}") from error
            finally:
                drawn, kept = not random.unchanged(), state.restore()
                written = next((name for name, buffer, version in buffers if buffer._version != version), None)
        if drawn:
            raise NotRowwise("the frozen part draws random numbers")
        if kept is not None or written is not None:
            name = written if kept is None else kept.partition(".")[2]
            raise NotRowwise(f"a frozen module keeps {name!r}, which would not be renewed")

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if self.keep:
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
        return _close(a[:1], c[:1], _exact(a)) and _close(a[:1], b[where : where + 1], bound_of(a.dtype, a.device.type))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return isinstance(c, Tensor) and a.shape == b.shape == c.shape and _close(a, b, 0.0) and _close(a, c, 0.0)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == c)


def _exact(values: Tensor) -> float:
    """The bound of what is the same computation."""
    return 0.0 if values.device.type == "cpu" else bound_of(values.dtype, values.device.type)


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
                return _mixes(node)
    return f"{name} is not a row for each sample: its shape does not follow their number"


def _culprit_in_copies(name: str, batch: _Run, copies: _Run, sample: int) -> str:
    for node, a in batch.made.items():
        b = copies.made.get(node)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and node.op not in ("placeholder", "output"):
            is_row = a.dim() > 0 and len(a) == batch.size and a.shape == b.shape
            if is_row and not _same_in_copies(a, b, is_row, sample):
                return _mixes(node)
    return f"{name} is not a row for each sample: it depends on the others"


def _mixes(node: Node) -> str:
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    where, operator = place(node), str(what).removeprefix("root.")
    return f"{where if where == operator else f'{where} ({operator})'} mixes the samples of a batch"
