"""The self-check: broken passes, outputs that are not finite, and what is remembered of it."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen import assert_as_original, frozen_to, images, network, plain_graph
from torch import Tensor, nn
from torch.fx import GraphModule

from fxfreeze.backends import BACKENDS, Backend
from fxfreeze.building import DECIDED, build
from fxfreeze.computation import Computation
from fxfreeze.fidelity import BOUNDS, TF32_BOUND, bound_of, relative_error
from fxfreeze.passes import PASSES
from fxfreeze.rewrite import Outcome


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
    "another output": (doubled, r"the passes left 2 outputs of 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pass_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported once, with its figure or error, and training goes on as the original would."""
    broken, message = BROKEN[name]
    monkeypatch.setitem(BACKENDS, "plain", Backend((broken, *PASSES["plain"])))
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
    monkeypatch.setitem(BACKENDS, "plain", Backend((raising,)))
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
    monkeypatch.setitem(BACKENDS, "plain", Backend((*PASSES["plain"], raising)))
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
    segment = build((0, 1), plain_graph(net, x), [x], Computation("cpu", None), BACKENDS["plain"], DECIDED)
    assert segment.rewritten is None
    assert segment.reason == "an earlier build decided so"
    with torch.no_grad():
        assert torch.equal(segment(x)[0], net(x))


def test_decisions_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a saved run decided, through JSON: a prefix that ran unrewritten does so in the resumed run, in silence."""
    net, x = network().eval(), images()
    broken = frozen_to("blocks.0", copy.deepcopy(net))
    monkeypatch.setitem(BACKENDS, "plain", Backend((skewed,)))
    with pytest.warns(UserWarning, match="is past the bound"):
        broken(x)
    monkeypatch.undo()
    decisions = json.loads(json.dumps(broken._decisions()))
    (decision,) = decisions["segments"]
    assert decision.items() >= {"start": 0, "end": 2, "dtype": "model", "backend": "plain", "rewritten": False}.items()
    resumed = frozen_to("blocks.0", copy.deepcopy(net))
    resumed(x)
    resumed._load_decisions(decisions)
    assert torch.equal(resumed.eval()(x), broken.eval()(x))
    assert "unrewritten: an earlier build decided so, not checked" in str(resumed.prefix)
    assert resumed._decisions() == decisions
    resumed.freeze(3)
    resumed(x)
    assert [d["rewritten"] for d in resumed._decisions()["segments"]] == [False, True]


def test_a_backend_that_is_gone() -> None:
    model = frozen_to("blocks.0", network()).eval()
    model(images())
    decisions = model._decisions()
    (decision,) = decisions["segments"]
    model._load_decisions({**decisions, "segments": [{**decision, "backend": "tensorrt"}]})
    with pytest.warns(
        UserWarning, match="the resumed run used backend 'tensorrt', which is not available here: 'plain'"
    ):
        assert_as_original(model, images())
    assert model._decisions() == decisions


class Branching(nn.Module):
    """The root, which trains to the end, has its own way in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(x.abs() if self.training else x)
        return self.head(x.mean((2, 3)))


def test_training_and_eval_are_decided_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they differ in what is frozen, and whichever runs first in the resumed run."""

    def skewed_in_training(module: GraphModule) -> list[Outcome]:
        return skewed(module) if any(n.name == "abs_1" for n in module.graph.nodes) else []

    net, x = Branching(), images()
    model = frozen_to("block", copy.deepcopy(net))
    monkeypatch.setitem(BACKENDS, "plain", Backend((skewed_in_training,)))
    with pytest.warns(UserWarning, match="is past the bound"):
        model.train()(x)
    model.eval()(x)
    decisions = model._decisions()
    assert [d["rewritten"] for d in decisions["segments"]] == [False, True]
    for modes in ((True, False), (False, True)):
        resumed = frozen_to("block", copy.deepcopy(net))
        resumed._load_decisions(decisions)
        for mode in modes:
            resumed.train(mode)(x)
            assert (resumed.prefix.segments[0].rewritten is None) is mode


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


def test_bounds_by_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 has that of TF32 where cuDNN may round to it, and nowhere else."""
    for allowed, bound in ((True, TF32_BOUND), (False, BOUNDS[torch.float32])):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert bound_of(torch.float32, "cuda") == bound
        assert bound_of(torch.float32, "cpu") == BOUNDS[torch.float32]
        assert bound_of(torch.bfloat16, "cuda") == BOUNDS[torch.bfloat16]
