"""The frozen part as it runs: ordinary tensors and no tape, the self-check, batch sizes, dtypes, random state."""

import copy
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
from frozen import casts_of, frozen, norms_run, plain_graph
from nets import Chain, ConvNorm, settle
from torch import Tensor, nn
from torch.fx import GraphModule

import fxfreeze.surgery
from fxfreeze import FreezableModel, Milestones
from fxfreeze.passes import PASSES
from fxfreeze.rewrite import Outcome
from fxfreeze.runtime import BOUNDS, Computation, Prefix, build, relative_error


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return settle(Chain(ConvNorm(8, 8), ConvNorm(8, 8))).to(dtype)


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=dtype)


def frozen_to(unit: str, net: nn.Module, **options: Any) -> FreezableModel:
    return fxfreeze.compile(net, Milestones({unit: 0}), **options)


def assert_same(model: FreezableModel, *inputs: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The model's output is that of its original, whose frozen units are in eval."""
    with torch.random.fork_rng():
        values = model(*inputs)
    with torch.no_grad(), torch.random.fork_rng():
        assert relative_error(values.detach(), model.original(*inputs)) <= BOUNDS[dtype]


# ---- what comes out


def test_outputs_are_ordinary_tensors() -> None:
    """Not inference tensors, no tape behind them, and each forward's its own: none is written by a later one."""
    segment = frozen(network(), images(6), passes=PASSES)
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


# ---- the self-check


def skewed(module: GraphModule) -> list[Outcome]:
    """A pass that gets the first convolution wrong by a hundredth."""
    node = next(n for n in module.graph.nodes if n.op == "call_module")
    with module.graph.inserting_after(node):
        wrong = module.graph.call_function(torch.mul, (node, 1.01))
    node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
    return [Outcome("skewed", "stem.0", True, "spoiled")]


def raising(module: GraphModule) -> list[Outcome]:
    next(iter(module.graph.nodes)).name = "half_done"
    raise ValueError("there is no such layer")


def unrunnable(module: GraphModule) -> list[Outcome]:
    node = next(n for n in module.graph.nodes if n.op == "call_module")
    node.op, node.target, node.args = "call_function", torch.mm, (node.args[0], node.args[0])
    return []


def flattened(module: GraphModule) -> list[Outcome]:
    *_, last, output = module.graph.nodes
    with module.graph.inserting_before(output):
        output.args = ((module.graph.call_function(torch.flatten, (last, 1)),),)
    return []


def doubled(module: GraphModule) -> list[Outcome]:
    *_, last, output = module.graph.nodes
    output.args = ((last, last),)
    return []


BROKEN: dict[str, tuple[Callable[[GraphModule], list[Outcome]], str]] = {
    "skewed": (skewed, r"its relative error \d\.\d\de-0[1-4] is past the bound 1e-04"),
    "raising": (raising, r"pass raising failed: ValueError: there is no such layer"),
    "unrunnable": (unrunnable, r"running it failed: RuntimeError: "),
    "another shape": (flattened, r"its relative error inf is past the bound 1e-04"),
    "another output": (doubled, r"running it failed: ValueError: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported once, with its figure or error, and training goes on as the original would."""
    broken, message = BROKEN[name]
    monkeypatch.setattr(fxfreeze.surgery, "PASSES", (broken, *PASSES))
    net = network()
    model = frozen_to("blocks.0", net)
    with pytest.warns(UserWarning, match=f"the rewritten frozen part is not used: {message}"):
        model(images(6))
    assert "unrewritten: " in str(model.prefix)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen_before = net.get_parameter("stem.0.weight").clone()
    for count in (6, 3, 6):
        x = images(count)
        with torch.no_grad():
            expected = net.eval()(x)
        assert torch.equal(model.eval()(x), expected)
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(net.get_parameter("stem.0.weight"), frozen_before)


def test_a_pass_that_raises_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again at the next freeze, nor for eval; a later version of the model's weights says nothing new either."""
    monkeypatch.setattr(fxfreeze.surgery, "PASSES", (raising,))
    model = frozen_to("stem", network())
    with pytest.warns(UserWarning, match="pass raising failed"):
        model(images(6))
    model.eval()(images(6))
    for depth in (2, 3):
        model.freeze(depth)
        model(images(6))
    model.refresh()
    model(images(6))


def test_a_defective_pass_costs_the_others_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that it left half done is not what runs."""
    monkeypatch.setattr(fxfreeze.surgery, "PASSES", (*PASSES, raising))
    net = network()
    model = frozen_to("blocks.0", net).eval()
    x = images(6)
    with pytest.warns(UserWarning, match="pass raising failed"):
        values = model(x)
    assert model.prefix.segments[0].rewritten is None
    assert torch.equal(values, net(x))


def test_non_finite_originals() -> None:
    """There is nothing to compare with: the original's graph runs, overflow and all."""
    net = network().eval()
    model = frozen_to("blocks.0", net)
    x = images(6)
    x[0, 0, 0, 0] = float("inf")
    with pytest.warns(UserWarning, match="the original's own output is not finite, so nothing could be compared"):
        values = model(x)
    assert torch.equal(values.isnan(), net(x).isnan())
    y = images(6)
    assert torch.equal(model(y), net(y))


def test_an_earlier_build_decides() -> None:
    """A segment that ran unrewritten before does so again, without a warning."""
    net, x = network(), images(6)
    segment = build((0, 1), plain_graph(net, x), [x], Computation("cpu", None), PASSES, rewrite=False)
    assert segment.rewritten is None
    assert segment.reason == "an earlier build decided so"
    with torch.no_grad():
        assert torch.equal(segment(x)[0], net(x))


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], float("inf")),
        ([[3.0, 4.0]], [3.0, 4.0], float("inf")),
        ([3, 4], [3.0, 4.0], float("inf")),
        ([3, 4], [3, 4], 0.0),
        ([3, 5], [3, 4], float("inf")),
        ([True, False], [True, False], 0.0),
    ],
)
def test_relative_error(value: list[Any], reference: list[Any], error: float) -> None:
    assert relative_error(torch.tensor(value), torch.tensor(reference)) == error


