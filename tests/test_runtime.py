"""The frozen part as it runs: ordinary tensors and no tape, every batch, random state, memory."""

import gc
import random
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from frozen import assert_as_original, frozen, frozen_to, images, network, norms_run
from nets import Chain, ConvNorm, settle
from torch import Tensor, nn

import fxfreeze.surgery
from fxfreeze import Milestones
from fxfreeze.audit import Audit
from fxfreeze.backends.compiled import Compiled, kinds_of
from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.passes import PASSES


def test_outputs_are_ordinary_tensors() -> None:
    """Not inference tensors, no tape behind them, and each forward's its own: none is written by a later one."""
    segment = frozen(network(), images(6), passes=PASSES["plain"])
    assert segment.rewritten is not None
    batches = [images(6) for _ in range(3)]
    outputs = [segment(x)[0] for x in batches]
    kept = [y.clone() for y in outputs]
    for y in outputs:
        assert not y.requires_grad
        assert not y.is_inference()
        assert y.grad_fn is None
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 3
    segment(images(6))
    assert all(torch.equal(y, k) for y, k in zip(outputs, kept, strict=True))


def test_three_forwards_before_one_backward() -> None:
    """A Siamese step: the suffix's tape holds three outputs of the prefix, all alive until the backward."""
    net = network(torch.float64).eval()
    model = frozen_to("blocks.0", net)
    batches = [images(6, torch.float64) for _ in range(3)]
    sum(model(x).square().sum() for x in batches).backward()  # type: ignore[union-attr, misc]
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for x in batches:
        net(x).square().sum().backward()
    assert grads.keys() == {name for name, p in net.named_parameters() if p.grad is not None}
    for name, p in net.named_parameters():
        if p.grad is not None:
            assert relative_error(grads[name], p.grad) <= BOUNDS[torch.float64]


def test_no_tape() -> None:
    """What the suffix saves for backward is all that is saved."""
    model = frozen_to("blocks.1", network())
    model(images(6))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plan = model.prefix.segments[0](images(6))
        assert saved == []
        model(images(6))
    assert saved
    assert all(t.requires_grad is False for t in plan)


def test_norms_are_gone() -> None:
    model = frozen_to("last", network()).train()
    model(images(6))
    assert norms_run(lambda: model(images(6))) == 0
    assert norms_run(lambda: model.original(images(6))) == 4


# ---- inputs of every size


@pytest.mark.parametrize("sizes", [(8, 1, 3, 5), (1, 8, 2), (4, 5)], ids=str)
def test_other_batch_sizes(sizes: Sequence[int]) -> None:
    """A segment built for one batch serves any other, without a second build."""
    model = frozen_to("blocks.1", network().eval())
    for size in sizes:
        assert_as_original(model, images(size))
    segment = model.prefix.segments[0]
    for size in sizes:
        assert_as_original(model, images(size))
    assert model.prefix.segments[0] is segment


class Ties(nn.Module):
    """Normalises ``together`` images by each other: a batch is a list of groups."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.conv, self.together = nn.Conv2d(8, 8, 3, 1, 1), together

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).reshape(-1, self.together, 8, 8, 8)
        return F.relu(y - y.mean(1, keepdim=True)).reshape(-1, 8, 8, 8)


@pytest.mark.parametrize("together", [2, 3, 6])
def test_samples_that_are_tied_together(together: int) -> None:
    """The first four are no whole number of groups: the self-check looks at the batch that there is."""
    model = frozen_to("blocks.1", settle(Chain(Ties(together), ConvNorm(8, 8))).eval())
    for size in (2 * together, 4 * together, together):
        assert_as_original(model, images(size))
    assert model.prefix.segments[0].rewritten is not None


class Ramp(nn.Module):
    """Multiplies by a ramp made in forward for the width that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.linspace(-1, 1, int(x.shape[3]))


def test_tensors_made_for_a_shape() -> None:
    """Traces for other widths hold other constants under the same graph."""
    net = settle(Chain(Ramp(), ConvNorm(8, 8))).eval()
    model = frozen_to("blocks.1", net, example_inputs=(images(2),))
    for width in (8, 5, 12, 8, 5):
        assert_as_original(model, torch.randn(6, 3, 8, width))


def test_another_rank() -> None:
    """A linear layer and batch norm: (N, C) folds, (N, C, L) does not, and one must not run for the other."""
    net = settle(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))).eval()
    model = frozen_to("0", net)
    for shape in ((6, 4), (6, 4, 4), (6, 4)):
        assert_as_original(model, torch.randn(shape))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts(layout: torch.memory_format) -> None:
    """Boundaries keep the layout that the original gives them, whichever was built first."""
    net = network().eval()
    model = frozen_to("blocks.1", net)
    for wanted in (layout, torch.contiguous_format, torch.channels_last):
        x = images(6).contiguous(memory_format=wanted)
        assert_as_original(model, x)
        assert model(x).stride() == net(x).stride()
        (value,) = model.prefix.segments[0](x)
        with torch.no_grad():
            (expected,) = model.prefix.segments[0].plain(x)
        assert value.stride() == expected.stride()


def test_slices_and_transposes_as_inputs() -> None:
    model = frozen_to("blocks.1", network().eval())
    assert_as_original(model, images(12)[::2])
    assert_as_original(model, images(6).transpose(2, 3))
    assert_as_original(model, torch.randn(6, 5, 8, 8)[:, 1:4])
    assert_as_original(model, torch.randn(1, 3, 8, 8).expand(6, -1, -1, -1))


# ---- random state, inference mode, memory


