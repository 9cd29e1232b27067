"""What operator a node is, however it was written; which values are constants; how passes run."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from frozen import plain_graph
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxfreeze.operators import Op, op_of
from fxfreeze.rewrite import Outcome, PassError, constant, forget, hold, other_user, place, run_passes


class Run(nn.Module):
    """Calls ``run`` on itself and its inputs."""

    def __init__(self, run: Callable[..., Any], **attributes: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, value in attributes.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def last_call(graph: GraphModule) -> Node:
    return [n for n in graph.graph.nodes if n.op.startswith("call")][-1]


def evaluated(op: Op, graph: GraphModule, x: Tensor) -> Tensor:
    """What the functional form gives, with its weights looked up and ``x`` in place of its input."""
    arguments = {name: constant(v, graph) if isinstance(v, Node) else v for name, v in op.arguments.items()}
    with torch.no_grad():
        result: Tensor = op.function(**{**arguments, "input": x})
    return result


IMAGE, SIGNAL, VOLUME = (3, 4, 9, 8), (3, 4, 12), (3, 4, 5, 6, 7)
MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv 1d": (nn.Conv1d(4, 6, 3, 2, dilation=2), SIGNAL),
    "conv 2d": (nn.Conv2d(4, 6, (3, 1), padding="same", groups=2, bias=False), IMAGE),
    "conv 3d": (nn.Conv3d(4, 6, 2, padding=1), VOLUME),
    "conv 1d padded": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), SIGNAL),
    "conv 2d padded": (nn.Conv2d(4, 6, 4, 2, padding=1, padding_mode="reflect"), IMAGE),
    "conv 3d padded": (nn.Conv3d(4, 6, 3, padding=(0, 1, 2), padding_mode="replicate"), VOLUME),
    "conv_transpose 1d": (nn.ConvTranspose1d(4, 6, 3, 2, output_padding=1), SIGNAL),
    "conv_transpose 2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), IMAGE),
    "conv_transpose 3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), VOLUME),
    "linear": (nn.Linear(12, 5), SIGNAL),
    "batch_norm 1d": (nn.BatchNorm1d(4), SIGNAL),
    "batch_norm 2d": (nn.BatchNorm2d(4, affine=False, eps=0.1), IMAGE),
    "batch_norm 3d": (nn.BatchNorm3d(4, momentum=None), VOLUME),
    "batch_norm synchronised": (nn.SyncBatchNorm(4), IMAGE),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_as_functions(name: str) -> None:
    """A module's operator, called in its functional form, gives the module's output to the bit."""
    layer, shape = MODULES[name]
    x = torch.randn(shape)
    graph = plain_graph(nn.Sequential(layer), x)
    node = last_call(graph)
    op = op_of(node, graph)
    assert op is not None
    assert op.kind == name.split()[0]
    assert op.input is node.args[0]
    with torch.no_grad():
        assert torch.equal(evaluated(op, graph, x), layer(x))


FUNCTIONS: dict[str, tuple[str, Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "conv1d": ("conv", lambda n, x: F.conv1d(x, n.w, n.b, 2), (6, 4, 3), SIGNAL),
    "conv2d": ("conv", lambda n, x: F.conv2d(x, n.w, padding=1, groups=2), (6, 2, 3, 3), IMAGE),
    "conv2d by name": ("conv", lambda n, x: torch.conv2d(weight=n.w, input=x, bias=n.b), (6, 4, 3, 3), IMAGE),
    "conv3d": ("conv", lambda n, x: F.conv3d(x, n.w, n.b, 1, "same"), (6, 4, 3, 3, 3), VOLUME),
    "conv_transpose1d": ("conv_transpose", lambda n, x: F.conv_transpose1d(x, n.w, n.b, 2, 1, 1), (4, 6, 3), SIGNAL),
    "conv_transpose2d": (
        "conv_transpose",
        lambda n, x: F.conv_transpose2d(x, n.w, None, 2, 0, 1, 2, 2),
        (4, 3, 3, 3),
        IMAGE,
    ),
    "conv_transpose3d": ("conv_transpose", lambda n, x: F.conv_transpose3d(x, n.w), (4, 6, 2, 2, 2), VOLUME),
    "linear": ("linear", lambda n, x: F.linear(x, n.w, n.b), (6, 12), SIGNAL),
    "batch_norm": ("batch_norm", lambda n, x: F.batch_norm(x, n.mean, n.var, n.gain, None, eps=0.2), (6, 4), SIGNAL),
    "batch_norm by position": (
        "batch_norm",
        lambda n, x: F.batch_norm(x, n.mean, n.var, None, n.gain, False, 0.3, 0.2),
        (6, 4),
        SIGNAL,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_with_every_argument(name: str) -> None:
    """Positions, names and defaults all arrive: the functional form gives the forward's output to the bit."""
    kind, run, weight, shape = FUNCTIONS[name]
    statistics = {"mean": torch.randn(4), "var": torch.rand(4) + 0.5, "gain": torch.randn(4)}
    net = Run(run, w=torch.randn(weight), b=torch.randn(6), **statistics)
    x = torch.randn(shape)
    graph = plain_graph(net, x)
    op = op_of(last_call(graph), graph)
    assert op is not None
    assert op.kind == kind
    with torch.no_grad():
        assert torch.equal(evaluated(op, graph, x), net(x))


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def pre_hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return layer


