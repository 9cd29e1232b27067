"""What a trace records, what it keeps whole and why, what it refuses, and that it changes nothing."""

import builtins
import contextlib
import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfreeze import TraceRefusal
from fxfreeze.inputs import flatten_inputs
from fxfreeze.split import as_module
from fxfreeze.trace import Traced, trace

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A network whose forward is `function(self, *inputs)`."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        self.fc = nn.Linear(6, 6)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Outer(nn.Module):
    """`inner` between two layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(6, 6), inner, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.inner(self.before(x))))


def traced(net: nn.Module, *args: Any, examples: bool = True, **kwargs: Any) -> Traced:
    inputs, tensors = flatten_inputs(net, args or (X,), kwargs)
    return trace(net, inputs, tensors if examples else None)


def replay(net: nn.Module, made: Traced, *tensors: Any) -> Any:
    flat = as_module(net, copy_of(made), made.constants)(*tensors)
    return pytree.tree_unflatten(flat, made.outputs)


def copy_of(made: Traced) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(made.graph, {}))
    return graph


def assert_replays(net: nn.Module, made: Traced, *args: Tensor) -> None:
    """The graph gives what the network gives, twice, and with the same random numbers."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        ours = replay(net, made, *copy.deepcopy(args))
        torch.manual_seed(seed)
        theirs = net(*copy.deepcopy(args))
        assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
        for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            torch.testing.assert_close(a, b)


def targets(made: Traced, op: str) -> list[str]:
    return [str(node.target) for node in made.graph.nodes if node.op == op]


# ---- leaves on the spot


class Branches(nn.Module):
    """Looks at values, which no trace can know."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + self.fc.weight.sum()
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize("examples", [True, False])
def test_an_untraceable_submodule_becomes_a_leaf(examples: bool) -> None:
    net = Outer(Branches())
    made = traced(net, examples=examples)
    assert made.leaves.keys() == {"inner"}
    assert made.leaves["inner"].startswith("tracing it failed: ")
    assert targets(made, "call_module") == ["before", "inner", "after"]
    assert targets(made, "get_attr") == []  # the weight that was read before the failure is not left behind
    assert_replays(net, made, X)


def test_only_the_innermost_module_becomes_a_leaf() -> None:
    net = Outer(Outer(Branches()))
    made = traced(net)
    assert made.leaves.keys() == {"inner.inner"}
    assert targets(made, "call_module") == ["before", "inner.before", "inner.inner", "inner.after", "after"]


def test_what_was_read_before_a_failure_is_read_again_after_it() -> None:
    """The failed attempt's read of a shared parameter is erased, not handed to those who come later."""
    inner = Branches()
    net = Outer(nn.Sequential(inner, Net(lambda self, x: x @ self.tied, tied=inner.fc.weight)))
    made = traced(net)
    assert made.leaves.keys() == {"inner.0"}
    assert targets(made, "get_attr") == ["inner.0.fc.weight"]
    assert_replays(net, made, X)


def test_a_leaf_called_twice_is_tried_once() -> None:
    calls = []

    def forward(self: Net, x: Tensor) -> Tensor:
        calls.append(1)
        return x * float(x.sum())

    inner = Net(forward)
    net = Net(lambda self, x: self.inner(self.inner(x)), inner=inner)
    made = traced(net)
    assert len(calls) == 1
    assert targets(made, "call_module") == ["inner", "inner"]


def hook(module: nn.Module, *args: Any) -> None:
    raise AssertionError("a hook ran during the trace")


def hooked(register: str) -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6))
    getattr(module, register)(hook)
    return module


KEPT_WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward hook": (lambda: hooked("register_forward_hook"), "it has hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "it has hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "it has hooks"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "it has hooks"),
    "parametrization": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), "it has a parametrization"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), "it has a parametrization"),
    "scripted": (lambda: torch.jit.trace(nn.Linear(6, 6), X), "it is a TorchScript module"),
}


