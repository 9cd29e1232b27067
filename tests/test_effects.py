"""What operators write, share and draw: a table, each row checked against the operator itself."""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from fxfreeze.effects import Alias, Effects, Memory, effects, name_of, reshapes, silenced
from fxfreeze.inputs import flatten_inputs
from fxfreeze.trace import Traced, trace

NEVER, VIEW, SAME, MAYBE = Alias.NEVER, Alias.VIEW, Alias.SAME, Alias.MAYBE


class Body(nn.Module):
    """Calls `function(x, y, *modules)`."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y, *self.parts)


def inputs() -> list[Tensor]:
    """x, y of (2, 4, 6, 6)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 4, 6, 6, generator=generator) for _ in "xy"]


def traced(net: nn.Module, training: bool = True) -> Traced:
    net.train(training)
    return trace(net, flatten_inputs(net, tuple(inputs()), {})[0])


def nodes_of(net: nn.Module, training: bool = True) -> list[Node]:
    return list(traced(net, training).graph.nodes)


class Row(NamedTuple):
    """alias: what the output is to `of`; writes: names of inputs; the function's last operator is the one in question."""

    function: Callable[..., Any]
    alias: Alias = NEVER
    writes: str = ""
    random: bool = False
    of: str = "x"


TABLE: dict[str, Row] = {
    # new tensors
    "add": Row(lambda x, y: x + y),
    "matmul": Row(lambda x, y: x @ y),
    "relu": Row(lambda x, y: F.relu(x)),
    "method relu": Row(lambda x, y: x.relu()),
    "relu not in place": Row(lambda x, y: F.relu(x, inplace=False)),
    "relu not in place by position": Row(lambda x, y: F.relu(x, False)),
    "cat": Row(lambda x, y: torch.cat([x, y])),
    "stack": Row(lambda x, y: torch.stack((x, y))),
    "clone": Row(lambda x, y: x.clone()),
    "conv": Row(lambda x, y: F.conv2d(x, y[:, :, :3, :3].reshape(2, 4, 3, 3))),
    "pool": Row(lambda x, y: F.max_pool2d(x, 2)),
    "adaptive pool": Row(lambda x, y: F.adaptive_avg_pool2d(x, 6)),
    "batch norm off": Row(lambda x, y: F.batch_norm(x, y[0, :, 0, 0], y[1, :, 0, 0], training=False)),
    "layer norm": Row(lambda x, y: F.layer_norm(x, (6,))),
    "index by a tensor": Row(lambda x, y: x[y > 0.5], MAYBE),
    "index by a list": Row(lambda x, y: x[[0, 1]], MAYBE),
    "item of a dunder": Row(lambda x, y: x.__getitem__(0), VIEW),
    "where": Row(lambda x, y: torch.where(x > y, x, y)),
    "attention": Row(lambda x, y: F.scaled_dot_product_attention(x, y, y)),
    "foreach": Row(lambda x, y: torch._foreach_add([x, y], 1.0)),
    "zeros like": Row(lambda x, y: torch.zeros_like(x)),
    "new zeros": Row(lambda x, y: x.new_zeros(3)),
    "gelu": Row(lambda x, y: F.gelu(x)),
    "embedding": Row(lambda x, y: F.embedding(y.long(), x[0, 0]), of="y"),
    # always views
    "view": Row(lambda x, y: x.view(2, -1), VIEW),
    "slice": Row(lambda x, y: x[:, 1:3, ..., None], VIEW),
    "transpose": Row(lambda x, y: x.transpose(1, 2), VIEW),
    "permute": Row(lambda x, y: torch.permute(x, (0, 2, 3, 1)), VIEW),
    "expand": Row(lambda x, y: x[:1].expand(5, -1, -1, -1), VIEW, of="getitem"),
    "unsqueeze": Row(lambda x, y: x.unsqueeze(0), VIEW),
    "squeeze": Row(lambda x, y: x.squeeze(), VIEW),
    "chunk": Row(lambda x, y: x.chunk(2, 1), VIEW),
    "split": Row(lambda x, y: torch.split(x, [1, 3], 1), VIEW),
    "method split": Row(lambda x, y: x.split(2), VIEW),
    "unbind": Row(lambda x, y: x.unbind(0), VIEW),
    "tensor split": Row(lambda x, y: x.tensor_split(2), VIEW),
    "narrow": Row(lambda x, y: x.narrow(1, 0, 2), VIEW),
    "select": Row(lambda x, y: x.select(1, 2), VIEW),
    "unfold": Row(lambda x, y: x.unfold(2, 3, 1), VIEW),
    "detach": Row(lambda x, y: x.detach(), VIEW),
    "diagonal": Row(lambda x, y: torch.diagonal(x, 0, 2, 3), VIEW),
    "transposed": Row(lambda x, y: x[0, 0].T, VIEW, of="getitem"),
    "data": Row(lambda x, y: x.data, VIEW),
    "view as": Row(lambda x, y: x.view_as(y), VIEW),
    "unflatten": Row(lambda x, y: x.unflatten(1, (2, 2)), VIEW),
    "as strided": Row(lambda x, y: x.as_strided((2, 2), (1, 1)), VIEW),
    "movedim": Row(lambda x, y: x.movedim(1, -1), VIEW),
    "real": Row(lambda x, y: x.real, VIEW),
    # sometimes views, sometimes their input
    "reshape": Row(lambda x, y: x.reshape(-1), MAYBE),
    "flatten": Row(lambda x, y: torch.flatten(x, 1), MAYBE),
    "flatten a transpose": Row(lambda x, y: x.transpose(1, 2).flatten(1), MAYBE, of="transpose"),
    "contiguous": Row(lambda x, y: x.contiguous(), MAYBE),
    "to": Row(lambda x, y: x.to(torch.float32), MAYBE),
    "to another": Row(lambda x, y: x.to(torch.float64), MAYBE),
    "float": Row(lambda x, y: x.float(), MAYBE),
    "byte": Row(lambda x, y: x.byte(), MAYBE),
    "type as": Row(lambda x, y: x.type_as(y), MAYBE),
    "positive": Row(lambda x, y: +x, MAYBE),
    "pad by nothing": Row(lambda x, y: F.pad(x, (0, 0)), MAYBE),
    "dropout off": Row(lambda x, y: F.dropout(x, 0.5, False), MAYBE),
    "broadcast": Row(lambda x, y: torch.broadcast_tensors(x, y), MAYBE),
    "meshgrid": Row(lambda x, y: torch.meshgrid(x[0, 0, 0], y[0, 0, 0], indexing="ij"), MAYBE, of="getitem"),
    "einsum": Row(lambda x, y: torch.einsum("nchw->nhwc", x), MAYBE),
    "sum to size": Row(lambda x, y: x.sum_to_size(2, 4, 6, 6), MAYBE),
    "at least": Row(lambda x, y: torch.atleast_2d([x, y]), MAYBE, of="y"),
    "unsafe chunk": Row(lambda x, y: x.unsafe_chunk(2), MAYBE),
    # in place
    "relu_": Row(lambda x, y: x.relu_(), SAME, "x"),
    "torch.relu_": Row(lambda x, y: torch.relu_(x), SAME, "x"),
    "relu in place": Row(lambda x, y: F.relu(x, inplace=True), SAME, "x"),
    "relu in place by position": Row(lambda x, y: F.relu(x, True), SAME, "x"),
    "elu in place": Row(lambda x, y: F.elu(x, 1.0, True), SAME, "x"),
    "add_": Row(lambda x, y: x.add_(y, alpha=2), SAME, "x"),
    "iadd": Row(lambda x, y: operator.iadd(x, y), SAME, "x"),
    "setitem of a constant": Row(lambda x, y: torch.zeros(2, 4, 6, 6).__setitem__(0, x[0]), NEVER, "clone"),
    "copy_": Row(lambda x, y: x.copy_(y), SAME, "x"),
    "masked_fill_": Row(lambda x, y: x.masked_fill_(y > 0.5, 0.0), SAME, "x"),
    "index_add_": Row(lambda x, y: x.index_add_(0, torch.tensor([0, 1]), y), SAME, "x"),
    "unsqueeze_": Row(lambda x, y: x.unsqueeze_(0), SAME, "x"),
    "setitem": Row(lambda x, y: operator.setitem(x, 0, y[0]), NEVER, "x"),
    "setitem by mask": Row(lambda x, y: operator.setitem(x, x > 0.5, 1.0), NEVER, "x"),
    "out": Row(lambda x, y: torch.add(x, 1, out=y), SAME, "y", of="y"),
    "two outs": Row(lambda x, y: torch.max(x, 3, out=(y[..., 0], y[..., 1].long())), MAYBE, "getitem long", of="getitem"),
    "foreach in place": Row(lambda x, y: torch._foreach_mul_([x, y], 2.0), MAYBE, "x y"),
    "instance norm": Row(lambda x, y: F.instance_norm(x, y[0, :, 0, 0], y[1, :, 0, 0]), NEVER, "getitem getitem_1"),
    "batch norm on": Row(
        lambda x, y: F.batch_norm(x, y[0, :, 0, 0], y[1, :, 0, 0], None, None, True), NEVER, "getitem getitem_1"
    ),
    # random
    "dropout": Row(lambda x, y: F.dropout(x, 0.5), MAYBE, random=True),
    "dropout2d": Row(lambda x, y: F.dropout2d(x, 0.5, training=True), MAYBE, random=True),
    "dropout in place": Row(lambda x, y: F.dropout(x, 0.5, True, True), SAME, "x", random=True),
    "torch.dropout": Row(lambda x, y: torch.dropout(x, 0.5, True), MAYBE, random=True),
    "torch.dropout off": Row(lambda x, y: torch.dropout(x, 0.5, False), MAYBE),
    "alpha dropout": Row(lambda x, y: F.alpha_dropout(x, 0.5, True), MAYBE, random=True),
    "rand like": Row(lambda x, y: torch.rand_like(x), random=True),
    "randn": Row(lambda x, y: torch.randn(x.shape), random=True, of=""),
    "bernoulli": Row(lambda x, y: torch.bernoulli(x), random=True),
    "bernoulli_": Row(lambda x, y: x.bernoulli_(0.5), SAME, "x", random=True),
    "normal_": Row(lambda x, y: x.normal_(), SAME, "x", random=True),
    "multinomial": Row(lambda x, y: x[0, 0].multinomial(2), random=True, of="getitem"),
    "randperm": Row(lambda x, y: torch.randperm(x.shape[0]), random=True, of=""),
    "rrelu": Row(lambda x, y: F.rrelu(x - 0.5, training=True), random=True, of="sub"),
    "gumbel": Row(lambda x, y: F.gumbel_softmax(x), MAYBE, random=True),
    "attention with dropout": Row(lambda x, y: F.scaled_dot_product_attention(x, y, y, dropout_p=0.5), random=True),
}  # fmt: skip