def patched(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]
    return layer


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "activation": nn.Mish,
    "pool": lambda: nn.LPPool2d(2, 2),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4),
    "hooked": lambda: hooked(nn.Conv2d(4, 6, 3)),
    "hooked before": lambda: pre_hooked(nn.BatchNorm2d(4)),
    "patched": lambda: patched(nn.Conv2d(4, 6, 3)),
    "derived": lambda: Doubled(4, 6, 3),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
    "function": lambda: Run(lambda net, x: F.mish(x)),
    "method": lambda: Run(lambda net, x: x.exp()),
    "in place": lambda: Run(lambda net, x: x.clone().div_(2)),
    "output size": lambda: Run(lambda net, x: net.up(x, (18, 16)), up=nn.ConvTranspose2d(4, 6, 2, 2)),
    "named output size": lambda: Run(lambda net, x: net.up(x, output_size=(18, 16)), up=nn.ConvTranspose2d(4, 6, 2, 2)),
}


# Each way to write one operator, with the kind and some of the arguments that it must be found to have.
WAYS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "nn.ReLU": (lambda net, x: net.relu(x), "activation", {"name": "relu"}),
    "F.relu": (lambda net, x: F.relu(x), "activation", {"name": "relu"}),
    "F.relu in place": (lambda net, x: F.relu(x.sin(), inplace=True), "activation", {"name": "relu"}),
    "torch.relu": (lambda net, x: torch.relu(x), "activation", {"name": "relu"}),
    "relu": (lambda net, x: x.relu(), "activation", {"name": "relu"}),
    "relu_": (lambda net, x: x.sin().relu_(), "activation", {"name": "relu"}),
    "F.relu6": (lambda net, x: F.relu6(x), "activation", {"name": "relu6"}),
    "nn.ReLU6": (lambda net, x: net.relu6(x), "activation", {"name": "relu6"}),
    "F.silu": (lambda net, x: F.silu(x), "activation", {"name": "silu"}),
    "F.hardswish": (lambda net, x: F.hardswish(x), "activation", {"name": "hardswish"}),
    "F.gelu": (lambda net, x: F.gelu(x), "activation", {"name": "gelu", "approximate": "none"}),
    "nn.GELU": (lambda net, x: net.gelu(x), "activation", {"name": "gelu", "approximate": "tanh"}),
    "+": (lambda net, x: x + x.sin(), "add", {"alpha": 1}),
    "+=": (lambda net, x: operator.iadd(x.sin(), x), "add", {"alpha": 1}),
    "torch.add": (lambda net, x: torch.add(x, x.sin(), alpha=2), "add", {"alpha": 2}),
    "add_": (lambda net, x: x.sin().add_(x), "add", {"alpha": 1}),
    "torch.cat": (lambda net, x: torch.cat([x, x.sin()], 1), "cat", {"dim": 1}),
    "torch.cat by name": (lambda net, x: torch.cat(tensors=[x, x.sin()], dim=-3), "cat", {"dim": -3}),
    "F.avg_pool2d": (lambda net, x: F.avg_pool2d(x, 2), "avg_pool", {"kernel_size": 2, "stride": None}),
    "nn.AvgPool2d": (
        lambda net, x: net.avg(x),
        "avg_pool",
        {"kernel_size": 3, "stride": 2, "count_include_pad": False},
    ),
    "F.max_pool2d": (lambda net, x: F.max_pool2d(x, 2, padding=1), "max_pool", {"kernel_size": 2, "padding": 1}),
    "nn.MaxPool2d": (lambda net, x: net.max(x), "max_pool", {"kernel_size": 2, "dilation": 1, "return_indices": False}),
    "F.adaptive_avg_pool2d": (lambda net, x: F.adaptive_avg_pool2d(x, 1), "mean_pool", {"output_size": 1}),
    "F.layer_norm": (lambda net, x: F.layer_norm(x, (8,), eps=1e-3), "layer_norm", {"eps": 1e-3, "weight": None}),
    "nn.LayerNorm": (lambda net, x: net.layernorm(x), "layer_norm", {"normalized_shape": (8,)}),
    "nn.Dropout": (lambda net, x: net.drop(x), "identity", {"training": False}),
    "nn.Identity": (lambda net, x: net.same(x), "identity", {"training": False}),
}


