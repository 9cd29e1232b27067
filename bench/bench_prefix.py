"""Whole frozen prefixes, by each backend and by what a user could write by hand, at half and full depth.

eager: the original in eval mode, channels_last; fx fuse: torch.fx's own folding of batch norms; Inductor: torch.compile with
freezing; OpenVINO: exported, converted and compiled by hand. fxfreeze's rows are named by backend; "auto" has a million
steps ahead, and builds every other. Some are measured at full depth only, to save time. Each row is checked against eager.
"""

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import fxfreeze
from bench.conftest import Contender, interleave
from fxfreeze import zoo
from fxfreeze.backends import openvino
from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.passes.fused_conv import onednn_supports
from fxfreeze.runtime import Segment
from fxfreeze.sizes import dtype_text

BATCH = 32
SHARES = (0.5, 1.0)
ROUNDS = 7
MANY_STEPS = 10**6


def _built_in(name: str) -> nn.Module:
    return zoo.load(name, num_classes=10, in_channels=3, image_size=32)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the size of its images
    "densenet-bc-12-100": (lambda: _built_in("densenet-bc-12-100"), 32),
    "wrn-40-4": (lambda: _built_in("wrn-40-4"), 32),
    "vgg-16-bn": (lambda: _built_in("vgg-16-bn"), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 96),
}
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn_supports(dtype) is None]
BY_HAND = ("eager", "eager, again", "fx fuse", "Inductor", "OpenVINO")
FULL_ONLY = ("eager, again", "plain", "inductor", "auto")
OURS = ("plain", "library", "inductor", "openvino", "auto")


@dataclass
class Measured:
    """times: seconds by contender; builds: of building it; errors: relative, against eager; flops: of one call.

    chosen: what auto runs by.
    """

    times: dict[str, list[float]]
    builds: dict[str, float]
    errors: dict[str, float]
    flops: int
    chosen: str


def _segment(net: nn.Module, share: float, backend: str, x: Tensor) -> Segment:
    """The prefix as fxfreeze builds it for a million steps."""
    model = fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(MANY_STEPS), backend=backend).train()
    model.freeze(max(1, round(share * (len(model.units) - 1))))
    model.step = 0
    model(x)
    (segment,) = model.prefix.segments
    return segment


def _by_hand(name: str, traced: GraphModule, x: Tensor) -> Callable[[], object]:
    """The traced graph of the original's modules, as a user would make it fast."""
    graph = copy.deepcopy(traced).eval()
    if name == "OpenVINO":
        return _openvino(graph, x)
    graph = graph.to(memory_format=torch.channels_last)
    images = x.to(memory_format=torch.channels_last)
    if name == "fx fuse":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which it imports
            from torch.fx.experimental.optimization import fuse
        graph = fuse(graph)
    elif name == "Inductor":
        return functools.partial(torch.compile(graph, options={"freezing": True}), images)
    return functools.partial(graph, images)


def _openvino(graph: GraphModule, x: Tensor) -> Callable[[], object]:
    """As its documentation says, with torch's number of threads and the dtype that torch computes in."""
    import openvino as ov

    hint = "bf16" if torch.is_autocast_enabled("cpu") else "f32"
    with torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = ov.convert_model(torch.export.export(graph, (x,)), input=[tuple(x.shape)])
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = ov.Core().compile_model(converted, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
    return lambda: (torch.from_numpy(model(x.numpy(), share_inputs=True)[0]),)


def _output(result: object) -> Tensor:
    while isinstance(result, (tuple, list)):
        result = result[0]
    assert isinstance(result, Tensor)
    return result.float()


@functools.cache
def measured(name: str, dtype: torch.dtype, share: float) -> Measured:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(BATCH, 3, size, size)
    contenders: dict[str, Contender] = {}
    builds, errors, chosen, expected = {}, {}, "", None
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not torch.float32, cache_enabled=False)
    with autocast:
        traced = _segment(net, share, "plain", x).plain
        for who in (*BY_HAND, *OURS):
            if (share < 1 and who in FULL_ONLY) or (who.lower() == "openvino" and not openvino.here()):
                continue
            began = time.perf_counter()
            if who in OURS:
                segment = _segment(net, share, who, x)
                contenders[who] = functools.partial(segment, x)
                chosen = segment.backend if who == "auto" else chosen
            else:
                contenders[who] = _by_hand(who, traced, x)
            with torch.no_grad():
                result = _output(contenders[who]())
                builds[who] = time.perf_counter() - began
            expected = result if expected is None else expected  # eager is the first
            errors[who] = relative_error(result, expected)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            contenders["eager"]()
        with torch.no_grad():
            times = interleave(contenders, ROUNDS)
    return Measured(times, builds, errors, counter.get_total_flops(), chosen)


@pytest.mark.parametrize("contender", [*BY_HAND, *OURS])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def bench_prefix(row, benchmark, name: str, dtype: torch.dtype, share: float, contender: str) -> None:
    found = measured(name, dtype, share)
    if contender not in found.times:
        pytest.skip("measured at full depth only, or not installed")
    size = NETWORKS[name][1]
    benchmark.group = f"prefix, {name} at {size} px, batch {BATCH}, {dtype_text(dtype)}, {share:.0%} of the units"
    rivals = [who for who in ("eager", "fx fuse", "Inductor", "OpenVINO") if who in found.times]
    best = min(rivals, key=lambda who: statistics.median(found.times[who]))
    median = statistics.median(found.times[contender])
    benchmark.extra_info |= {
        "dtype": dtype_text(dtype),
        "shape": [BATCH, 3, size, size],
        "flops": found.flops,
        "gflops_per_second": found.flops / median / 1e9,
        "relative_error": found.errors[contender],
        "build_seconds": found.builds[contender],
        "chosen": found.chosen if contender == "auto" else contender,
    }
    row(found.times, contender, best)
    assert found.errors[contender] <= BOUNDS[dtype]