def run_last(made: Traced) -> tuple[dict[str, Any], Node, Any]:
    """Runs the graph; (values by node name before the last operator ran, that operator, its result)."""
    values: dict[str, Any] = dict(zip(("x", "y"), inputs(), strict=True))
    *others, last, _ = made.graph.nodes
    for node in others:
        if node.op != "placeholder":
            values[node.name] = run(node, values, made)
    torch.manual_seed(0)
    return values, last, last


def run(node: Node, values: dict[str, Any], made: Traced) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
    if node.op == "get_attr":
        return made.constants[str(node.target)]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def storage(value: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.numel()}


@pytest.mark.parametrize("name", TABLE)
def test_operators(name: str) -> None:
    row = TABLE[name]
    made = traced(Body(row.function))
    last = list(made.graph.nodes)[-2]
    does = effects(last, nn.Module().get_submodule)
    assert does.alias is row.alias
    assert {n.name for n in does.writes} == set(row.writes.split())
    assert does.random is row.random
    assert not does.opaque
    if row.alias is not NEVER:
        assert row.of in {n.name for n in does.aliases}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
def test_the_table_is_what_operators_do(name: str) -> None:
    row = TABLE[name]
    made = traced(Body(row.function))
    values, last, _ = run_last(made)
    read = {n.name: values[n.name] for n in last.all_input_nodes if isinstance(values[n.name], Tensor)}
    before, state = {key: (t._version, t.clone(), storage(t)) for key, t in read.items()}, torch.get_rng_state()
    result = run(last, values, made)
    assert row.random is not torch.equal(torch.get_rng_state(), state)
    written = {key for key, t in read.items() if t._version != before[key][0] or not torch.equal(t, before[key][1])}
    shared = {key for key in read if storage(result) & before[key][2]}
    sharing = {key for key in read if any(before[key][2] & before[w][2] for w in row.writes.split())}
    assert written <= sharing
    assert (written != set()) is (row.writes != "")
    if row.alias is NEVER:
        assert shared == set()
    if row.alias in (VIEW, SAME):
        assert row.of in shared
    if row.alias is SAME:
        assert result is values[row.of]