@pytest.mark.parametrize("name", WAYS)
def test_one_answer_for_each_way_to_write_it(name: str) -> None:
    run, kind, arguments = WAYS[name]
    net = Run(
        run,
        relu=nn.ReLU(),
        relu6=nn.ReLU6(inplace=True),
        gelu=nn.GELU("tanh"),
        avg=nn.AvgPool2d(3, 2, count_include_pad=False),
        max=nn.MaxPool2d(2),
        layernorm=nn.LayerNorm(8),
        drop=nn.Dropout(),
        same=nn.Identity(),
    )
    graph = plain_graph(net, torch.randn(IMAGE))
    op = op_of(last_call(graph), graph)
    assert op is not None
    assert op.kind == kind
    assert {name: op.arguments[name] for name in arguments} == arguments


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_none_of_these(name: str) -> None:
    graph = plain_graph(nn.Sequential(UNKNOWN[name]()), torch.randn(IMAGE))
    assert op_of(last_call(graph), graph) is None


def test_arguments_that_are_no_nodes() -> None:
    graph = plain_graph(nn.Sequential(nn.ReLU()), torch.randn(IMAGE))
    placeholder = next(iter(graph.graph.nodes))
    assert op_of(None, graph) is None
    assert op_of(1.0, graph) is None
    assert op_of(placeholder, graph) is None


WEIGHT = torch.arange(12.0).reshape(3, 4)
CONSTANTS: dict[str, Callable[..., Tensor]] = {
    "attribute": lambda n, x: F.linear(x, n.w),
    "computed": lambda n, x: F.linear(x, n.w * 2 - n.w.mean()),
    "method": lambda n, x: F.linear(x, n.w.abs().sqrt()),
    "of its own shape": lambda n, x: F.linear(x, n.w.reshape(n.w.shape[0] * 2, -1).view(n.w.size(0), n.w.size(1))),
    "indexed": lambda n, x: F.linear(x, n.w[1:]),
    "diamond": lambda n, x: F.linear(x, n.w + n.w.tanh() * n.w.sigmoid()),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str) -> None:
    net = Run(CONSTANTS[name], w=WEIGHT.clone())
    x = torch.randn(5, 4)
    graph = plain_graph(net, x)
    op = op_of(last_call(graph), graph)
    assert op is not None
    value = constant(op.arguments["weight"], graph)
    assert value is not None
    assert not value.requires_grad
    with torch.no_grad():
        assert torch.equal(F.linear(x, value), net(x))


def written_later(net: Any, x: Tensor) -> Tensor:
    weight = net.w.clone()
    result = F.linear(x, weight)
    weight.mul_(2)
    return result + F.linear(x, weight)


def written_before(net: Any, x: Tensor) -> Tensor:
    weight = net.w.clone()
    weight[:, 0] = 1.0
    return F.linear(x, weight)


