"""``precision="int8"``: what is quantized, how close it is, that a run rounds alike throughout, and what is refused."""

import copy
import dataclasses
import json
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import frozen_to, images, network, plain_graph, settle
from small_networks import NETWORKS
from tiny import SETTINGS, Tiny, arena
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxfreeze
from fxfreeze import CachedLoader, FreezableModel, FreezeOut, FreezeScheduler, Milestones
from fxfreeze.backends import int8
from fxfreeze.batches import Batches
from fxfreeze.fidelity import BOUNDS, INT8_BOUND, relative_error
from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import from_scratch
from fxfreeze.train import Run

HERE = find_spec("openvino") is not None and find_spec("nncf") is not None
quantizing = pytest.mark.skipif(not HERE, reason="openvino or nncf is not installed")


def resnet(**kwargs: Any) -> FreezableModel:
    torch.manual_seed(0)
    net = settle(NETWORKS["resnet"]())
    return fxfreeze.compile(net, Milestones({"group2.1": 0}), precision="int8", **kwargs)


def boundary(model: FreezableModel, x: Tensor) -> Tensor:
    """What the frozen part makes of ``x``."""
    (segment,) = model.prefix.segments
    (value,) = segment(x)
    assert isinstance(value, Tensor)
    return value


def train(model: FreezableModel, scheduler: FreezeScheduler, batches: list[Tensor]) -> list[float]:
    losses = []
    for x in batches:
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
        loss.backward()
        scheduler.optimizer.step()
        scheduler.step()
        scheduler.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def scheduled(model: FreezableModel) -> FreezeScheduler:
    return FreezeScheduler(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model)


# ---- what runs


@quantizing
@pytest.mark.parametrize("precision", ["int8", torch.int8], ids=str)
@pytest.mark.parametrize("backend", ["auto", "openvino"])
def test_the_frozen_part_is_quantized(backend: str, precision: Any) -> None:
    """Near the original, but not as near as float32 would be; what crosses is float32."""
    torch.manual_seed(0)
    net = settle(NETWORKS["vgg"]())
    model = fxfreeze.compile(net, FreezeOut(100), backend=backend, precision=precision)
    model.freeze(3)
    x = images(6)
    model(x).sum().backward()
    (segment,) = model.prefix.segments
    assert segment.uncompiled is None
    assert segment.bound == INT8_BOUND
    crossed, (original,) = boundary(model, x), segment.plain(x)
    assert crossed.dtype == torch.float32
    assert segment.error == relative_error(crossed, original)
    assert 10 * BOUNDS[torch.float32] < segment.error <= INT8_BOUND
    assert ", int8, compiled for 6x3x8x8, error" in str(model.prefix)


@quantizing
@pytest.mark.parametrize(
    "name", sorted(NETWORKS.keys() - {"mobilenet"})
)  # 8 bits are too few for one of random weights
def test_networks(name: str) -> None:
    torch.manual_seed(0)
    net = settle(NETWORKS[name]())
    model = fxfreeze.compile(net, FreezeOut(100), precision="int8")
    model.freeze(len(model.units) - 1)
    x = images(6)
    model.train()(x)
    with torch.no_grad():
        assert relative_error(model.eval()(x), net.eval()(x)) <= 2 * INT8_BOUND
    (segment,) = model.prefix.segments
    assert segment.compiled