# ---- functions that can't be known, and arithmetic on sizes


@torch.fx.wrap
def unknown(x: Tensor, y: Tensor) -> Tensor:
    return x


def test_a_function_from_elsewhere_may_do_anything() -> None:
    last = nodes_of(Body(lambda x, y: unknown(x, y)))[-2]
    assert last.target is unknown
    read = tuple(last.all_input_nodes)
    assert len(read) == 2
    expected = Effects(writes=read, aliases=read, alias=MAYBE, random=True, opaque=True)
    assert effects(last, nn.Module().get_submodule) == expected


def test_sizes_touch_no_memory() -> None:
    nodes = nodes_of(Body(lambda x, y: x.view(x.shape[0], x.size(1) * math.floor(x.dim() / 4), -1)))
    sizes = [n for n in nodes if n.meta["scalar"]]
    assert len(sizes) == 7
    assert all(effects(n, nn.Module().get_submodule) == Effects() for n in sizes)


def test_names() -> None:
    nodes = nodes_of(Body(lambda x, y: F.relu(x).relu_() + torch.flatten(x)))
    assert [name_of(n) for n in nodes if n.op.startswith("call")] == ["relu", "relu_", "flatten", "add"]


def test_what_changes_a_shape() -> None:
    nodes = nodes_of(Body(lambda x, y: (x.unsqueeze_(0), x.squeeze_(0), x.t_, torch.add(x, 1, out=y), x.relu_())))
    assert [name_of(n) for n in nodes if reshapes(n)] == ["unsqueeze_", "squeeze_", "add"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.dropout(x, training=True, p=0.3, inplace=True),
        lambda x: F.dropout2d(x, 0.5, True),
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: F.alpha_dropout(x, 0.5, True),
        lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
        lambda x: F.rrelu(x - 0.5, training=True),
    ],
)
def test_a_dropout_is_silenced_by_its_arguments(function: Callable[..., Any]) -> None:
    made = traced(Body(lambda x, y: function(x)))
    values, last, _ = run_last(made)
    off = silenced(last)
    assert off is not None
    last.args, last.kwargs = off
    state, x = torch.get_rng_state(), values[last.all_input_nodes[0].name]
    expected = F.rrelu(x, training=False) if name_of(last) == "rrelu" else x.clone()
    assert torch.equal(run(last, values, made), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_random_operators_can_t_be_silenced() -> None:
    for function in (torch.rand_like, torch.bernoulli, F.relu, lambda x: x.bernoulli_(0.5)):
        assert silenced(nodes_of(Body(lambda x, y, f=function: f(x)))[-2]) is None
    assert silenced(nodes_of(Body(lambda x, y, m: m(x), nn.Dropout()))[-2]) is None


# ---- modules


def hooked() -> nn.Module:
    layer = nn.Conv2d(4, 4, 1)
    layer.register_forward_hook(lambda *_: None)
    return layer


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


# (module, alias, written?, random in training, random in eval, opaque)
MODULES: dict[str, tuple[Callable[[], nn.Module], Alias, bool, bool, bool, bool]] = {
    "conv": (lambda: nn.Conv2d(4, 4, 1), NEVER, False, False, False, False),
    "batch norm": (lambda: nn.BatchNorm2d(4), NEVER, False, False, False, False),
    "relu": (lambda: nn.ReLU(), NEVER, False, False, False, False),
    "relu in place": (lambda: nn.ReLU(inplace=True), SAME, True, False, False, False),
    "hardtanh in place": (lambda: nn.Hardtanh(inplace=True), SAME, True, False, False, False),
    "dropout": (lambda: nn.Dropout(), MAYBE, False, True, False, False),
    "dropout in place": (lambda: nn.Dropout2d(inplace=True), SAME, True, True, False, False),
    "rrelu": (lambda: nn.RReLU(), NEVER, False, True, False, False),
    "identity": (lambda: nn.Identity(), MAYBE, False, False, False, False),
    "flatten": (lambda: nn.Flatten(), MAYBE, False, False, False, False),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), MAYBE, False, False, False, False),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8), NEVER, False, True, False, False),
    "encoder without dropout": (lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0), NEVER, False, True, False, False),
    "hooked": (hooked, MAYBE, True, True, True, True),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), MAYBE, True, True, True, True),
    "custom": (Custom, MAYBE, True, True, True, True),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_modules(name: str, training: bool) -> None:
    make, alias, written, random, random_in_eval, opaque = MODULES[name]
    net = Body(lambda x, y, m: m(x[0, 0] if "encoder" in name else x), make())
    node = nodes_of(net, training)[-2]
    assert node.op == "call_module"
    does = effects(node, net.get_submodule)
    assert does.alias is alias
    assert [n.name for n in does.writes] == (["x"] if written else [])
    assert does.random is (random if training else random_in_eval)
    assert does.opaque is opaque