class Noise(nn.Module):
    """Draws in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.randn_like(y)


def test_a_build_leaves_the_random_state() -> None:
    """Torch's, Python's and numpy's; a frozen module that draws in eval draws what it would have drawn."""
    net = settle(Chain(Noise(), nn.Sequential(ConvNorm(8, 8), nn.Dropout(0.3)))).train()
    model = frozen_to("blocks.0", net)
    x = images(6)
    model.eval()

    def draws() -> list[Any]:
        torch.manual_seed(3)
        random.seed(3)
        numpy.random.seed(3)
        return [model(x), torch.rand(3), random.random(), numpy.random.rand()]

    first, again = draws(), draws()
    assert model.prefix.segments[0].rewritten is not None
    torch.manual_seed(3)
    with torch.no_grad():
        expected = net(x)
    assert relative_error(first[0].detach(), expected) <= BOUNDS[torch.float32]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[2:] == again[2:]


def test_noise_where_samples_are_tied_together() -> None:
    """The self-check's attempt with a few samples draws numbers too, which are given back."""
    net = settle(Chain(Noise(), Ties(3), ConvNorm(8, 8))).eval()
    model = frozen_to("blocks.2", net)
    for _ in range(2):
        assert_as_original(model, images(6))
    assert model.prefix.segments[0].rewritten is not None


def test_build_in_inference_mode_then_train() -> None:
    """Weights and tensors made for the prefix and the suffix while inferring are good for the tape afterwards."""
    net = settle(Chain(Ramp(), Ramp(), ConvNorm(8, 8))).eval()
    model = frozen_to("blocks.0", net, example_inputs=(images(2),))
    x = images(6)
    with torch.inference_mode():
        inferred = model(images(6))
        assert inferred.is_inference()
        expected = model(x)
    segment = model.prefix.segments[0]
    values = model(x)
    assert torch.equal(values, expected)
    assert segment.rewritten is not None
    held = [t for name, t in segment.rewritten.named_buffers(recurse=False) if name.endswith(("weight", "bias"))]
    assert held
    assert not any(t.is_inference() for t in held)
    values.sum().backward()
    assert net.get_parameter("blocks.1.conv.weight").grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forwards_without_gradients(mode: Callable[[], Any]) -> None:
    net = network().eval()
    model = frozen_to("blocks.0", net)
    x = images(6)
    trained = model(x)
    with mode():
        values = model(x)
        assert not values.requires_grad
    assert torch.equal(values, trained)
    assert model(x).requires_grad


def test_old_segments_are_let_go() -> None:
    """Freezing deeper, refreshing and moving leave nothing of the segments before."""
    model = frozen_to("stem", network())
    dead: list[weakref.ref[Any]] = []
    for change in (lambda: model.freeze(2), model.refresh, model.double, model.float, lambda: model.freeze(3)):
        dtype = model.get_parameter("stem.0.weight").dtype
        model.train()(images(6, dtype)).sum().backward()
        model.eval()(images(6, dtype))
        segment = model.prefix.segments[0]
        assert segment.rewritten is not None
        dead += [weakref.ref(t) for t in segment.rewritten.buffers(recurse=False)]
        dead += [weakref.ref(segment)]
        del segment
        change()
        gc.collect()
        assert [ref for ref in dead if ref() is not None] == []
    assert len(dead) > 10


def test_printed_where_there_is_nothing_to_rewrite() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[0].register_forward_hook(lambda *_: None)
    model = fxfreeze.compile(net, Milestones({"0": 0}))
    with pytest.warns(UserWarning, match="frozen module '0' runs as it is, not rewritten: it has hooks"):
        model(torch.ones(2, 3))
    assert "\n  no pass found anything to rewrite" in str(model.prefix)
    assert "\n  kept whole: 0: it has hooks" in str(model.prefix)


def test_printed() -> None:
    """At each stage: nothing frozen, to be built, built, with what was done and how exact it is."""
    model = fxfreeze.compile(network(), Milestones({"blocks.1": 5}), backend="plain")
    assert str(model.prefix) == "prefix: nothing is frozen"
    model.freeze(3)
    assert str(model.prefix) == "prefix: 3 frozen units, built at the next forward"
    model(images(6))
    text = str(model.prefix)
    assert repr(model.prefix) == text
    assert text.startswith("prefix: 3 frozen units, ")
    figures = r"segment 0-3: backend plain, [67] operators \(9 traced\), the model's dtype, rewritten, "
    assert re.search(figures + r"error \d\.\de-\d\d \(bound 1e-04\), built in [\d.]+ m?s, no call timed yet", text)
    for _ in range(4):
        model(images(6))
    assert re.search(r"built in [\d.]+ m?s, [\d.]+ [mu]?s a call of 6 samples\n", str(model.prefix))
    assert "fold_batchnorm: 3 folded (stem.1, blocks.0.1, blocks.1.1)" in text
    assert model.prefix.build_seconds > 0
    seconds = model.prefix.build_seconds
    model.freeze(4)
    assert model.prefix.build_seconds == seconds
    model(images(6))
    assert model.prefix.build_seconds > seconds


def test_nothing_is_warned_of_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen_to("blocks.1", network())(images(6))


def test_a_later_look_at_compiled_code_is_not_in_the_time_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Look(Audit):
        def due(self) -> bool:
            now[0] += 100
            return False

    segment = frozen(network(), x := images(6), passes=PASSES["plain"])
    assert segment.rewritten is not None
    segment.compiled, segment.audit = (Compiled(segment.rewritten.forward, kinds_of([x])),), Look(0.1)
    monkeypatch.setattr("fxfreeze.call_times.time.perf_counter", lambda: now[0])
    for _ in range(5):
        segment(x)
    assert now == [500]
    assert segment.times.median == (0, 6)