def test_relative_error_of_what_is_no_number() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert not relative_error(nan, torch.ones(2)) <= 1e9


# ---- inputs of every size


@pytest.mark.parametrize("sizes", [(8, 1, 3, 5), (1, 8, 2), (4, 5)], ids=str)
def test_other_batch_sizes(sizes: Sequence[int]) -> None:
    """A segment built for one batch serves any other, without a second build."""
    model = frozen_to("blocks.1", network().eval())
    for size in sizes:
        assert_same(model, images(size))
    segment = model.prefix.segments[0]
    for size in sizes:
        assert_same(model, images(size))
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
        assert_same(model, images(size))
    assert model.prefix.segments[0].rewritten is not None


class Ramp(nn.Module):
    """Multiplies by a ramp made in forward for the width that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.linspace(-1, 1, int(x.shape[3]), dtype=x.dtype)


def test_tensors_made_for_a_shape() -> None:
    """Traces for other widths hold other constants under the same graph."""
    net = settle(Chain(Ramp(), ConvNorm(8, 8))).eval()
    model = frozen_to("blocks.1", net, example_inputs=(images(2),))
    for width in (8, 5, 12, 8, 5):
        assert_same(model, torch.randn(6, 3, 8, width))


def test_another_rank() -> None:
    """A linear layer and batch norm: (N, C) folds, (N, C, L) does not, and one must not run for the other."""
    net = settle(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))).eval()
    model = frozen_to("0", net)
    for shape in ((6, 4), (6, 4, 4), (6, 4)):
        assert_same(model, torch.randn(shape))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts(layout: torch.memory_format) -> None:
    """Boundaries keep the layout that the original gives them, whichever was built first."""
    net = network().eval()
    model = frozen_to("blocks.1", net)
    for wanted in (layout, torch.contiguous_format, torch.channels_last):
        x = images(6).contiguous(memory_format=wanted)
        assert_same(model, x)
        assert model(x).stride() == net(x).stride()
        (value,) = model.prefix.segments[0](x)
        with torch.no_grad():
            (expected,) = model.prefix.segments[0].plain(x)
        assert value.stride() == expected.stride()


def test_slices_and_transposes_as_inputs() -> None:
    model = frozen_to("blocks.1", network().eval())
    assert_same(model, images(12)[::2])
    assert_same(model, images(6).transpose(2, 3))
    assert_same(model, torch.randn(6, 5, 8, 8)[:, 1:4])
    assert_same(model, torch.randn(1, 3, 8, 8).expand(6, -1, -1, -1))


# ---- dtypes


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
    assert_same(model.eval(), x, dtype=dtype)
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

    monkeypatch.setattr(fxfreeze.surgery, "build", counting)
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
    assert_same(model, x, dtype=dtype)
    segment = model.prefix.segments[0]
    assert segment.rewritten is not None, segment.reason
    assert segment.bound == BOUNDS[dtype]


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


def test_build_in_inference_mode_then_train() -> None:
    """Weights and tensors made for the prefix and the suffix while inferring are good for the tape afterwards."""
    net = settle(Chain(Ramp(), Ramp(), ConvNorm(8, 8))).eval()
    model = frozen_to("blocks.0", net, example_inputs=(images(2),))
    x = images(6)
    with torch.inference_mode():
        inferred = model(images(6))
        assert inferred.is_inference()
        expected = model(x)
    values = model(x)
    assert torch.equal(values, expected)
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


def test_printed() -> None:
    """At each stage: nothing frozen, to be built, built, with what was done and how exact it is."""
    model = fxfreeze.compile(network(), Milestones({"blocks.1": 5}))
    assert str(model.prefix) == "prefix: nothing is frozen"
    model.freeze(3)
    assert str(model.prefix) == "prefix: 3 frozen units, built at the next forward"
    model(images(6))
    text = str(model.prefix)
    assert repr(model.prefix) == text
    assert text.startswith("prefix: 3 frozen units, ")
    figures = r"segment 0-3: backend plain, [67] operators \(of 9 traced\), the model's dtype, rewritten, "
    assert re.search(figures + r"error \d\.\de-\d\d \(bound 1e-04\), built in \d+ ms", text)
    assert "fold_batchnorm: 3 folded (stem.1, blocks.0.1, blocks.1.1)" in text
    assert model.prefix.build_seconds > 0
    seconds = model.prefix.build_seconds
    model.freeze(4)
    assert model.prefix.build_seconds == seconds
    model(images(6))
    assert model.prefix.build_seconds > seconds


def test_a_chain_of_segments() -> None:
    """A prefix feeds each segment what the one before gave."""
    first = frozen(settle(ConvNorm(3, 8)), images(6), passes=PASSES)
    second = frozen(settle(ConvNorm(8, 8)), torch.randn(6, 8, 8, 8), passes=PASSES)
    x = images(6)
    assert torch.equal(Prefix(2, (first, second))(x)[0], second(*first(x))[0])


def test_nothing_is_warned_of_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen_to("blocks.1", network())(images(6))