# ---- memory


def memory_of(function: Callable[..., Any], *modules: nn.Module) -> tuple[Memory, dict[str, Node]]:
    net = Body(function, *modules)
    made = traced(net)
    return Memory(made.graph, net.get_submodule), {n.name: n for n in made.graph.nodes}


def needs(memory: Memory, nodes: dict[str, Node], name: str) -> set[str]:
    """All that must run before a node, at any distance."""
    found: set[str] = set()
    stack = [nodes[name]]
    while stack:
        for n in memory.depends[stack.pop()]:
            if n.name not in found:
                found.add(n.name)
                stack.append(n)
    return found


def test_a_reader_after_a_write_sees_it() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        a = x + 1
        a.relu_()
        return a * 2

    memory, nodes = memory_of(function)
    assert needs(memory, nodes, "mul") == {"x", "add", "relu_"}


def test_a_write_waits_for_the_readers_before_it() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        a = x + 1
        b = a * 2
        a.zero_()
        return a, b

    memory, nodes = memory_of(function)
    assert "mul" in needs(memory, nodes, "zero_")
    assert "zero_" not in needs(memory, nodes, "mul")


@pytest.mark.parametrize(
    "look",
    [
        lambda a: a.view(-1),
        lambda a: a[:, 1:].transpose(1, 2).unsqueeze(0),
        lambda a: a.chunk(2, 1)[1],
        lambda a: a.detach(),
        lambda a: a.reshape(-1),
        lambda a: a.unbind(0)[0][1],
        lambda a: F.dropout(a, 0.5, False),
        lambda a: a.data.T if a.data is None else a.data,
    ],
)
def test_writes_reach_through_views_both_ways(look: Callable[[Tensor], Tensor]) -> None:
    def through(x: Tensor, y: Tensor) -> Tensor:
        a = x + 1
        look(a).mul_(2)
        return a - 1

    def below(x: Tensor, y: Tensor) -> Tensor:
        a = x + 1
        v = look(a)
        a.mul_(2)
        return v - 1

    def beside(x: Tensor, y: Tensor) -> Tensor:
        a = x + 1
        v = look(a)
        a[0].mul_(2)
        return v - 1

    for function in (through, below, beside):
        memory, nodes = memory_of(function)
        assert "mul_" in needs(memory, nodes, "sub")
        assert memory.class_of(nodes["mul_"]) is memory.class_of(nodes["add"])


