"""Dtypes of the frozen part: ``precision``, autocast on and off, networks of other dtypes."""

import copy
from typing import Any

import pytest
import torch
from frozen import assert_as_original, casts_of, frozen_to, images, network

import fxfreeze.builder
from fxfreeze.building import build
from fxfreeze.computation import Computation
from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.prefix import Prefix

PRECISIONS = ["fp32", "bf16", "fp16", torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_precision(precision: Any) -> None:
    """The prefix computes in it; what crosses has the dtype that it would have had."""
    net = network()
    model = frozen_to("blocks.1", net, precision=precision)
    x = images(6)
    model(x)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(str(precision), precision)
    segment = model.prefix.segments[0]
    assert segment.rewritten is not None, segment.reason
    assert {t.dtype for t in segment.rewritten.buffers(recurse=False)} == {dtype}
    assert segment.bound == BOUNDS[dtype]
    (value,) = segment(x)
    assert value.dtype == torch.float32
    assert casts_of(lambda: segment(x), list(segment.rewritten.buffers())) == 0
    assert_as_original(model.eval(), x, dtype=dtype)
    model(x).sum().backward()
    assert net.get_parameter("head.fc.weight").grad.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_and_off(dtype: torch.dtype, precision: str | None) -> None:
    """Each forward obeys the autocast around it, and what was built for one is kept for the next such."""
    net = network().eval()
    model = frozen_to("blocks.1", net, precision=precision)
    x = images(6)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
    kept: dict[bool, Prefix] = {}
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", dtype, enabled=enabled), torch.no_grad():
            values, expected = model(x), net(x)
            (crossing,) = model.prefix.segments[0](x)
        computed = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "fp32")
        bound = max(BOUNDS[d] for d in (computed, dtype if enabled else torch.float32) if d is not None)
        assert values.dtype == expected.dtype == (dtype if enabled else torch.float32)
        assert crossing.dtype == values.dtype
        assert relative_error(values.double(), exact) <= bound
        assert kept.setdefault(enabled, model.prefix) is model.prefix
    assert kept[True] is not kept[False]


def test_autocast_switches_without_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Computation] = []

    def counting(span: Any, plain: Any, inputs: Any, computation: Computation, *rest: Any) -> Any:
        built.append(computation)
        return build(span, plain, inputs, computation, *rest)

    monkeypatch.setattr(fxfreeze.builder, "build", counting)
    model = frozen_to("blocks.1", network())
    for _ in range(2):
        for dtype in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                model.train()(images(6)).float().sum().backward()
                model.eval()(images(6))
    assert [c.autocast for c in built] == [None, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_networks_of_other_dtypes(dtype: torch.dtype) -> None:
    model = frozen_to("blocks.1", network(dtype).eval())
    x = images(6, dtype)
    assert_as_original(model, x, dtype=dtype)
    segment = model.prefix.segments[0]
    assert segment.rewritten is not None, segment.reason
    assert segment.bound == BOUNDS[dtype]