@quantizing
def test_weights_have_a_grid_for_each_channel() -> None:
    """With one for all, a channel that is a hundred times smaller would have three values."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False))
    x = images(4)
    with torch.no_grad():
        next(net.parameters())[0] *= 1e-2
        value, expected = int8.compile(plain_graph(net, x), [x], None)(x)[0], net(x)
    assert relative_error(value[:, 0], expected[:, 0]) < INT8_BOUND


@quantizing
def test_under_autocast() -> None:
    """It is int8 all the same, and crosses in the dtype that the suffix expects."""
    model = resnet()
    with torch.autocast("cpu", torch.bfloat16):
        model(images(6))
    (segment,) = model.prefix.segments
    assert segment.compiled
    assert segment.computation.quantized


@quantizing
def test_past_the_bound_it_runs_in_floating_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfreeze.backends.INT8_BOUND", 1e-4)
    model = resnet()
    x = images(6)
    with pytest.warns(
        UserWarning, match=r"does not run in int8: its relative error \d\.\d\de-0\d is past the bound 1e-04"
    ):
        model(x)
    (segment,) = model.prefix.segments
    assert segment.error is not None
    assert segment.error <= BOUNDS[torch.float32]
    assert "the model's dtype, rewritten" in str(model.prefix)
    assert relative_error(boundary(model, x), segment.plain(x)[0]) <= BOUNDS[torch.float32]
    (decision,) = model._decisions()["segments"]
    assert (decision["backend"], decision["ranges"]) == ("plain", None)


@quantizing
def test_nothing_to_quantize() -> None:
    x = images(4)
    with pytest.raises(ValueError, match="NNCF found nothing in it to quantize"):
        int8.compile(plain_graph(torch.nn.BatchNorm2d(3), x), [x], None)


@quantizing
def test_it_says_nothing_and_leaves_the_loggers(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    resnet()(images(6))
    assert capfd.readouterr().out == ""
    assert logging.getLoggerClass() is logging.Logger
    assert "openvino_telemetry" not in sys.modules


# ---- every batch alike


@quantizing
def test_a_sample_is_rounded_alike_in_every_batch() -> None:
    """In a smaller batch, and in a larger one that is not a multiple of training's."""
    model = resnet()
    model.train()(images(6))
    x = images(14)
    model.eval()
    with torch.no_grad():
        whole, few = model(x), model(x[6:9])
        exact = model.original.eval()(x)
    assert torch.equal(whole[6:9], few)
    assert 10 * BOUNDS[torch.float32] < relative_error(whole, exact) <= 2 * INT8_BOUND  # in int8, all of it
    for value, original in zip(whole, exact, strict=True):
        assert relative_error(value, original) > BOUNDS[torch.float32]


@quantizing
def test_an_evaluation_before_training_calibrates_for_both() -> None:
    model = resnet()
    with torch.no_grad():
        model.eval()(images(9))
    (segment,) = model.prefix.segments
    ranges = segment.ranges
    model.train()(1.2 * images(6))
    assert [str(c) for c in segment.compiled] == ["9x3x8x8", "6x3x8x8"]
    assert [c.ranges for c in segment.compiled] == [ranges, ranges]


@quantizing
def test_another_image_size_runs_in_floating_point() -> None:
    model = resnet()
    model.train()(images(6))
    x = torch.randn(6, 3, 16, 16)
    (segment,) = model.prefix.segments
    assert relative_error(boundary(model, x), segment.plain(x)[0]) <= BOUNDS[torch.float32]


# ---- resuming


@quantizing
def test_resuming_is_bit_for_bit() -> None:
    """Though the resumed run meets another batch first: the ranges are in the scheduler's state, as JSON has them."""
    batches = [images(6) * scale for scale in (1.0, 0.9, 1.2, 1.1)]
    model = resnet()
    scheduler = scheduled(model)
    train(model, scheduler, batches[:2])
    weights, optimizer = copy.deepcopy(model.state_dict()), copy.deepcopy(scheduler.optimizer.state_dict())
    state = json.loads(json.dumps(scheduler.state_dict()))
    assert state["decisions"]["segments"][0]["ranges"]
    expected = train(model, scheduler, batches[2:])

    resumed = resnet()
    again = scheduled(resumed)
    resumed.load_state_dict(weights)
    again.optimizer.load_state_dict(optimizer)
    again.load_state_dict(state)
    assert train(resumed, again, batches[2:]) == expected
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    anew = resnet()  # and that this is the ranges' doing
    anew.load_state_dict(weights)
    anew.train()(batches[2])
    assert anew.prefix.segments[0].ranges != model.prefix.segments[0].ranges