def test_separate_tensors_stay_separate() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        a, b = x + 1, y + 1
        c = a.clone()
        a.zero_()
        return b - 1, c * 2

    memory, nodes = memory_of(function)
    assert "zero_" not in needs(memory, nodes, "sub") | needs(memory, nodes, "mul")
    assert len({memory.class_of(nodes[n]) for n in ("add", "add_1", "clone")}) == 3


def test_items_and_outs_are_writes() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        a, b = torch.empty_like(x), torch.empty_like(x)
        a[0] = y[0]
        torch.add(a, 1, out=b)
        return b * 2

    memory, nodes = memory_of(function)
    assert {"setitem", "add"} <= needs(memory, nodes, "mul")


def test_an_opaque_module_orders_everything_around_it() -> None:
    def function(x: Tensor, y: Tensor, custom: nn.Module) -> Any:
        a = x + 1
        before = a * 2
        b = custom(a)
        return before, a - 1, b

    memory, nodes = memory_of(function, Custom())
    assert "parts_0" in needs(memory, nodes, "sub")
    assert "mul" in needs(memory, nodes, "parts_0")
    assert memory.class_of(nodes["parts_0"]) is memory.class_of(nodes["add"])


def test_a_batch_norm_in_training_writes_the_statistics_that_others_read() -> None:
    def function(x: Tensor, y: Tensor, norm: nn.BatchNorm2d) -> Any:
        before = norm.running_mean * 2  # type: ignore[operator]
        z = norm(x)
        return z, before, norm.running_mean - 1  # type: ignore[operator]

    memory, nodes = memory_of(function, nn.BatchNorm2d(4))
    assert "mul" in needs(memory, nodes, "parts_0")
    assert "parts_0" in needs(memory, nodes, "sub")
    net = Body(function, nn.BatchNorm2d(4))
    made = traced(net, training=False)
    still = Memory(made.graph, net.get_submodule)
    assert "parts_0" not in needs(still, {n.name: n for n in made.graph.nodes}, "sub")


def test_depends_holds_the_inputs() -> None:
    memory, nodes = memory_of(lambda x, y: (x + y) * x)
    assert all(set(n.all_input_nodes) <= memory.depends[n] for n in nodes.values())
