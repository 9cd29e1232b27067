"""Whole frozen prefixes, by each backend and by what a user could write by hand (``by_hand.py``).

fxfreeze's rows are named by backend; "auto" has a million steps ahead, and builds every other. All of them at full depth;
the shallower ones are left to what takes no compiler. Each result is compared with the original in float64; ratios are to the
fastest of those by hand.
"""

import copy
import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxfreeze
from bench import by_hand
from bench.budget import begin
from bench.clock import Contender, interleave, rotated, timer_of
from bench.networks import NETWORKS
from bench.roofline import Work, flops_of, inference
from bench.rows import Subject
from bench.scale import DEVICE, SMALL, scaled
from fxfreeze.backends import openvino
from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.passes.fused_conv import onednn_supports
from fxfreeze.runtime import Segment

SHARES = (0.25, 0.5, 0.75, 1.0)
ROUNDS = scaled(5, 2)
MANY_STEPS = 10**6
CHECKED = 4  # samples: in float64, a convolution takes long
ON_CUDA = DEVICE.type == "cuda"
CPU_LEAVES_OUT = ("resnet50", "densenet121")  # to bench_iteration and bench_freeze, for their time
COMPILERS = ("Inductor", "Inductor, max-autotune, CUDA graphs", "TensorRT", "inductor", "auto")
COMPILED = ("densenet-bc-12-100", "resnet50", "mobilenet_v2") if ON_CUDA else tuple(NETWORKS)
SHALLOW = ("eager", "fx fuse", "library", *(["triton"] if ON_CUDA else []))
BACKENDS = {"cpu": ("plain", "library", "inductor", "openvino"), "cuda": ("plain", "library", "inductor", "triton")}
OURS = ("plain", "library") if SMALL else (*BACKENDS[DEVICE.type], "auto")
NAMES = [name for name in NETWORKS if ON_CUDA or name not in CPU_LEAVES_OUT]
DTYPES = ["bfloat16"] if ON_CUDA else [n for n in ("float32", "bfloat16") if onednn_supports(getattr(torch, n)) is None]


@dataclass
class Measured:
    """times: seconds by contender; builds: of building it, with its first call; errors: relative, against float64.

    backends: of fxfreeze's own, the seconds of passes, compiler and self-check; chosen: what auto runs by.
    """

    work: Work
    builds: dict[str, float] = field(default_factory=dict)
    backends: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    chosen: str = ""


def _segment(net: nn.Module, share: float, backend: str, x: Tensor) -> Segment:
    """The prefix as fxfreeze builds it for a million steps."""
    model = fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(MANY_STEPS), backend=backend).train()
    model.freeze(max(1, round(share * (len(model.units) - 1))))
    model.step = 0
    model(x)
    (segment,) = model.prefix.segments
    return segment


def _names(network: str, share: float) -> Iterator[str]:
    for name in (*by_hand.WAYS, *OURS):
        wanted = name in SHALLOW or share == 1
        left_out = name in COMPILERS and network not in COMPILED
        if wanted and not left_out and (name != "openvino" or openvino.here()):
            yield name


def _output(result: object) -> Tensor:
    while isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, Tensor)
    return result[:CHECKED].double()


@torch.no_grad()
def _exactly(traced: GraphModule, x: Tensor) -> tuple[Tensor, Work]:
    """The original's output in float64, of a few samples, and what it takes to compute all in the dtype of ``x``."""
    outputs = traced(x)
    work = inference(traced, [x], outputs, flops_of(lambda: traced(x)))
    return _output(copy.deepcopy(traced).eval().double()(x[:CHECKED].double())), work


@functools.cache
def measured(network: str, dtype: torch.dtype, share: float) -> Measured:
    begin()
    net, x, _ = NETWORKS[network].drawn()
    contenders: dict[str, Contender] = {}
    traced = _segment(net, share, "plain", x).plain
    expected, work = _exactly(traced, x)
    found = Measured(work)

    def settle(who: str, began: float) -> None:
        result = _output(contenders[who]())
        if ON_CUDA:
            torch.cuda.synchronize()
        found.builds[who] = time.perf_counter() - began
        found.errors[who] = relative_error(result, expected)

    for who in _names(network, share):
        began = time.perf_counter()
        if who in by_hand.WAYS:
            with torch.no_grad():
                contenders[who] = by_hand.contender(who, traced, x, dtype)
                settle(who, began)
            continue
        with _computing(dtype):
            segment = _segment(net, share, who, x)
            contenders[who] = _under(dtype, rotated(segment, [x]))
            found.backends[who] = segment.seconds
            settle(who, began)
        found.chosen = segment.backend if who == "auto" else found.chosen
    with torch.no_grad():
        found.times = interleave(contenders, ROUNDS, warmup=1, timer=timer_of(DEVICE))
    return found


def _computing(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(DEVICE.type, dtype, enabled=dtype is not torch.float32, cache_enabled=False)


def _under(dtype: torch.dtype, run: Contender) -> Contender:
    def call() -> object:
        with _computing(dtype):
            return run()

    return call


@pytest.mark.parametrize("contender", [*by_hand.WAYS, *OURS])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def bench_prefix(row, benchmark, name: str, dtype: str, share: float, contender: str) -> None:
    if contender not in _names(name, share):
        pytest.skip("not installed, or measured of fewer networks or depths")
    kind, network = getattr(torch, dtype), NETWORKS[name]
    found = measured(name, kind, share)
    at = f"{network.size} px, batch {network.batch}, {dtype}"
    benchmark.group = f"prefix, {name} at {at}, {share:.0%} of the units"
    rivals = [who for who in by_hand.WAYS if who in found.times and who != "eager, again"]
    best = min(rivals, key=lambda who: statistics.median(found.times[who]))
    more = {
        "build_seconds": found.builds[contender],
        "backend_seconds": found.backends.get(contender),
        "chosen": found.chosen if contender == "auto" else contender,
    }
    row(
        found.times,
        contender,
        best,
        Subject(kind, network.shape, found.errors[contender], BOUNDS[kind], found.work),
        **more,
    )
