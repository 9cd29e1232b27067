"""Frozen networks to test with, whole as the passes see them or behind a model, and what their forwards dispatch."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import nets
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

import fxfreeze
from fxfreeze import FreezableModel, Milestones
from fxfreeze.backends import Backend
from fxfreeze.building import build
from fxfreeze.computation import Computation
from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.inputs import flatten_inputs
from fxfreeze.rewrite import Pass
from fxfreeze.runtime import Segment
from fxfreeze.split import split
from fxfreeze.trace import trace
from fxfreeze.units import Ownership, Unit


def plain_graph(net: nn.Module, *inputs: Any) -> GraphModule:
    """The graph of ``net`` in eval mode, all of it prefix."""
    net.eval()
    modules = {name: 0 for name, _ in net.named_modules() if name}
    parameters = {name: 0 for name, _ in net.named_parameters()}
    units = (Unit("all", tuple(modules), tuple(parameters)), Unit("head", (), ()))
    traced = trace(net, *flatten_inputs(net, inputs, {}))
    return split(net, traced, Ownership(units, modules, parameters), 1).prefix


def frozen(net: nn.Module, *inputs: Any, passes: Sequence[Pass], precision: torch.dtype | None = None) -> Segment:
    """``net`` as one built segment, which computes in ``precision``, or as the caller's autocast says."""
    return build(
        (0, 1), plain_graph(net, *inputs), inputs, Computation.current("cpu", precision), Backend(tuple(passes))
    )


def settle(net: nn.Module) -> nn.Module:
    """Give norms statistics and weights that are not 0 and 1, without which a fold can hardly be wrong."""
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                low, high = (0.4, 2.0) if name.endswith(("running_var", "weight")) else (-1.0, 1.0)
                tensor.uniform_(low, high)
    return net


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.sources: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        self.sources += [(func.overloadpacket.__name__, args[0])] if args and isinstance(args[0], Tensor) else []
        return func(*args, **(kwargs or {}))


def dispatched(call: Callable[[], Any]) -> Counter[str]:
    """How often ``call`` dispatches each ATen operator, by name."""
    with _Counting() as mode:
        call()
    return mode.counts


def norms_run(call: Callable[[], Any]) -> int:
    """How many batch-norm kernels ``call`` dispatches."""
    return sum(count for name, count in dispatched(call).items() if "batch_norm" in name)


def casts_of(call: Callable[[], Any], tensors: Sequence[Tensor]) -> int:
    """How often ``call`` casts one of ``tensors``."""
    with _Counting() as mode:
        call()
    places = {t.data_ptr() for t in tensors}
    held = [(name, source) for name, source in mode.sources if source.layout == torch.strided]
    return sum(name in ("_to_copy", "to") and source.data_ptr() in places for name, source in held)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Five units of one convolution each but the last: stem, blocks.0, blocks.1, last, head."""
    return nets.settle(nets.Chain(nets.ConvNorm(8, 8), nets.ConvNorm(8, 8))).to(dtype)


def images(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=dtype)


def frozen_to(unit: str, net: nn.Module, **options: Any) -> FreezableModel:
    """``net`` with ``unit`` and all before it frozen from the start; its frozen part runs plain unless it says otherwise."""
    return fxfreeze.compile(net, Milestones({unit: 0}), **{"backend": "plain", **options})


def assert_as_original(model: FreezableModel, *inputs: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The model's output is that of its original, whose frozen units are in eval, for the same random numbers."""
    with torch.random.fork_rng():
        values = model(*inputs)
    with torch.no_grad(), torch.random.fork_rng():
        assert relative_error(values.detach(), model.original(*inputs)) <= BOUNDS[dtype]
