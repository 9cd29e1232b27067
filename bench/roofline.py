"""How near a time comes to what the machine could do: work counted, ceilings measured in the same run.

FLOPs are those of convolutions and matrix products, by torch's own counter. Bytes are the compulsory traffic: each tensor
that must be read or written, once: parameters, inputs and results. A share above 1 is possible where a convolution takes
fewer multiplications than its definition (Winograd), or where all of it stays in a cache.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from bench.clock import interleave, timer_of
from bench.scale import INTERPRETING, SMALL

_ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """What a contender has to do at the least: FLOPs, and bytes read and written."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """Of a large copy (read and written bytes), and of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured when first asked for, the fastest of a few rounds; of integers, the product of float32."""
    large = device.type == "cuda"
    count, side = (1 << 16, 64) if SMALL or INTERPRETING else (1 << 28, 8192) if large else (1 << 26, 2048)
    number = dtype if dtype.is_floating_point else torch.float32
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(number) for _ in range(2))
    contenders = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = interleave(contenders, _ROUNDS, warmup=1, timer=timer_of(device))
    return Ceilings(2 * source.nbytes / min(times["copy"]), 2 * side**3 / min(times["product"]))


def share(work: Work, ceilings: Ceilings, seconds: float) -> float:
    """Of the roofline: the least time that the ceilings allow, over the time that it took."""
    least = max(work.flops / ceilings.flops_per_second, work.bytes / ceilings.bytes_per_second)
    return least / seconds


def flops_of(run: Callable[[], object]) -> int:
    """Of one call, in eager mode."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def inference(graph: GraphModule, inputs: Iterable[Tensor], outputs: Iterable[Tensor], flops: int) -> Work:
    """What the graph reads of its modules, inputs read, outputs written."""
    return Work(flops, nbytes(held(graph)) + nbytes(inputs) + nbytes(outputs))


def held(graph: GraphModule) -> list[Tensor]:
    """Parameters and buffers that a graph reads, each once; its modules may hold more."""
    found: dict[int, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            found |= {id(t): t for t in (*module.parameters(), *module.buffers())}
        elif node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(graph)
            found[id(tensor)] = tensor
    return list(found.values())


def training(read: Iterable[Tensor], live: Iterable[Tensor], flops: int) -> Work:
    """``read``, and of each live parameter its momentum read, and both written."""
    return Work(flops, nbytes(read) + 3 * nbytes(live))