@quantizing
def test_a_copy_and_a_rebuilt_part_keep_the_ranges() -> None:
    model = resnet()
    model.train()(images(6))
    ranges = model.prefix.segments[0].ranges
    for other in (copy.deepcopy(model), model):
        other.refresh()
        other(1.2 * images(6))
        assert other.prefix.segments[0].ranges == ranges


@quantizing
def test_ranges_of_another_graph() -> None:
    x = images(4)
    graph = plain_graph(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), x)
    with pytest.raises(ValueError, match="5 ends of ranges were kept, and its activations have 4: it is another graph"):
        int8.compile(graph, [x], None, [0.0, 1.0, 0.0, 1.0, 1.0])


def test_a_state_from_before_int8_is_read() -> None:
    model = frozen_to("blocks.0", network())
    model(images())
    decisions = model._decisions()
    for decision in decisions["segments"]:
        del decision["ranges"]
    model._load_decisions(decisions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())


# ---- the comparison


@quantizing
def test_the_row_of_a_comparison_is_quantized() -> None:
    """And no other row is."""
    settings = dataclasses.replace(SETTINGS, precision="int8")
    data = arena()
    recipes = from_scratch(settings, 20)
    dtypes = {}
    for name in ("fxfreeze", "fxfreeze+int8"):
        run = Run(Tiny(), recipes[name], settings, Batches(data.train, settings.batch_size, 0))
        while not run.depth:
            run.train(1)
        run.train(1)
        assert run.model is not None
        dtypes[name] = {segment.computation.dtype_name for segment in run.model.prefix.segments}
        assert all(segment.compiled for segment in run.model.prefix.segments) == (name == "fxfreeze+int8")
    assert dtypes == {"fxfreeze": {"model"}, "fxfreeze+int8": {"int8"}}


# ---- what is refused


def test_another_backend() -> None:
    with pytest.raises(
        ValueError, match="'int8' runs by OpenVINO alone, not by 'inductor': backend must be auto or open"
    ):
        fxfreeze.compile(network(), FreezeOut(100), backend="inductor", precision="int8")


def test_fp8_is_unknown() -> None:
    with pytest.raises(ValueError, match="precision 'fp8' is unknown: expected None, fp32, fp16, bf16, int8 or their"):
        fxfreeze.compile(network(), FreezeOut(100), precision="fp8")


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_a_package_that_is_not_installed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "nncf" and find_spec("openvino") is None:
        pytest.skip("openvino is missing first")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ChoiceError, match=rf"{missing} .*; pip install 'fxfreeze\[int8\]'"):
        fxfreeze.compile(network(), FreezeOut(100), precision="int8")


@quantizing
def test_a_cache(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(images(8), torch.zeros(8)), batch_size=4)
    with pytest.raises(ValueError, match="precision is int8, whose rounding depends on the batch"):
        CachedLoader(loader, resnet(), tmp_path)


@quantizing
@pytest.mark.parametrize("first", [0.0, 0.01])
def test_calibrated_on_a_batch_unlike_the_others(first: float) -> None:
    """It clips what others hold: that is found on the way, and floating point runs."""
    model = resnet().train()
    model(first * images(8))
    assert model.prefix.segments[0].ranges is not None
    x = images(8)
    with pytest.warns(UserWarning, match="on a later batch its relative error .* is past the bound 1e-01"):
        found = boundary(model, x)
    segment = model.prefix.segments[0]
    (exact,) = segment.plain(x)
    assert relative_error(found, exact) <= BOUNDS[torch.float32]
    assert (segment.ranges, segment.uncompiled is None) == (None, False)


@quantizing
def test_resumed_before_a_short_batch() -> None:
    """The first of a run that goes on may be an epoch's last: it rounds as the run that never stopped."""
    one = resnet().train()
    one(images(8))
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    state = FreezeScheduler(optimizer, one).state_dict()
    other = resnet().train()
    FreezeScheduler(torch.optim.SGD(other.parameters(), lr=0.1), other).load_state_dict(state)
    for size in (5, 8):
        x = images(size)
        assert torch.equal(one(x), other(x))
    assert other.prefix.segments[0].ranges == one.prefix.segments[0].ranges is not None