@pytest.mark.parametrize("case", KEPT_WHOLE)
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_modules_kept_whole(case: str) -> None:
    make, reason = KEPT_WHOLE[case]
    made = traced(Outer(make()))
    assert made.leaves == {"inner": reason}
    assert targets(made, "call_module") == ["before", "inner", "after"]


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_a_custom_function_keeps_its_backward() -> None:
    net = Outer(Net(lambda self, x: Straight.apply(self.fc(x))))
    made = traced(net)
    assert made.leaves == {
        "inner": "tracing it failed: Straight is an autograd.Function, whose backward a trace can't see"
    }
    replay(net, made, X).sum().backward()
    assert net.before.weight.grad is not None
    assert net.before.weight.grad.abs().sum() > 0  # rounding alone has no gradient
    with pytest.raises(TraceRefusal, match="Straight is an autograd\\.Function"):
        traced(Net(lambda self, x: Straight.apply(self.fc(x))))


# C++ that takes a proxy for a tensor reads foreign memory: the process dies
CPLUSPLUS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: torch.tensor(x),
    "as_tensor": lambda x: torch.as_tensor(x),
    "Tensor": lambda x: torch.Tensor(x),
    "new_tensor": lambda x: X.new_tensor(x),
    "Parameter": lambda x: nn.Parameter(x),
    "make_subclass": lambda x: Tensor._make_subclass(nn.Parameter, x),  # type: ignore[arg-type]
    "data": lambda x: setattr(torch.ones(2), "data", x),
    "set_": lambda x: torch.ones(2).set_(x),
    "vmap": lambda x: torch.vmap(torch.sin)(x),
    "dlpack": lambda x: torch.utils.dlpack.to_dlpack(x),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False),
    "sparse": lambda x: torch.sparse_coo_tensor(x, x),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "index": lambda x: torch.arange(9)[x.long()],
}


@pytest.mark.parametrize("case", CPLUSPLUS)
def test_nothing_crashes_on_a_proxy(case: str) -> None:
    net = Outer(Net(lambda self, x: CPLUSPLUS[case](self.fc(x))))
    made = traced(net)
    assert made.leaves.keys() <= {"inner"}


# ---- control flow on shapes


def by_rows(self: Net, x: Tensor) -> Tensor:
    return torch.stack([self.fc(row) * i for i, row in enumerate(x)])


def star(self: Net, x: Tensor) -> Tensor:
    first, *rest = x
    return first + sum(rest)


def clip(self: Net, x: Tensor) -> Tensor:
    n = x.shape[0]
    n += 1
    return x[: min(n, 2)] * math_of(x.size(1))


