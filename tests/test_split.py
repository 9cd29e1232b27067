"""The cut at every depth: what crosses, what stays live, and that neither side disturbs the other.

Every case runs at every depth, in train and in eval mode, against the original with its frozen units in eval: outputs,
gradients, buffers, random numbers, and that boundary tensors and the caller's inputs are not written into.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, assert_segments_chain, boundaries, compare, freezable, freeze_by_hand, settle
from split_cases import CASES, Always, C, D, Net, asserted, constant_filled, conv, image, noise, unused
from torch import Tensor, nn

from fxfreeze import FreezableModel
from fxfreeze.inputs import flatten_inputs
from fxfreeze.split import Split, between, split
from fxfreeze.trace import trace


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:unit .* holds:UserWarning")
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
def test_every_depth(name: str) -> None:
    case = CASES[name]
    net = settle(Net(case.function, **case.parts()))
    model = assert_parity(net, case.calls())
    assert len(model.units) == case.units


# ---- from one boundary to the next


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:unit .* holds:UserWarning")
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")
def test_a_deeper_boundary_is_made_from_a_shallower_one(name: str, training: bool) -> None:
    """Bit for bit the one that the whole prefix makes; the shallower one is not written into."""
    case = CASES[name]
    net = settle(Net(case.function, **case.parts()))
    model = freezable(net)
    tried = assert_segments_chain(model, case.calls()[0], training)
    assert tried or case.units <= 2


def entangled_deeper(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    k = self.b(h)
    either = torch.broadcast_tensors(h, k)[0]  # may be a view of both
    z = self.c(k)
    either.mul_(z.detach().mean())
    return self.head(z + h + k)


def test_a_deeper_cut_that_freezes_less_is_made_from_the_inputs() -> None:
    """Behind the second block a value is written into that may be a view of the first one's: both stay live."""
    net = settle(Net(entangled_deeper))
    model = freezable(net)
    model.freeze(2)
    inputs, tensors = flatten_inputs(net, (image(),), {})
    traced = trace(net, inputs, tensors)
    assert split(net, traced, model._ownership, 1).kept_live == ()
    assert split(net, traced, model._ownership, 2).kept_live
    assert between(net, traced, model._ownership, 1, 2) is None
    assert_parity(net, [(image(),), (image(2),)])


# ---- what crosses


def cut(function: Callable[..., Any], depth: int, training: bool = True, **parts: Any) -> Split:
    net = settle(Net(function, **parts))
    model = freezable(net)
    model.freeze(depth)
    net.train(training)
    model.train(training)
    return split(net, trace(net, flatten_inputs(net, (image(),), {})[0]), model._ownership, depth)


