"""How close a rewritten segment comes to the original: the original's outputs on a batch, the error, and its bounds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxfreeze.inputs import TraceRefusal
from fxfreeze.randomness import RandomState
from fxfreeze.rehearsal import rehearsed

__all__ = [
    "BOUNDS",
    "INT8_BOUND",
    "TF32_BOUND",
    "Recorder",
    "bound_of",
    "cut_like",
    "few_samples",
    "largest_error",
    "reference",
    "relative_error",
]

# The largest relative error, by norm, that a rewritten segment may show against the original.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_BOUND = 5e-3  # float32 where cuDNN may round inputs to 10 bits
INT8_BOUND = 5e-2  # 8-bit weights and activations: 0.8 to 3.4% of two trained networks in bench/results/int8-cpu.json
_SAMPLES = 4


def bound_of(dtype: torch.dtype, device: str) -> float:
    """The largest relative error, by norm, of values that were computed in ``dtype`` on a type of device."""
    if dtype is torch.float32 and device == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32_BOUND
    return BOUNDS.get(dtype, BOUNDS[torch.bfloat16])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|`` by the 2-norm in float64; inf for another shape or dtype, 0 for two zeros."""
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(value, reference) else float("inf")
    distance = torch.linalg.vector_norm(value.double() - reference.double())
    return float(distance / torch.linalg.vector_norm(reference.double())) if distance else 0.0


def largest_error(outputs: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest relative error of the tensors among them; 0 where there is none."""
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=True) if isinstance(b, Tensor)]
    return max((relative_error(a, b) for a, b in pairs), default=0.0)


def reference(
    graph: GraphModule, inputs: Sequence[Any], random: RandomState, whole: list[nn.Module], all_samples: bool = False
) -> tuple[list[Any], tuple[Any, ...]]:
    """A few samples of the batch, and what the original makes of them; the whole batch where it can't be sliced.

    Each node of ``graph`` notes what its value is like.
    """
    few = None if all_samples else few_samples(inputs)
    if few is not None:
        try:
            with rehearsed(whole):
                return few, tuple(Recorder(graph).run(*few))
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
            random.restore()  # a network that ties samples together (pairs, frames) needs the batch it was given
    try:
        with rehearsed(whole):
            return list(inputs), tuple(Recorder(graph).run(*inputs))
    except Exception as error:
        raise TraceRefusal(f"the frozen part as it was traced can't run it: {type(error).__name__}: {error}") from error


def cut_like(value: Any, sample: Any) -> Any:
    """As many of the samples."""
    return value[: len(sample)] if isinstance(value, Tensor) and value.shape != sample.shape else value


def few_samples(inputs: Sequence[Any]) -> list[Any] | None:
    """The first samples of tensors of one length, or None where there are no more, or they can't be told."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    sizes = {t.shape[0] if t.dim() and t.layout == torch.strided else None for t in tensors}
    if len(sizes) != 1 or None in sizes or next(iter(sizes)) <= _SAMPLES:  # type: ignore[operator]
        return None
    return [t[:_SAMPLES] if isinstance(t, Tensor) else t for t in inputs]


class Recorder(Interpreter):
    """Runs a graph and notes on each node what its value is like, for the passes to read."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        n.meta["value"] = value.detach().to("meta") if isinstance(value, Tensor) else None
        n.meta["device"] = value.device.type if isinstance(value, Tensor) else None
        return value