def math_of(n: int) -> float:
    return float(n) ** 0.5 / max(1, n // 2)


LOOKS_AT_SHAPES: dict[str, Callable[..., Any]] = {
    "bool": lambda self, x: self.fc(x) if x.shape[-1] > 4 else x,
    "dim": lambda self, x: x.flatten(1) if x.dim() == 3 else x,
    "dtype": lambda self, x: x.double() if x.dtype == torch.float32 else x,
    "len": lambda self, x: x * len(x),
    "int": lambda self, x: x * int(x.shape[1]),
    "float": clip,
    "range": lambda self, x: sum(x[:, i] for i in range(x.shape[1])),
    "iteration": by_rows,
    "star": star,
    "index": lambda self, x: [10, 20, 30, 40][x.shape[0]] * x,
    "isinstance": lambda self, x: x * 2 if isinstance(x.shape[0], int) else x.shape[0][0],
    "shape as tuple": lambda self, x: x.new_ones(tuple(x.shape)),
}


@pytest.mark.parametrize("case", LOOKS_AT_SHAPES)
def test_control_flow_on_shapes_traces_through_with_examples(case: str) -> None:
    net = Outer(Net(LOOKS_AT_SHAPES[case]))
    net = net if case not in ("star", "float", "dim", "range", "dtype") else net.inner
    made = traced(net)
    assert made.leaves == {}
    assert made.shape_bound
    assert_replays(net, made, X)


@pytest.mark.parametrize("case", LOOKS_AT_SHAPES)
def test_without_examples_it_is_refused_at_the_root_and_a_leaf_below(case: str) -> None:
    net = Net(LOOKS_AT_SHAPES[case])
    with pytest.raises(TraceRefusal, match="Passing example_inputs lets control flow look at shapes"):
        traced(net, examples=False)
    made = traced(Outer(net), examples=False)
    assert made.leaves.keys() == {"inner"}
    assert not made.shape_bound


class Ragged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            x = x + 1
        return x


class Valued(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 2:
            x = x + 1
        return x


def test_a_refusal_names_the_place_and_the_remedy() -> None:
    line = Ragged.forward.__code__.co_firstlineno + 1
    with pytest.raises(TraceRefusal) as refused:
        traced(Ragged(), examples=False)
    assert str(refused.value) == (
        f"Ragged.forward can't be traced at {__file__}:{line}: Python looks at the value of gt. Passing example_inputs "
        f"lets control flow look at shapes. What can't be traced may stand in a submodule, which is then kept whole"
    )
    with pytest.raises(TraceRefusal) as refused:
        traced(Valued())
    assert f"Valued.forward can't be traced at {__file__}:" in str(refused.value)
    assert "may stand in a submodule" in str(refused.value)
    assert "Passing example_inputs" not in str(refused.value)  # they were passed


def chunked(self: Net, x: Tensor) -> Tensor:
    a, b = self.fc(x).chunk(2, 1)
    (c,) = b.split(2, 1)
    return a * c


def reshaped(self: Net, x: Tensor) -> Tensor:
    n, c, w = x.shape
    n, *_ = n, c
    x = self.fc(x).view(n, -1, 2).reshape(x.size(0), c * w)
    n -= 1
    return x * (n + 1)


def extremes(self: Net, x: Tensor) -> Tensor:
    values, indices = x.max(1)
    return values * indices


ANY_SHAPE: dict[str, Callable[..., Any]] = {"chunk": chunked, "sizes": reshaped, "named tuple": extremes}


@pytest.mark.parametrize("case", ANY_SHAPE)
@pytest.mark.parametrize("examples", [True, False])
def test_unpacking_and_sizes_hold_for_any_batch(case: str, examples: bool) -> None:
    net = Net(ANY_SHAPE[case])
    made = traced(net, examples=examples)
    assert not made.shape_bound
    for n in (3, 1, 7):
        assert_replays(net, made, torch.randn(n, 4, 6))


def forward_of(*lines: str) -> Callable[..., Any]:
    """A forward made of source: pytest rewrites the assertions of this file, and not these."""
    made: dict[str, Any] = {}
    exec("\n    ".join(["def forward(self, x):", *lines, "return self.fc(x)"]), made)
    return made["forward"]


def test_assertions_are_recorded_not_evaluated() -> None:
    sizes = ("assert x.shape[1] > 2", "assert x.shape[0] != 9", "assert [x.shape[0], 6] == [x.size(0), x.size(2)]")
    net = Net(forward_of("assert x.dim() == 3, 'three dimensions'", *sizes, "assert x.shape[0]"))
    made = traced(net, examples=False)
    assert_replays(net, made, X)
    for wrong in (X[0], X[:, :2], X.repeat(3, 1, 1)):
        with pytest.raises(AssertionError):
            replay(net, made, wrong)


@pytest.mark.parametrize(
    "asserted",
    ["x.shape[1] in (3, 4)", "[x.shape[1]] != [3]", "x.shape[1] == 4 and x.shape[2] == 6", "not x.shape[1] == 3"],
)
def test_an_assertion_that_is_more_than_one_value_is_not_taken_for_it(asserted: str) -> None:
    net = Net(forward_of(f"assert {asserted}"))
    with pytest.raises(TraceRefusal, match="Python looks at the value"):
        traced(net, examples=False)
    assert traced(net).shape_bound


# ---- mutation


def alias_add(self: Net, x: Tensor) -> Any:
    y = self.fc(x)
    z = y
    y += 1
    y *= 2
    y -= x
    y /= 3
    return y, z


def immutable(self: Net, x: Tensor) -> Tensor:
    n = m = x.shape[1]
    n += 3
    m *= 2
    return x * n * m * x.shape[1]


def items(self: Net, x: Tensor) -> Any:
    y = self.fc(x)
    first = y[:, 0]
    y[:, 0] = x[:, 1]
    y[y > 1] = 0
    y[0, 1:3] += 5
    return y, first


def through_views(self: Net, x: Tensor) -> Tensor:
    y = self.fc(x)
    y.view(-1)[::2].mul_(3)
    y.transpose(0, 1)[0].zero_()
    a, b = y.chunk(2, 2)
    torch.nn.init.constant_(a, 1.0)
    torch.add(b, 1, out=b)
    return y


def on_input(self: Net, x: Tensor) -> Tensor:
    x -= 1
    x[0] = 0
    return self.fc(x) + x


MUTATIONS = {"alias": alias_add, "size": immutable, "item": items, "view": through_views, "input": on_input}


@pytest.mark.parametrize("case", MUTATIONS)
def test_mutations_are_recorded(case: str) -> None:
    net = Net(MUTATIONS[case])
    with torch.no_grad():
        assert_replays(net, traced(net), X)


def test_in_place_addition_keeps_the_tensor() -> None:
    made = traced(Net(alias_add))
    assert [n.target.__name__ for n in made.graph.nodes if n.op == "call_function"] == [  # type: ignore[union-attr]
        *("iadd", "imul", "isub", "itruediv")
    ]


# ---- isinstance, and what stands in for tensors


def by_kind(self: Net, x: Any) -> Any:
    assert isinstance(x, (list, Tensor))
    assert isinstance(x, Tensor | None)
    assert not isinstance(x, (int, dict))
    assert not isinstance(x, nn.Module)
    assert not isinstance(x.shape, Tensor)
    assert not isinstance(x.shape[0] * 2, Tensor)
    assert isinstance(self.fc.weight, Tensor)
    assert torch.is_tensor(x)
    return self.fc(x) if isinstance(x, Tensor) else x


def test_a_value_is_taken_for_a_tensor_and_a_size_is_not() -> None:
    net = Net(by_kind)
    assert_replays(net, traced(net, examples=False), X)


def test_the_builtin_is_put_back() -> None:
    before = builtins.isinstance, torch.autograd.Function.__dict__["apply"]
    traced(Net(by_kind))
    with pytest.raises(TraceRefusal):
        traced(Valued())
    assert before == (builtins.isinstance, torch.autograd.Function.__dict__["apply"])


@pytest.mark.parametrize("name", ["data", "grad", "requires_grad"])
def test_an_attribute_that_a_graph_can_t_assign_is_refused(name: str) -> None:
    with pytest.raises(TraceRefusal, match=f"{name} of a traced value is assigned"):
        traced(Net(lambda self, x: setattr(self.fc(x), name, None)))


def test_a_traced_value_is_not_deepcopied() -> None:
    with pytest.raises(TraceRefusal, match="a traced value is deepcopied: clone it"):
        traced(Net(lambda self, x: copy.deepcopy(x)))


# ---- parameters, buffers, other tensors


def test_tied_weights_are_read_by_one_name() -> None:
    net = Net(lambda self, x: F.linear(x, self.other.weight) + F.linear(x, self.fc.weight), other=nn.Linear(6, 6))
    net.other.weight = net.fc.weight
    made = traced(net)
    assert targets(made, "get_attr") == ["fc.weight"]
    assert_replays(net, made, X)


def test_buffers_are_read_not_baked() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        scale = self.mean * 2 + self.sub.mean.sum()  # arithmetic on buffers alone
        return x * scale

    net, sub = Net(forward), nn.Module()
    net.register_buffer("mean", torch.ones(6))
    sub.register_buffer("mean", torch.ones(2))
    net.sub = sub
    made = traced(net)
    with torch.no_grad():
        net.mean.copy_(torch.arange(6.0))
        sub.mean = torch.ones(3)
    assert_replays(net, made, X)


def test_a_buffer_is_written_as_the_original_writes_it() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        self.count.add_(1)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        return x - self.mean * self.count

    net = Net(forward)
    net.register_buffer("count", torch.zeros(1))
    net.register_buffer("mean", torch.zeros(6))
    made = traced(net)
    assert float(net.count) == 0
    assert float(net.mean.abs().sum()) == 0
    other = copy.deepcopy(net)
    assert torch.equal(replay(net, made, X), other(X))
    assert torch.equal(replay(net, made, X), other(X))
    assert float(net.count) == 2


def test_tensors_in_plain_attributes_are_read_and_written_where_they_are() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.mask * self.count

    net = Net(forward, mask=torch.ones(6), count=torch.zeros(1))
    made = traced(net)
    assert float(net.count) == 0  # Python could have run this itself
    assert targets(made, "get_attr") == ["count", "mask"]
    assert torch.equal(replay(net, made, X), X)
    assert float(net.count) == 1
    net.mask = torch.zeros(6)
    assert float(replay(net, made, X).abs().sum()) == 0


GLOBAL = torch.zeros(6)


@pytest.mark.parametrize(
    "forward",
    [lambda self, x: x + GLOBAL.add_(1), lambda self, x: x + self.stored[0].fill_(2.0), lambda self, x: GLOBAL.mul_(x)],
    ids=["global", "in a list", "by a traced value"],
)
def test_a_tensor_found_outside_is_never_written_by_the_trace(forward: Callable[..., Any]) -> None:
    net = Net(forward, stored=[torch.zeros(6)])
    before = GLOBAL.clone()
    with contextlib.suppress(TraceRefusal):  # a trace that records the write is as good as a refusal
        traced(net)
    assert torch.equal(GLOBAL, before)
    assert float(net.stored[0].sum()) == 0


def fills(self: Net, x: Tensor) -> Tensor:
    out = torch.zeros(3, 4, 6)
    out[:, :2] = x[:, 2:]
    return self.fc(out) + out


def fills_a_view(self: Net, x: Tensor) -> Any:
    out = torch.zeros(12)
    rows = out.view(3, 4)
    middle = rows[1:, ::2]
    rows[0] = x[0, :, 0]
    middle += x[0, 0, 0]
    return out, rows * 2, middle, out.sum(), out.shape[0], out.T


def reads_then_fills(self: Net, x: Tensor) -> Any:
    out = torch.ones(4, 6)
    before = x + out
    out.mul_(x[0])
    return before, out + x, torch.cat([out, out])


CONSTANTS = {"slices": fills, "views": fills_a_view, "read before": reads_then_fills}


@pytest.mark.parametrize("case", CONSTANTS)
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")
def test_constants_that_traced_operators_write_into(case: str) -> None:
    """Fresh at each run, shared by all that look into them, and never computed with by Python once written."""
    net = Net(CONSTANTS[case])
    made = traced(net, examples=False)
    held = [t.clone() for t in made.constants.values()]
    with torch.no_grad():
        assert_replays(net, made, X)
    assert all(torch.equal(a, b) for a, b in zip(held, made.constants.values(), strict=True))


def test_python_may_not_change_a_constant_after_it_was_read() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        position = torch.ones(6)
        y = x * position
        position.add_(1)
        return y + position

    with pytest.raises(TraceRefusal, match="a tensor made from no input is written into after"):
        traced(Net(forward))
    net = Outer(Net(forward))
    made = traced(net)
    assert made.leaves == {"inner": "a tensor made from no input is written into after a traced operator has read it"}
    assert_replays(net, made, X)


# ---- random numbers


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


def noisy(self: Net, x: Tensor) -> Tensor:
    return F.dropout(self.fc(x), 0.5, self.training) + torch.randn_like(x) + torch.rand(x.shape)


PYTHON_RANDOM: dict[str, Callable[..., Any]] = {
    "torch": lambda self, x: x if torch.rand(1) < 0.5 else -x,
    "constant": lambda self, x: x + torch.randn(6),
    "random": lambda self, x: x if random.random() < 0.5 else -x,
    "numpy": lambda self, x: x * float(np.random.rand()),
}


def test_random_operators_are_recorded_and_draw_nothing_while_traced() -> None:
    net = Net(noisy)
    before = random_state()
    made = traced(net)
    assert random_state() == before
    assert_replays(net, made, X)


@pytest.mark.parametrize("case", PYTHON_RANDOM)
def test_chance_that_python_sees_is_not_fixed(case: str) -> None:
    net = Outer(Net(PYTHON_RANDOM[case]))
    before = random_state()
    made = traced(net)
    assert made.leaves == {"inner": "its forward draws random numbers that Python sees"}
    with pytest.raises(TraceRefusal, match=r"draws random numbers that Python sees .* move them into a submodule"):
        traced(net.inner)
    assert random_state() == before


# ---- gradients and autocast switched within


def no_grad_pieces(self: Net, x: Tensor) -> Tensor:
    y = self.fc(x)
    with torch.no_grad():
        target = self.other(y) + F.linear(y, self.fc.weight)
        scale = target.abs().sum()
        y.div_(scale)
        a, b = y.chunk(2, 1)
    return y * target + self.other(y) / scale + torch.cat([a, b], 1)


def decorated(self: Net, x: Tensor) -> Tensor:
    return self.fc(x) * evaluated(self, x)


@torch.no_grad()
def evaluated(self: Net, x: Tensor) -> Tensor:
    return self.other(x) + self.fc.bias


@pytest.mark.parametrize("forward", [no_grad_pieces, decorated])
@pytest.mark.parametrize("enabled", [True, False])
def test_no_grad_stops_the_same_gradients(forward: Callable[..., Any], enabled: bool) -> None:
    net = Net(forward, other=nn.Linear(6, 6))
    with torch.set_grad_enabled(enabled):
        made = traced(net)
    assert torch.is_grad_enabled()
    if not enabled:
        with torch.no_grad():
            assert_replays(net, made, X)
        return
    ours, theirs = replay(net, made, X), net(X)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y.sin().sum(), [*net.parameters()], allow_unused=True) for y in (ours, theirs)]
    assert [g is None for g in grads[0]] == [g is None for g in grads[1]]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_mode_that_forward_leaves_behind_is_put_back() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return self.fc(x)

    traced(Net(forward))
    assert torch.is_grad_enabled()