def names_of_one(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    first = h.relu_()
    second = first.add_(1)
    return self.head(self.c(self.b(h)) + self.b(first) + self.b(second))


def owner_of_siblings(self: Net, x: Tensor) -> Tensor:
    p, q = self.a(x).split([2, 2], 1)
    self.b(torch.cat([p, q], 1))
    p.mul_(self.fc.weight.detach().sum())
    return self.head(self.c(self.b(torch.cat([q, p], 1))))


def sizes_of_what_crosses(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    n, channels = h.shape[0], h.shape[1] * 2
    return self.head(self.c(self.b(h)).view(n, channels // 2, 6, 6))


def sizes_of_the_input(self: Net, x: Tensor) -> Tensor:
    n = x.shape[0]
    return self.head(self.c(self.b(self.a(x))).view(n, C, 6, 6))


def numbers_read_first(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    v = h[0, 0, 0, 0].item()
    h.mul_(3)
    return self.head(self.c(self.b(h)).mul(v))


def constant(self: Net, x: Tensor) -> Tensor:
    o = torch.ones(C, 1, 1, dtype=D) * self.fc.weight.sum().detach()
    return self.head(self.c(self.b(self.a(x))) * o)


def buffer(self: Net, x: Tensor) -> Tensor:
    return self.head(self.c(self.b(self.a(x))) * self.a[1].running_var.sum())


CROSSING: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "one name of a tensor written in place": (names_of_one, {"add_"}),
    "the owner of views of which one is written": (owner_of_siblings, {"a_1", "cat"}),
    "sizes are read again": (sizes_of_what_crosses, {"a_1"}),
    "sizes of what does not cross": (sizes_of_the_input, {"a_1", "getitem"}),
    "numbers read before a write": (numbers_read_first, {"a_1", "item"}),
    "a constant is made again": (constant, {"a_1"}),
    "a constant written before the cut": (constant_filled, {"a_1", "clone"}),
    "buffers are read again": (buffer, {"a_1"}),
}


@pytest.mark.parametrize("name", CROSSING)
def test_what_crosses(name: str) -> None:
    function, expected = CROSSING[name]
    assert set(cut(function, 1).boundary) == expected


def test_views_that_nobody_writes_cross_as_they_are() -> None:
    def function(self: Net, x: Tensor) -> Tensor:
        p, q = self.a(x).chunk(2, 1)
        return self.head(self.c(self.b(torch.cat([p, q], 1)) + torch.cat([q, p], 1)))

    assert len(cut(function, 1).boundary) == 2


def test_the_boundary_is_that_of_the_mode() -> None:
    def function(self: Net, x: Tensor) -> Any:
        h = self.a(x)
        z = self.b(h)
        return (self.head(self.c(z)), self.head(h)) if self.training else self.head(self.c(z))

    assert cut(function, 2, training=True).boundary == ("b_1", "mean_1")
    assert cut(function, 2, training=False).boundary == ("b_1",)


def test_the_prefix_computes_nothing_that_is_not_needed() -> None:
    made = cut(unused, 2, u=conv(), w=conv())
    called = [str(n.target) for n in made.prefix.graph.nodes if n.op == "call_module"]
    assert called == ["root.a.0", "root.a.1", "root.b.0", "root.b.1"]
    assert all(n.op != "call_function" for n in made.prefix.graph.nodes)


def test_gradient_stops_are_not_carried_into_the_prefix() -> None:
    def function(self: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
        return self.head(self.c(self.b(h)))

    prefix = cut(function, 1).prefix
    assert [n.op for n in prefix.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


def test_assertions_of_the_prefix_still_hold() -> None:
    net = settle(Net(asserted))
    model = freezable(net)
    model.freeze(3)
    model(image())
    with pytest.raises(AssertionError, match="three channels"):
        model(image()[:, :2])


@torch.fx.wrap
def product_of(x: Tensor, y: Tensor) -> Tensor:
    return x.mul_(2) * y


def test_values_that_only_the_suffix_joins_are_not_entangled() -> None:
    """A function that can't be seen into may make two values one memory, but only from there on."""

    def function(self: Net, x: Tensor) -> Tensor:
        h, k = self.a(x), self.d(x)
        return self.head(self.c(self.b(product_of(h, k)) + h + k))

    made = cut(function, 2, d=conv(3))
    assert made.kept_live == ()
    assert set(made.boundary) == {"a_1", "d_1"}
    assert_parity(settle(Net(function, d=conv(3))), [(image(),)])


# ---- what stays live, and why


def entangled(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    flat = h.flatten(1)  # a view here, a copy elsewhere: it can't be made again from a clone of h
    z = self.b(h + 1)
    flat.mul_(z.detach().mean())
    return self.head(self.c(z) + h)


def test_memory_that_can_t_be_made_again_is_not_split() -> None:
    made = cut(entangled, 1)
    assert any(note.endswith("shares memory with what the suffix writes") for note in made.kept_live)
    assert "a_1" not in made.boundary
    called = [str(n.target) for n in made.suffix.graph.nodes if n.op == "call_module"]
    assert "root.a.1" in called
    assert_parity(settle(Net(entangled)), [(image(),), (image(2),)])


def test_random_operators_outside_modules_stay_live() -> None:
    """Noise can't be turned off: it, and what reads it, run live although frozen."""
    made = cut(noise, 3)
    assert [n.target for n in made.suffix.graph.nodes if n.op == "call_function"].count(torch.randn_like) == 1
    assert made.boundary == ("a_1",)


def test_the_order_of_random_numbers_keeps_an_operator_live() -> None:
    parts = {"p": Always(), "q": Always(), "r": Always()}

    def function(self: Net, x: Tensor) -> Tensor:
        h = self.a(x)
        q = F.dropout(self.b(h), 0.5)  # live at depth 2, and draws before the frozen p does
        return self.head(self.p.conv[0](self.p(h)) + self.c(q))

    net = settle(Net(function, **parts))
    model = freezable(net, units=["a", "p", "b", "c", "fc"])
    order = [unit.name for unit in model.units]
    assert order == ["a", "b", "p", "c", "fc"]
    assert_parity(net, [(image(),), (image(2),)], depths=(1, 2, 3), units=order)


# ---- dropout between units


class Loose(nn.Module):
    """Functional dropout at the root, between blocks."""

    def __init__(self, drop: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.drop = drop
        self.a, self.b, self.fc = conv(3), conv(), nn.Linear(C, 3, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.a(x), self.training)
        x = self.drop(self.b(x), self.training)
        return self.fc(x.mean((2, 3)))


DROPS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "dropout": lambda x, training: F.dropout(x, 0.5, training),
    "keywords": lambda x, training: F.dropout(x, training=training, p=0.5),
    "in place": lambda x, training: F.dropout(x, 0.5, training, inplace=True),
    "dropout2d": lambda x, training: F.dropout2d(x, 0.5, training),
    "alpha": lambda x, training: F.alpha_dropout(x, 0.5, training),
    "torch": lambda x, training: torch.dropout(x, 0.5, training),
    "always": lambda x, training: F.dropout(x, 0.5),
}


def drawn(model: FreezableModel) -> bool:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model(image())
    return not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", DROPS)
def test_dropout_between_units_is_off_once_its_consumer_froze(name: str) -> None:
    net = settle(Loose(DROPS[name]))
    model = freezable(net)
    model.freeze(1)
    reference = settle(Loose(DROPS[name]))
    reference.load_state_dict(net.state_dict())
    freeze_by_hand(reference, model.units[:1])
    compare(model, reference, (image(),), 0, "consumer live")  # both draw
    assert drawn(model)

    model.freeze(2)
    off = settle(Loose(DROPS[name]))  # the first is off, the second, which the head reads, is on
    off.load_state_dict(net.state_dict())
    freeze_by_hand(off, model.units[:2])
    seen = iter((False, True))
    off.drop = lambda x, training: (
        DROPS["dropout"](x, next(seen)) if name in ("always", "torch") else DROPS[name](x, next(seen))
    )
    compare(model, off, (image(),), 0, "consumer frozen")
    with boundaries() as crossed:
        assert drawn(model)
    assert len(crossed) == 1


def test_a_frozen_block_s_own_dropout_draws_nothing() -> None:
    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.drop = conv(channels), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.drop(self.conv(x)), 0.3, self.training)

    net = settle(nn.Sequential(Block(3), Block(C), nn.Flatten(), nn.Linear(C * 36, 3)))
    model = freezable(net)
    model.freeze(1)
    assert drawn(model)
    model.freeze(2)
    assert not drawn(model)
    assert_parity(net, [(image(),)])


# ---- inputs that are one memory


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def overwrites(self: Net, x: Tensor, y: Tensor) -> Tensor:
    h = self.a(x)
    x.mul_(2)
    return self.head(self.c(self.b(h + y.mean())))


def reads_only(self: Net, x: Tensor, y: Tensor) -> Tensor:
    return self.head(self.c(self.b(self.a(x) + self.a(y))))


def test_one_tensor_as_two_inputs() -> None:
    x = image()
    assert_parity(settle(TwoInputs(reads_only)), [(x, x), (x, image(3)), (x[:2], x[1:])])


@pytest.mark.parametrize("share", [lambda x: (x, x), lambda x: (x[:2], x[1:]), lambda x: (x, x.detach())])
def test_writes_into_inputs_that_share_memory_run_the_original(
    share: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    net = settle(TwoInputs(overwrites))
    model = freezable(net)
    model.freeze(2)
    reference = settle(TwoInputs(overwrites))
    reference.load_state_dict(net.state_dict())
    freeze_by_hand(reference, model.units[:2])
    message = (
        "this call runs the original, .*: forward writes into input 'x', which shares its memory with another input"
    )
    with pytest.warns(UserWarning, match=message):
        ours = model(*share(image()))
    torch.testing.assert_close(ours, reference(*share(image())))
    compare(model, reference, (image(3), image(4)[:3]), 0, "apart")  # inputs of their own are cut as ever


def test_a_slice_of_a_container_is_traced_through() -> None:
    net = settle(Net(lambda self, x: self.head(self.c[1:](self.c[:1](self.b(self.a(x)))))))
    assert_parity(net, [(image(),)])
