"""The ops as PyTorch sees them: schemas, fake tensors, ``torch.compile``, ``torch.fx``. By whatever runs the ops here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from samples import NAMES, images, sample, without_out
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxfreeze.kernels import conv1x1, conv3x3, depthwise, layernorm, linear, pack, pointwise

_each = pytest.mark.parametrize("name", NAMES)


class _Recorded(TorchDispatchMode):
    """The calls of ops, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fxfreeze":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _op(call: Callable[[], Tensor]) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The one op that ``call`` calls, with its arguments."""
    with _Recorded() as recorded:
        call()
    [only] = recorded.calls
    return only


@_each
def test_opcheck(name: str) -> None:
    """Its schema says what is written to, its fake stands for it, it survives tracing with static and symbolic sizes."""
    op, arguments = _op(sample(name))
    done = torch.library.opcheck(op, arguments)
    assert set(done.values()) == {"SUCCESS"}
    assert len(done) == 4


@pytest.mark.parametrize("name", ["conv1x1", "conv3x3", "rolling3x3"])
def test_opcheck_where_the_residual_is_the_output(name: str) -> None:
    call = sample(name)
    op, arguments = _op(call)
    [place] = [i for i, argument in enumerate(arguments) if argument is call.keywords["residual"]]
    done = torch.library.opcheck(op, (*arguments[:place], arguments[-1], *arguments[place + 1 :]))
    assert set(done.values()) == {"SUCCESS"}


@_each
def test_only_out_is_written_to(name: str) -> None:
    op, _ = _op(sample(name))
    assert [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write] == ["out"]
    assert not op._schema.returns


@_each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fake_tensors_have_the_shapes_of_real_ones(name: str, dtype: torch.dtype) -> None:
    real = without_out(sample(name, dtype=dtype))()
    with FakeTensorMode():
        fake = without_out(sample(name, dtype=dtype))()
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@_each
def test_an_output_made_for_it_is_like_one_given(name: str) -> None:
    call = sample(name)
    assert call() is call.keywords["out"]
    made = without_out(call)()
    assert torch.equal(made, call.keywords["out"])


def _doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda **given: function(**given) * 2


@_each
@pytest.mark.parametrize("given", [True, False], ids=["into", "makes"])
def test_compiles_without_a_graph_break(name: str, given: bool) -> None:
    call = sample(name) if given else without_out(sample(name))
    expected = call() * 2
    torch._dynamo.reset()
    compiled = torch.compile(_doubled(call.func), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**call.keywords), expected)


def test_a_dense_block_compiles() -> None:
    """Slices of one buffer, read and written in turn, a residual that is its output, sizes that then change."""
    weights = torch.randn(6, 10, 1, 1), pack(torch.randn(4, 6, 3, 3)), pack(torch.randn(14, 14, 3, 3))

    def block(x: Tensor) -> Tensor:
        buffer = torch.empty(x.shape[0], 14, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        pointwise(x, out=buffer[:, :10])
        conv3x3(conv1x1(buffer[:, :10], weights[0], activation="relu"), weights[1], out=buffer[:, 10:])
        total = buffer.clone()
        conv3x3(buffer, weights[2], residual=total, activation="relu", out=total)
        return total

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3):
        x = images(n, 10, 5, 4)
        torch.testing.assert_close(compiled(x), block(x))


class _Network(nn.Module):
    """Every op once."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"one": (6, 10), "three": (10, 6, 3, 3), "each": (10, 1, 5, 5), "head": (7, 10), "scale": (10,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        y = conv1x1(x, self.one, scale=self.scale, prologue="relu", stride=2)
        y = conv3x3(y, self.three, activation="silu")
        y = depthwise(y, self.each, padding=2)
        y = pointwise(y, shift=self.scale, pool="global")
        return linear(layernorm(y.flatten(1)), self.head, activation="gelu")


def test_fx_records_each_function_as_one_node() -> None:
    functions = (conv1x1, conv3x3, depthwise, pointwise, layernorm, linear)
    network, x = _Network(), images(2, 10, 8, 8)
    graph = torch.fx.Tracer(autowrap_functions=functions).trace(network)
    assert tuple(node.target for node in graph.nodes if node.op == "call_function") == functions
    recorded = torch.fx.GraphModule(network, graph)
    assert torch.equal(recorded(x), network(x))
    assert "conv1x1(x, one, scale = scale, prologue = 'relu', stride = 2)" in recorded.code