def mixed(self: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = self.fc(x)
    return x.float()


def test_a_forward_that_switches_autocast_is_kept_whole() -> None:
    net = Outer(Net(mixed))
    made = traced(net)
    assert made.leaves.keys() == {"inner"}
    assert "its forward switches autocast" in made.leaves["inner"]
    assert_replays(net, made, X)
    with pytest.raises(TraceRefusal, match="switches autocast: do so around the call of the network"):
        traced(net.inner)


def test_autocast_that_changes_nothing_is_traced_through() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.fc(x)

    assert traced(Outer(Net(forward))).leaves == {}


# ---- what forward assigns


def remembers(self: Net, x: Tensor) -> Tensor:
    self.last = self.fc(x)
    return self.last


def counts(self: Net, x: Tensor) -> Tensor:
    self.calls += 1
    return self.fc(x)


def collects(self: Net, x: Tensor) -> Tensor:
    self.seen.append(self.fc(x))
    return self.seen[-1]


def replaces_a_buffer(self: Net, x: Tensor) -> Tensor:
    self.mean = self.mean * 0.9 + x.mean()
    return x - self.mean


ASSIGNS = {"last": remembers, "calls": counts, "seen": collects, "mean": replaces_a_buffer}


@pytest.mark.parametrize("name", ASSIGNS)
def test_a_forward_that_assigns_is_kept_whole_and_its_module_left_as_it_was(name: str) -> None:
    net = Net(ASSIGNS[name], calls=0, seen=[])
    net.register_buffer("mean", torch.zeros(1))
    before = {key: value for key, value in vars(net).items() if key != "seen"}
    buffers, seen = dict(net._buffers), net.seen
    with pytest.raises(TraceRefusal, match=f"Net.forward assigns self.{name}, which a traced graph can't do"):
        traced(net)
    made = traced(Outer(net))
    assert made.leaves == {"inner": f"its forward assigns self.{name}"}
    assert {key: value for key, value in vars(net).items() if key != "seen"} == before
    assert all(net._buffers[key] is value for key, value in buffers.items())
    assert net._buffers.keys() == buffers.keys()
    assert net.seen is seen
    assert seen == []


def test_a_trace_leaves_every_module_as_it_was() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), Net(fills), nn.Dropout(), Net(noisy))
    looks = Net(lambda self, x: self.norm(x) if self.norm(x).shape[0] > 1 else x, norm=nn.BatchNorm1d(4))
    net.append(looks)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    attributes = [{**vars(m), **m._parameters, **m._buffers, **m._modules} for m in net.modules()]
    made = traced(net)
    assert made.shape_bound  # the batch norm did run, on fake tensors
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    after = [{**vars(m), **m._parameters, **m._buffers, **m._modules} for m in net.modules()]
    assert all(
        a.keys() == b.keys() and all(a[key] is b[key] for key in a) for a, b in zip(attributes, after, strict=True)
    )


