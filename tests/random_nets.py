"""Random networks, drawn by hypothesis and written out as Python source, so that a failing one can be read and run.

A network is a few blocks (an atom each) that the root joins with loose layers, concatenations, views and writes. All
values are (N, C, H, W) of dtype D with C <= 8 and H, W <= 6. Whether a write spoils what autograd saved is mostly
avoided, not always: the caller skips networks that the original itself can't run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["networks"]

SIZE = 6


@torch.fx.wrap
def opaque_scale(x: Tensor, y: Tensor) -> Tensor:
    """A function that a trace can't see into: writes into its first input and returns it."""
    return x.mul_(0.9).add_(y.mean())


@dataclass(frozen=True)
class Value:
    """A variable of the source; memory: names of one memory share it."""

    name: str
    channels: int
    height: int
    width: int
    memory: int

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


@dataclass
class Forward:
    """The source of one module: what its __init__ makes and its forward does.

    saved: memory that autograd may have saved, which must not be written into (while it needs a gradient).
    """

    draw: Callable[[st.SearchStrategy[Any]], Any]
    in_block: bool
    made: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    saved: set[int] = field(default_factory=set)
    count: int = 0

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def any_value(self) -> Value:
        recent = self.values[:-5:-1]
        return self.draw(st.sampled_from([recent[0], recent[0], *recent]))

    def new(self, shape: tuple[int, int, int], memory: int | None = None) -> Value:
        self.count += 1
        value = Value(f"v{self.count}", *shape, self.count if memory is None else memory)
        self.values.append(value)
        return value

    def module(self, source: str) -> str:
        name = f"m{len(self.made)}"
        self.made.append(f"self.{name} = {source}")
        return f"self.{name}"

    def let(self, shape: tuple[int, int, int], source: str, memory: int | None = None) -> Value:
        value = self.new(shape, memory)
        self.lines.append(f"{value} = {source}")
        return value

    def save(self, *values: Value) -> None:
        self.saved |= {v.memory for v in values}

    def may_write(self, value: Value) -> bool:
        return value.memory not in self.saved or self.pick(False, False, False, True)


# ---- operators: each adds a line or a few