VARIABLES: dict[str, Callable[..., Tensor]] = {
    "from the input": lambda n, x: F.linear(x, n.w * x.mean()),
    "of the input's shape": lambda n, x: F.linear(x, n.w * x.shape[0]),
    "random": lambda n, x: F.linear(x, n.w + torch.randn_like(n.w)),
    "dropped out": lambda n, x: F.linear(x, F.dropout(n.w, 0.5, True) * 1.0),
    "written later": written_later,
    "written before": written_before,
    "from a module": lambda n, x: F.linear(x, n.layer(n.w)),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_what_is_no_constant(name: str) -> None:
    """Values that change, and looking at them changes nothing: no random number is drawn, no parameter written."""
    net = Run(VARIABLES[name], w=WEIGHT.clone(), layer=nn.Linear(4, 4))
    graph = plain_graph(net, torch.randn(5, 4))
    op = next(
        op for n in graph.graph.nodes if n.op == "call_function" and (op := op_of(n, graph)) and op.kind == "linear"
    )
    before = torch.get_rng_state()
    assert constant(op.arguments["weight"], graph) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(net.w, WEIGHT)  # type: ignore[arg-type]


def test_places_are_modules_where_there_are_any() -> None:
    net = Run(lambda n, x: torch.tanh(n.layer(x)), layer=nn.Sequential(nn.Linear(4, 4)))
    graph = plain_graph(net, torch.randn(5, 4))
    assert [place(n) for n in graph.graph.nodes if n.op.startswith("call")] == ["layer.0", "tanh"]


def test_other_users() -> None:
    graph = plain_graph(Run(lambda n, x: torch.tanh(x) + torch.exp(x)), torch.randn(5, 4))
    x, tanh, exp, add, _ = graph.graph.nodes
    assert other_user(x, tanh) is exp
    assert other_user(x, exp) is tanh
    assert other_user(tanh, add) is None


def test_who_looks_at_the_shape_is_no_user() -> None:
    """But who looks at an element, or at where the tensor lies, is one."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = torch.exp(x)
        return torch.tanh(y).reshape(y.shape[0], y.size(1), -1).to(y.dtype)[: y.stride(0)]

    graph = plain_graph(Run(run), torch.randn(5, 4))
    x, exp, tanh, *_ = graph.graph.nodes
    stride = other_user(exp, tanh)
    assert stride is not None
    assert stride.target == "stride"
    stride.replace_all_uses_with(x)
    graph.graph.erase_node(stride)
    assert len(exp.users) == 4
    assert other_user(exp, tanh) is None


def test_held_tensors_have_names_of_their_own() -> None:
    graph = plain_graph(Run(lambda n, x: F.linear(x, n.w), w=WEIGHT.clone()), torch.randn(5, 4))
    tensors = [torch.randn(3, 4) for _ in range(4)]
    with graph.graph.inserting_before(last_call(graph)):
        nodes = [hold(graph, name, t) for name, t in zip(("a.b", "a.b", "a_b", "a_b_1"), tensors, strict=True)]
    assert len({n.target for n in nodes}) == 4
    assert all(graph.get_buffer(str(n.target)) is t for n, t in zip(nodes, tensors, strict=True))
    graph.graph.lint()


def test_forget_erases_what_nothing_reads() -> None:
    """The chain that computed a weight goes, up to what another operator still reads."""

    def run(net: Any, x: Tensor) -> Tensor:
        scaled = net.w * 2
        return F.linear(x, scaled.abs(), net.b) + scaled.mean()

    graph = plain_graph(Run(run, w=WEIGHT.clone(), b=torch.randn(3)), torch.randn(5, 4))
    linear = next(n for n in graph.graph.nodes if n.target is F.linear)
    op = op_of(linear, graph)
    assert op is not None
    with graph.graph.inserting_before(linear):
        held = hold(graph, "other", torch.randn(3, 4))
        replacement = graph.graph.call_function(F.linear, (op.input, held))
    linear.replace_all_uses_with(replacement)
    graph.graph.erase_node(linear)
    forget(graph, op)
    names = {n.name for n in graph.graph.nodes}
    assert "mul" in names
    assert "abs_1" not in names
    assert "b" not in names
    graph.graph.lint()
    with graph.graph.inserting_before(replacement):
        second = graph.graph.get_attr("other")
    for unread in (held, second):  # the first is read still, and then what it reads is
        forget(graph, Op("linear", F.linear, {"input": op.input, "weight": unread}))
        assert "other" in graph._buffers
    replacement.replace_all_uses_with(op.input)
    graph.graph.erase_node(replacement)
    forget(graph, Op("linear", F.linear, {"input": op.input, "weight": held}))
    assert "other" not in graph._buffers


def to_tanh(module: GraphModule) -> list[Outcome]:
    for node in module.graph.nodes:
        if node.target is torch.exp:
            node.target = torch.tanh
    return [Outcome("to_tanh", "exp", True, "replaced")]


def to_sine(module: GraphModule) -> list[Outcome]:
    for node in module.graph.nodes:
        if node.target is torch.tanh:
            node.target = torch.sin
    return [Outcome("to_sine", "tanh", True, "replaced")]


def raises(module: GraphModule) -> list[Outcome]:
    raise ZeroDivisionError("no such layer")


def breaks(module: GraphModule) -> list[Outcome]:
    first, call, _ = module.graph.nodes
    call.append(first)  # an argument after its user
    return []


def test_passes_run_in_order() -> None:
    graph = plain_graph(Run(lambda n, x: torch.exp(x)), torch.randn(5, 4))
    x = torch.randn(5, 4)
    outcomes = run_passes(graph, [to_tanh, to_sine])
    assert [o.name for o in outcomes] == ["to_tanh", "to_sine"]
    assert torch.equal(graph(x)[0], torch.sin(x))
    assert run_passes(graph, []) == []


@pytest.mark.parametrize(("defective", "message"), [(raises, "no such layer"), (breaks, "used before it has been")])
def test_a_defective_pass_is_named(defective: Any, message: str) -> None:
    graph = plain_graph(Run(lambda n, x: torch.exp(x)), torch.randn(5, 4))
    with pytest.raises(PassError, match=rf"pass {defective.__name__} failed: \w+Error: .*{message}"):
        run_passes(graph, [defective, to_tanh])


def test_a_pass_without_effect_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graph = plain_graph(net, torch.randn(5, 4))
    text = str(graph.graph)
    assert run_passes(graph, [lambda module: []]) == []
    assert str(graph.graph) == text