# ---- modules


def test_the_modes_are_those_the_modules_are_in() -> None:
    net = Net(lambda self, x: self.fc(x) if self.training else x)
    assert targets(traced(net), "call_module") == ["fc"]
    assert targets(traced(net.eval()), "call_module") == []


def test_scopes_name_the_modules_entered() -> None:
    net = Outer(Outer(nn.Sequential(nn.Linear(6, 6), nn.ReLU())))
    scopes = {n.name: n.meta["scope"] for n in traced(net).graph.nodes}
    assert scopes["inner_inner_1"] == ("inner", "inner.inner", "inner.inner.1")
    assert scopes["relu"] == ("inner",)
    assert scopes["relu_1"] == ()


@pytest.mark.parametrize(
    "holder", [lambda m: [m], lambda m: {"layer": m}, lambda m: (m,)], ids=["list", "dict", "tuple"]
)
def test_a_module_outside_the_hierarchy_is_named(holder: Callable[..., Any]) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        layer = self.hidden["layer"] if isinstance(self.hidden, dict) else self.hidden[0]
        return layer(x)

    net = Net(forward, hidden=holder(nn.Linear(6, 6)))
    with pytest.raises(TraceRefusal, match="a Linear is called that is no submodule of the network: register it"):
        traced(net)
    assert traced(Outer(net)).leaves.keys() == {"inner"}


