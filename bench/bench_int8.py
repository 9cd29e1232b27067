"""A frozen backbone in int8, beside OpenVINO in float32 and bfloat16, and eager: time, and how far its outputs are off.

Networks are trained for a little first, on MNIST enlarged: quantization errs by what weights and activations are like, and
more with random ones. Where the error is past the bound, fxfreeze would run float32: the row says whether it does. Beside it
stands the error that rounding to fp8 would bring.
"""

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze
from bench.clock import Contender, interleave
from bench.fp8_error import fp8_error
from bench.rows import Subject
from bench.scale import SMALL
from fxfreeze import data
from fxfreeze.backends import int8
from fxfreeze.fidelity import BOUNDS, INT8_BOUND, relative_error
from fxfreeze.imports import ChoiceError
from fxfreeze.runtime import Segment

BATCH = 32
ROUNDS = 9
STEPS = 120
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the size of its images
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=10), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 96),
}
FP32, BF16 = torch.float32, torch.bfloat16
# By contender, the dtype and the bound; that of int8 is twice the self-check's, since these images calibrated nothing.
CONTENDERS = {
    "eager": (FP32, BOUNDS[FP32]),
    "openvino fp32": (FP32, BOUNDS[FP32]),
    "openvino bf16": (BF16, BOUNDS[BF16]),
    "int8": (torch.int8, 2 * INT8_BOUND),
}


def _here() -> bool:
    try:
        int8.package()
    except ChoiceError:
        return False
    return True


def _images(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size, mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def _trained(make: Callable[[], nn.Module], size: int) -> nn.Module:
    torch.manual_seed(0)
    net = make().train()
    images, labels = data.load("mnist5k").train.tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(labels), (BATCH,))
        F.cross_entropy(net(_images(images[chosen], size)), labels[chosen]).backward()
        optimizer.step()
        cosine.step()
        optimizer.zero_grad()
    return net


def _segment(net: nn.Module, contender: str, x: Tensor) -> Segment:
    """All of the network but its head, as fxfreeze builds it on ``x``."""
    backend = "plain" if contender == "eager" else "openvino"
    precision = {"openvino bf16": "bf16", "int8": "int8"}.get(contender)
    model = fxfreeze.compile(copy.deepcopy(net), fxfreeze.Milestones({}), backend=backend, precision=precision)
    model.freeze(len(model.units) - 1)
    with warnings.catch_warnings(action="ignore"):  # of a bound that was passed: the row says so
        model.train()(x)
    (segment,) = model.prefix.segments
    return segment


@functools.cache
def measured(name: str) -> tuple[dict[str, list[float]], dict[str, Segment], dict[str, float], float]:
    """Seconds, segments and errors on images that nothing was calibrated on, by contender; and the error of fp8."""
    make, size = NETWORKS[name]
    net, (test, _) = _trained(make, size), data.load("mnist5k").test.tensors
    x, unseen = _images(test[:BATCH], size), _images(test[BATCH : 2 * BATCH], size)
    segments = {contender: _segment(net, contender, x) for contender in CONTENDERS}
    exact = segments["eager"].plain
    with torch.no_grad():
        errors = {c: relative_error(segment(unseen)[0], exact(unseen)[0]) for c, segment in segments.items()}
        rounded = fp8_error(segments["eager"].rewritten, unseen, exact(unseen)[0])
        runs: dict[str, Contender] = {c: functools.partial(segment, x) for c, segment in segments.items()}
        runs["eager"] = functools.partial(exact, x)
        return interleave(runs, ROUNDS), segments, errors, rounded


@pytest.mark.skipif(SMALL, reason="small runs compile nothing")
@pytest.mark.skipif(not _here(), reason="openvino or nncf is not installed")
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", NETWORKS)
def bench_int8(row, benchmark, name: str, contender: str) -> None:
    times, segments, errors, rounded = measured(name)
    size, segment = NETWORKS[name][1], segments[contender]
    dtype, bound = CONTENDERS[contender]
    benchmark.group = f"backbone in int8, {name} at {size} px, batch {BATCH}"
    runs = "compiled" if segment.compiled else segment.uncompiled or "uncompiled"
    subject = Subject(dtype, (BATCH, 3, size, size), errors[contender], bound)
    more = {"error_of_fp8": rounded} if contender == "int8" else {}
    row(times, contender, "openvino fp32", subject, build_seconds=segment.seconds, runs=runs, **more)