def convolution(f: Forward) -> None:
    x = f.any_value()
    out, groups = f.pick(2, 4, 6, 8), f.pick(1, 1, 2)
    groups = groups if x.channels % groups == 0 else 1
    kernel = f.pick(1, 3)
    stride = f.pick(1, 2) if min(x.height, x.width) >= 4 else 1
    height, width = ((n - 1) // stride + 1 for n in (x.height, x.width))
    bias = f.pick(True, False)
    layer = f.module(
        f"nn.Conv2d({x.channels}, {out}, {kernel}, {stride}, {kernel // 2}, groups={groups}, bias={bias}, dtype=D)"
    )
    f.save(x)
    f.let((out, height, width), f"{layer}({x})")


def transposed(f: Forward) -> None:
    x = f.any_value()
    if max(x.height, x.width) > 3:
        return
    layer = f.module(f"nn.ConvTranspose2d({x.channels}, 4, 2, 2, groups={2 if x.channels % 2 == 0 else 1}, dtype=D)")
    f.save(x)
    f.let((4, 2 * x.height, 2 * x.width), f"{layer}({x})")


def normalisation(f: Forward) -> None:
    x = f.any_value()
    options = f.pick("", "", "", ", affine=False", ", momentum=None", ", track_running_stats=False")
    f.save(x)
    f.let(x.shape, f"{f.module(f'nn.BatchNorm2d({x.channels}{options}, dtype=D)')}({x})")


def activation(f: Forward) -> None:
    x = f.any_value()
    kinds = ("torch.relu({})", "F.gelu({})", "{}.sigmoid()", "F.hardtanh({})", "nn.Softplus()({})".replace("nn", "nn"))
    y = f.let(x.shape, f.pick(*kinds[:4]).format(x))
    f.save(x, y)


def activation_in_place(f: Forward) -> None:
    x = f.any_value()
    if not f.may_write(x):
        return
    relu = f.module("nn.ReLU(inplace=True)")
    unused = ("{}.relu_()", "F.relu({}, inplace=True)", f"{relu}({{}})", "F.leaky_relu_({}, 0.1)", "torch.sigmoid_({})")
    source = f.pick(*unused).format(x)
    if f.pick(True, False):
        f.lines.append(source)
    else:
        f.let(x.shape, source, x.memory)
    f.save(x)


def pooling(f: Forward) -> None:
    x = f.any_value()
    f.save(x)
    f.let(x.shape, f"F.{f.pick('avg', 'max')}_pool2d({x}, 3, 1, 1)")


def partner(f: Forward, x: Value) -> str:
    """Something that broadcasts against ``x``."""
    same = [v for v in f.values if v.shape == x.shape]
    other = f.draw(st.sampled_from(same))
    if other is x or f.pick(False, True):
        other = f.any_value()
    return str(other) if other.shape == x.shape else f"{other}.mean((1, 2, 3), keepdim=True)"


def addition(f: Forward) -> None:
    x = f.any_value()
    f.let(x.shape, f"{x} {f.pick('+', '-')} {partner(f, x)}")


def product(f: Forward) -> None:
    x, y = f.any_value(), f.any_value()
    f.save(x, y)
    f.let(x.shape, f"{x} * {y}.mean((2, 3), keepdim=True).sigmoid()" if x.channels == y.channels else f"{x} * 0.7")


def addition_in_place(f: Forward) -> None:
    x = f.any_value()
    if f.may_write(x):
        other = partner(f, x)
        f.lines.append(f.pick(f"{x} += {other}", f"{x}.sub_({other})", f"{x}.add_({other}, alpha=0.5)", f"{x} *= 0.8"))


def concatenation(f: Forward) -> None:
    x = f.any_value()
    others = [v for v in f.values if v.shape[1:] == x.shape[1:] and v.channels + x.channels <= 8]
    if others:
        y = f.draw(st.sampled_from(others))
        f.let((x.channels + y.channels, *x.shape[1:]), f"torch.cat([{x}, {y}], 1)")


def view(f: Forward) -> None:
    x = f.any_value()
    c, h, w = x.shape
    half = max(1, c // 2)
    whole: list[tuple[tuple[int, int, int], str]] = [
        (x.shape, "{}.detach()"),
        (x.shape, "{}.view_as({})"),
        (x.shape, "{}.permute(0, 2, 3, 1).permute(0, 3, 1, 2)"),
        (x.shape, "{}.unsqueeze(1)[:, 0]"),
        (x.shape, "{}.contiguous()"),
        (x.shape, "{}.flatten(2).reshape({}.shape)"),
        (x.shape, "{}.reshape({}.shape[0], -1).unflatten(1, " + f"({c}, {h}, {w}))"),
        (x.shape, "F.dropout({}, 0.5, False)"),
        (x.shape, f"{f.module('nn.Identity()')}({{}})"),
        (x.shape, "{}.to(D)"),
        (x.shape, "{}.expand(-1, -1, -1, -1)"),
        ((c, w, h), "{}.transpose(2, 3)"),
        ((half, h, w), f"{{}}[:, :{half}]"),
        ((half, h, w), f"{{}}.narrow(1, 0, {half})"),
        ((half, h, w), f"{{}}.split({half}, 1)[0]"),
        ((1, h, w), f"{{}}.unbind(1)[{c - 1}].unsqueeze(1)"),
        ((c, (h + 1) // 2, w), "{}[:, :, ::2]"),
    ]
    shape, source = f.draw(st.sampled_from(whole))
    f.let(shape, source.format(x, x), x.memory)


def chunks(f: Forward) -> None:
    x = f.any_value()
    if x.channels % 2:
        return
    shape = (x.channels // 2, *x.shape[1:])
    a, b = f.new(shape, x.memory), f.new(shape, x.memory)
    f.lines.append(f"{a}, {b} = {x}.chunk(2, 1)")


def write(f: Forward) -> None:
    """Through an item, a slice or a view; the result goes unused."""
    x = f.any_value()
    if not f.may_write(x):
        return
    y = f.any_value()
    item = f"{y}.mean((1, 2, 3), keepdim=True)[:, 0]"
    f.lines.append(
        f.pick(
            f"{x}[:, 0] = {item}",
            f"{x}[:, -1:] *= 0.5",
            f"{x}[:, :, 0].add_(0.3)",
            f"{x}.transpose(1, 2)[:, ::2].mul_(1.2)",
            f"{x}.flatten(1)[:, ::3].sub_(0.1)",
            f"{x}.select(1, 0).zero_()",
            f"{x}[{x} > 1] = 1.0",
            f"{x}.copy_({partner(f, x)})",
            f"torch._foreach_mul_([{x}], 0.9)",
            f"opaque_scale({x}, {y})",
        )
    )


def without_gradient(f: Forward) -> None:
    x = f.any_value()
    if f.pick(True, False):
        y = f.new(x.shape)
        source = f.pick(f"{x} * 2 + 1", f"{x}.abs()", f"{x} / (1 + {x}.norm())")
        f.lines += ["with torch.no_grad():", f"    {y} = {source}"]
    elif f.may_write(x):
        f.lines += ["with torch.no_grad():", f"    {x}.clamp_(-2, 2)"]


def into_buffer(f: Forward) -> None:
    """Into memory made for it: ``out=`` and item assignment."""
    x = f.any_value()
    c, h, w = x.shape
    y = f.new(x.shape)
    if f.pick(True, False):
        f.lines += [f"{y} = torch.empty_like({x})", f"torch.add({x}.detach(), 0.5, out={y})"]
    elif f.pick(True, False):
        f.lines += [f"{y} = torch.zeros({x}.shape, dtype=D)", f"{y}[:, :1] = {x}[:, -1:]"]
    else:
        f.lines += [f"{y} = torch.ones(1, {c}, {h}, {w}, dtype=D)", f"{y}[:, 0] = {x}.detach().mean()"]
        f.lines += [f"{y} = {y} + {x}"]


def parameter(f: Forward) -> None:
    x = f.any_value()
    weight = f.module(f"nn.Parameter(torch.rand(1, {x.channels}, 1, 1, dtype=D) + 0.5)")
    f.save(x)
    f.let(x.shape, f"{x} {f.pick('*', '+')} {weight}")


def buffer(f: Forward) -> None:
    """Read, and in training updated, before or after."""
    x = f.any_value()
    name = f"b{len(f.made)}"
    f.made.append(f"self.register_buffer('{name}', torch.rand({x.channels}, dtype=D))")
    update = ["if self.training:", f"    self.{name}.mul_(0.9).add_({x}.detach().mean((0, 2, 3)), alpha=0.1)"]
    read = f"{{}} = {x} - self.{name}.view(1, -1, 1, 1)"
    y = f.new(x.shape)
    f.lines += f.pick([read.format(y)], [*update, read.format(y)], [read.format(y), *update])


def size(f: Forward) -> None:
    """Numbers read from one value and used on another."""
    x, y = f.any_value(), f.any_value()
    f.count += 1
    f.lines.append(f"n{f.count} = {f.pick(f'{y}.shape[1]', f'{y}.size(0)', f'{y}[0].numel()', f'{y}.shape[2]')}")
    f.let(x.shape, f"{x} * (1 + 1 / n{f.count})")


def dropout(f: Forward) -> None:
    x = f.any_value()
    f.save(x)
    if f.in_block and f.pick(True, False):
        f.let(
            x.shape, f.pick(f"F.dropout({x}, 0.3, self.training)", f"F.dropout2d({x}, p=0.2, training=self.training)")
        )
    else:
        f.let(x.shape, f"{f.module(f.pick('nn.Dropout(0.2)', 'nn.Dropout2d(0.3)', 'nn.AlphaDropout(0.1)'))}({x})")


def branch(f: Forward) -> None:
    """Another operator in training; inside blocks, noise."""
    x = f.any_value()
    y = f.new(x.shape)
    f.save(x)
    noise = f"{x} + 0.1 * torch.randn_like({x})" if f.in_block else f"{x}.tanh()"
    f.lines += ["if self.training:", f"    {y} = {noise}", "else:", f"    {y} = F.elu({x})"]


def dead(f: Forward) -> None:
    """Work whose result nobody reads; inside blocks, in training, random numbers too."""
    x = f.any_value()
    f.save(x)
    f.lines.append(f"F.softplus({x})")
    if f.in_block:
        f.lines += ["if self.training:", f"    torch.rand_like({x})"]


LAYERS = (convolution, convolution, normalisation, activation, activation_in_place, addition, addition_in_place, view)
RARE = (transposed, pooling, product, concatenation, chunks, write, write, dropout, without_gradient, into_buffer)
RAREST = (parameter, buffer, size, branch, dead)
OPERATORS = (*LAYERS, *LAYERS, *LAYERS, *RARE, *RARE, *RAREST)


def _class(name: str, inputs: str, f: Forward, result: str) -> str:
    made = "".join(f"\n        {line}" for line in f.made)
    body = "".join(f"\n        {line}" for line in [*f.lines, f"return {result}"])
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__(){made}\n\n"
        f"    def forward(self, {inputs}):{body}\n"
    )


def _block(draw: Any, name: str, shape: tuple[int, int, int]) -> tuple[str, tuple[int, int, int]]:
    f = Forward(draw, in_block=True)
    f.values.append(Value("x", *shape, 0))
    for operator in [convolution, *draw(st.lists(st.sampled_from(OPERATORS), min_size=1, max_size=6))]:
        operator(f)
    result = f.any_value()
    return _class(name, "x", f, str(result)), result.shape


@st.composite
def networks(draw: Any, dtype: torch.dtype = torch.float64) -> tuple[str, nn.Module]:
    """(source, a network in ``dtype`` made from it); its input is (N, 3, 6, 6), its first output (N, 2)."""
    f = Forward(draw, in_block=False)
    f.values.append(Value("x", 3, SIZE, SIZE, 0))
    blocks: list[tuple[str, tuple[int, int, int], tuple[int, int, int]]] = []
    source = ""
    for _ in range(draw(st.integers(2, 4))):
        x = f.any_value()
        reusable = [b for b in blocks if b[1] == x.shape]
        if reusable and f.pick(False, False, True):
            name, _, shape = f.draw(st.sampled_from(reusable))
        else:
            text, shape = _block(draw, f"Block{len(blocks)}", x.shape)
            source += text + "\n"
            name = f.module(f"Block{len(blocks)}()")
            blocks.append((name, x.shape, shape))
        f.save(x)
        f.let(shape, f"{name}({x})")
        for operator in draw(st.lists(st.sampled_from(OPERATORS), max_size=3)):
            operator(f)
    last = f.any_value()
    f.made.append(f"self.head = nn.Linear({last.channels}, 2, dtype=D)")
    extra = draw(st.lists(st.sampled_from(f.values), max_size=2))
    outputs = [f"self.head({last}.mean((2, 3)))", *map(str, extra)]
    source += _class("Net", "x", f, ", ".join(outputs) + ",")
    namespace = globals()  # torch.fx.wrap replaces functions in the globals that the forward sees
    namespace["D"] = dtype
    exec(source, namespace)
    torch.manual_seed(0)
    return source, namespace["Net"]()


_ = F  # used by the sources