@torch.fx.wrap
def wrapped(x: Tensor, n: int) -> Tensor:
    return x * n if float(x.detach().sum()) > 0 else x


def test_a_wrapped_function_is_one_node() -> None:
    net = Net(lambda self, x: wrapped(self.fc(x), 2))
    made = traced(net, examples=False)
    assert [n.target for n in made.graph.nodes if n.op == "call_function"] == [wrapped]
    assert_replays(net, made, X)


def test_shapes_behind_thousands_of_operators() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        for _ in range(2000):
            x = x + 1
        return x if x.shape[0] > 1 else -x

    assert len(traced(Net(forward)).graph.nodes) > 2000


def test_no_dead_reads_are_left() -> None:
    made = traced(Net(by_kind))
    assert [n.name for n in made.graph.nodes if n.op == "get_attr" and not n.users] == [
        "fc_weight"
    ]  # looked at, not used


# ---- inputs and outputs


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Result:
    value: Tensor
    scale: float = 2.0


def takes_all(self: Net, x: Tensor, pair: Any = None, *, mask: Any = None, double: bool = False, **more: Any) -> Any:
    y = self.fc(x)
    if pair is not None:
        y = y * pair.left + pair.right["deep"][1]
    if mask is not None:
        y = y * mask
    if double:
        y = y * 2
    return Pair({"y": y, "x": x}, [None, double, "text", y.mean()]), sum(more.values(), y)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "one": ((X,), {}, ("x",)),
    "None": ((X, None), {"mask": None}, ("x",)),
    "keywords": ((), {"x": X, "mask": X > 0, "double": True}, ("x", "mask")),
    "named tuple": ((X, Pair(X + 1, {"deep": [3.0, X]})), {}, ("x", "pair_left", "pair_right_deep_1")),
    "bool": ((X,), {"double": True}, ("x",)),
    "others": ((X,), {"extra": X * 2, "number": 3}, ("x", "extra")),
}


@pytest.mark.parametrize("case", CALLS)
def test_inputs_and_outputs_of_any_structure(case: str) -> None:
    args, kwargs, names = CALLS[case]
    net = type("Root", (nn.Module,), {"forward": takes_all})()
    net.fc = nn.Linear(6, 6)
    inputs, tensors = flatten_inputs(net, args, kwargs)
    assert inputs.names == names
    again, again_named = inputs.unflatten(tensors)
    assert pytree.tree_structure((again, again_named)) == pytree.tree_structure((args, kwargs))
    made = trace(net, inputs, None)
    ours, theirs = replay(net, made, *tensors), net(*args, **kwargs)
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_data_class_is_returned() -> None:
    net = Net(lambda self, x: Result(self.fc(x)))
    result = replay(net, traced(net, examples=False), X)
    assert isinstance(result, Result)
    assert result.scale == 2.0
    torch.testing.assert_close(result.value, net(X).value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.zeros(3), "input 'x_1' is a ndarray, whose contents a traced graph can't see: pass tensors, or register"),
        ({3}, "input 'x_1' is a set"),
        (Result(X), "input 'x_1' is a Result"),
        (random.Random(0), "input 'x_1' is a Random"),
    ],
)
def test_inputs_that_a_graph_can_t_see_are_refused_by_name(value: Any, named: str) -> None:
    net = nn.Linear(6, 6)
    net.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(TraceRefusal, match=named):
        flatten_inputs(net, ([X, value],), {})


def test_constant_inputs_are_baked_and_the_rest_flows() -> None:
    net = Net(lambda self, x, n, flag, dtype: self.fc(x).to(dtype) * n if flag else x)
    inputs, tensors = flatten_inputs(net, (X, 3, True, torch.float64), {})
    assert len(tensors) == 1
    assert tensors[0] is X
    made = trace(net, inputs, None)
    assert torch.equal(replay(net, made, X), net(X, 3, True, torch.float64))
