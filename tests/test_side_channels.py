"""What a forward leaves in containers and objects, and draws from generators of its own: a trace does neither."""

import argparse
import copy
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from parity import compare, freezable, freeze_by_hand, settle
from split_cases import C, D, Net, conv, image
from torch import Tensor, nn
from torch.fx import Proxy

from fxfreeze.inputs import TraceRefusal
from fxfreeze.kept import ModuleState
from fxfreeze.randomness import RandomState, random_state_kept


class Context:
    """A user's own object."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Block(nn.Module):
    """A convolution, after which ``leave(self, y)`` does what it likes with what the block holds."""

    def __init__(self, leave: Callable[[Any, Tensor], Any], **holds: Any) -> None:
        super().__init__()
        self.conv, self.leave = conv(), leave
        vars(self).update(holds)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        given = self.leave(self, y)
        return y if given is None else given


def straight(self: Any, x: Tensor) -> Tensor:
    return self.head(self.c(self.b(self.m(self.a(x)))))  # type: ignore[no-any-return]


class OfTheClass(Block):
    shared: dict[str, Any] = {}  # noqa: RUF012


def swap(self: Any, y: Tensor) -> None:
    del self.store[next(iter(self.store))]
    self.store[len(self.store)] = y.detach()


def nothing(self: Any, y: Tensor) -> None:
    pass


# What is assigned, by the name that a refusal gives it; how; what the block holds.
WRITES: dict[str, tuple[str, Callable[[Any, Tensor], Any], dict[str, Any]]] = {
    "dict": ("store", lambda m, y: m.store.update(f=y.detach()), {"store": {}}),
    "dict, replaced": ("store", lambda m, y: m.store.update(f=y.detach()), {"store": {"f": 0}}),
    "dict, other keys": ("store", swap, {"store": {0: 0, 2: 1}}),
    "ordered": ("store", lambda m, y: m.store.move_to_end("a"), {"store": OrderedDict(a=1, b=2)}),
    "default": ("store", lambda m, y: m.store["n"].append(y.detach()), {"store": defaultdict(list)}),
    "list": ("h", lambda m, y: m.h.append(y.detach()), {"h": []}),
    "list item": ("h", lambda m, y: m.h.__setitem__(0, y.detach()), {"h": [None]}),
    "set": ("seen", lambda m, y: m.seen.add(y.detach()), {"seen": set()}),
    "set, filled": ("seen", lambda m, y: m.seen.add(y.detach()), {"seen": {1}}),
    "deque": ("last", lambda m, y: m.last.append(y.detach()), {"last": deque([1, 2], maxlen=2)}),
    "in a tuple": ("pair", lambda m, y: m.pair[1].append(y.detach()), {"pair": (1, [])}),
    "nested": ("store", lambda m, y: m.store["a"]["b"].append(y.detach()), {"store": {"a": {"b": []}}}),
    "object": ("ctx.aux", lambda m, y: setattr(m.ctx, "aux", y.detach()), {"ctx": Context(aux=0)}),
    "object, new": ("ctx.aux", lambda m, y: setattr(m.ctx, "aux", y.detach()), {"ctx": Context()}),
    "its dict": ("ctx.d", lambda m, y: m.ctx.d.update(f=y.detach()), {"ctx": Context(d={})}),
    "its object": ("ctx.c.aux", lambda m, y: setattr(m.ctx.c, "aux", y.detach()), {"ctx": Context(c=Context(aux=0))}),
    "namespace": ("ctx.aux", lambda m, y: setattr(m.ctx, "aux", y.detach()), {"ctx": types.SimpleNamespace(aux=0)}),
    "arguments": ("ctx.aux", lambda m, y: setattr(m.ctx, "aux", y.detach()), {"ctx": argparse.Namespace(aux=0)}),
    "bound": ("keep", lambda m, y: m.keep(y.detach()), {"keep": [].append}),
}


def holdings(net: nn.Module) -> list[Any]:
    """Everything that the blocks hold, in plain containers, to compare."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, plain(v)) for key, v in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return [plain(v) for v in value]
        if isinstance(value, set):
            return sorted((plain(v) for v in value), key=str)
        if hasattr(value, "__dict__") and not isinstance(value, (Tensor, Proxy, type(nothing))):
            return plain(vars(value))
        return (
            plain(value.__self__) if callable(getattr(value, "append", value)) and hasattr(value, "__self__") else value
        )

    internal = vars(nn.Module())
    blocks = [m for m in net.modules() if isinstance(m, Block)]
    return [plain({k: v for k, v in vars(m).items() if k not in internal and k != "leave"}) for m in blocks]


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    assert [type(v) for v in ours] == [type(v) for v in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b) if isinstance(a, Tensor) else None
        assert isinstance(a, Tensor) or a == b


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.filterwarnings("ignore:frozen module 'm' runs as it is")
def test_what_a_block_leaves_behind_is_what_the_original_leaves(case: str, depth: int) -> None:
    _, leave, holds = WRITES[case]
    net = settle(Net(straight, m=Block(leave, **copy.deepcopy(holds))))
    if case == "bound":
        net.m.keep = [].append
    model = freezable(net)
    assert_same(holdings(net), holdings(Net(straight, m=Block(leave, **holds))))
    reference = copy.deepcopy(net)
    if case == "bound":
        reference.m.keep = [].append  # a builtin's copy is itself
    model.freeze(depth)
    freeze_by_hand(reference, model.units[:depth])
    for call in range(3):
        compare(model, reference, (image(2),), call, f"{case}, call {call}")
        assert_same(holdings(net), holdings(reference))
    copy.deepcopy(model)


@pytest.mark.parametrize("case", WRITES)
def test_a_root_that_leaves_something_behind_is_refused_by_name(case: str) -> None:
    name, leave, holds = WRITES[case]
    holds = copy.deepcopy(holds)
    if case == "bound":
        holds = {"keep": [].append}

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        leave(self, x)
        return self.head(self.c(self.b(x)))

    net = Net(forward)
    vars(net).update(holds)
    identities = {key: id(value) for key, value in holds.items()}
    with pytest.raises(TraceRefusal, match=f"Net.forward assigns self.{name}, which a traced graph can't do"):
        freezable(net)
    assert {key: id(vars(net)[key]) for key in holds} == identities
    copy.deepcopy(net)


def test_what_changed_is_named() -> None:
    for name, leave, holds in WRITES.values():
        state = ModuleState([("m", block := Block(leave, **copy.deepcopy(holds)))])
        leave(block, torch.ones(2))
        assert state.restore() == f"m.{name}"
        assert state.restore() is None


def test_contents_are_put_back_in_place_and_in_order() -> None:
    inner: dict[str, Any] = {"z": 1, "a": 2}
    held = {"d": inner, "o": OrderedDict(b=1, a=2), "l": [3, 1, 2], "q": deque([1, 2, 3], 3), "c": Context(x=1, y=2)}
    block = Block(nothing, held=held, s={1, 2})
    state = ModuleState([("", block)])
    inner.pop("z")
    inner["z"] = 1
    held["o"].move_to_end("b")
    held["l"].sort()
    held["q"].append(4)
    block.s.clear()
    del held["c"].x
    held["c"].x = 1
    held["new"] = 1
    attributes = list(vars(block))
    del block.conv.training
    block.conv.training = True
    assert state.restore() is not None
    assert list(inner.items()) == [("z", 1), ("a", 2)]
    assert list(held["o"].items()) == [("b", 1), ("a", 2)]
    assert list(reversed(held["o"])) == ["a", "b"]
    assert held["l"] == [3, 1, 2]
    assert held["q"] == deque([1, 2, 3], 3)
    assert block.s == {1, 2}
    assert list(vars(held["c"])) == ["x", "y"]
    assert list(held) == ["d", "o", "l", "q", "c"]
    assert list(vars(block)) == attributes


def test_equal_is_not_the_same() -> None:
    block = Block(nothing, store={"f": torch.ones(2)}, n=[1.5])
    state = ModuleState([("", block)])
    kept = block.store["f"]
    block.store["f"] = torch.ones(2)
    assert state.restore() == "store"
    assert block.store["f"] is kept


def test_a_class_s_container_is_kept() -> None:
    freezable(Net(straight, m=OfTheClass(lambda m, y: m.shared.update(f=y))))
    assert OfTheClass.shared == {}
    with pytest.raises(TraceRefusal, match=r"m assigns self.shared, which b holds too"):
        freezable(Net(straight, m=OfTheClass(lambda m, y: m.shared.update(f=y)), b=OfTheClass(nothing)))
    assert OfTheClass.shared == {}


def test_hooks_that_a_forward_installs_are_taken_off() -> None:
    def install(self: Any, y: Tensor) -> None:
        self.conv.register_forward_hook(nothing)

    net = Net(straight, m=Block(install))
    with pytest.raises(TraceRefusal, match=r"Net.forward assigns self.m.conv._forward_hooks"):
        freezable(net)
    assert not net.m.conv._forward_hooks


# ---- what several modules hold


def test_what_another_module_reads_is_left_by_neither() -> None:
    def net(where: Callable[[Any, Any], dict[str, Any]]) -> Net:
        ctx = Context(aux=torch.tensor(1.0, dtype=D))
        writer = Block(lambda m, y: setattr(m.ctx, "aux", y.detach().mean()), ctx=ctx)
        reader = Block(lambda m, y: y * m.ctx.aux, ctx=ctx)
        return settle(Net(straight, **where(writer, reader)))  # type: ignore[return-value]

    apart = net(lambda w, r: {"m": w, "b": r})
    with pytest.raises(TraceRefusal, match=r"m assigns self.ctx.aux, which b holds too"):
        freezable(apart)
    assert float(apart.m.ctx.aux) == 1
    together = net(lambda w, r: {"m": nn.Sequential(w, r)})
    model, reference = freezable(together), copy.deepcopy(together)
    model.freeze(1)
    freeze_by_hand(reference, model.units[:1])
    for call in range(3):
        compare(model, reference, (image(2 + call),), call, "together")
        torch.testing.assert_close(together.m[0].ctx.aux, reference.m[0].ctx.aux)


def test_what_the_network_itself_holds_is_left_to_no_submodule() -> None:
    losses: list[Tensor] = []
    net = Net(lambda self, x: straight(self, x) * sum(self.losses), m=Block(lambda m, y: m.losses.append(y.mean())))
    net.losses = net.m.losses = losses
    with pytest.raises(TraceRefusal, match=r"m assigns self.losses, which the network itself holds too"):
        freezable(net)
    assert losses == []


# ---- generators


class Holder(Context):
    def __deepcopy__(self, memo: dict[int, Any]) -> "Holder":  # torch's generators have no deepcopy
        return Holder(**{key: _copied(value) for key, value in vars(self).items()})


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return copy.deepcopy(value)


def torch_generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], Any]]] = {
    "torch": (torch_generator, lambda g: torch.rand((), generator=g).item(), lambda g: g.get_state().tolist()),
    "random": (lambda: random.Random(7), lambda g: g.random(), lambda g: g.getstate()),
    "numpy": (lambda: np.random.default_rng(7), lambda g: g.random(), lambda g: g.bit_generator.state),
    "numpy, older": (lambda: np.random.RandomState(7), lambda g: g.rand(), lambda g: str(g.get_state())),
    "numpy, raw": (lambda: np.random.PCG64(7), lambda g: g.random_raw() / 2**64, lambda g: g.state),
    "mersenne": (lambda: np.random.Generator(np.random.MT19937(7)), lambda g: g.random(), lambda g: str(g.bit_generator.state)),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATORS)
@pytest.mark.parametrize("used", ["branch", "number", "tensor"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.filterwarnings("ignore:frozen module 'm' runs as it is")
def test_a_block_draws_from_its_own_generator_at_every_call(case: str, used: str, depth: int) -> None:
    make, draw, state = GENERATORS[case]

    def leave(self: Any, y: Tensor) -> Tensor:
        number = draw(self.rng.g)
        if used == "branch":
            return y if number < 0.5 else -y
        return y * number if used == "number" else y + torch.full((C, 1, 1), number, dtype=D)

    net = settle(Net(straight, m=Block(leave, rng=Holder(g=make()))))
    fresh = state(make())
    model = freezable(net)
    assert state(net.m.rng.g) == fresh
    model.freeze(depth)
    assert state(net.m.rng.g) == fresh
    reference = copy.deepcopy(net)
    freeze_by_hand(reference, model.units[:depth])
    for call in range(6):
        compare(model, reference, (image(2),), call, f"{case}, call {call}")
        assert state(net.m.rng.g) == state(reference.m.rng.g)
    assert state(net.m.rng.g) != fresh
    copy.deepcopy(model)


@pytest.mark.parametrize("case", GENERATORS)
@pytest.mark.parametrize("place", ["attribute", "list", "object", "bound"])
def test_a_root_that_draws_from_its_own_generator_is_refused(case: str, place: str) -> None:
    make, draw, state = GENERATORS[case]
    g = make()
    held = {"attribute": g, "list": [[g]], "object": Context(inner={"g": g}), "bound": types.MethodType(draw, g)}[place]

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.c(self.b(x if draw(g) < 0.5 else -x)))

    net = Net(forward)
    net.held = held
    fresh = state(g)
    with pytest.raises(TraceRefusal, match="draws random numbers that Python sees"):
        freezable(net)
    assert state(g) == fresh


def test_a_generator_s_state_is_kept() -> None:
    for make, draw, state in GENERATORS.values():
        block = Block(nothing, g=make())
        fresh = state(block.g)
        snapshot = RandomState([block])
        assert snapshot.unchanged()
        first = draw(block.g)
        assert not snapshot.unchanged()
        snapshot.restore()
        assert snapshot.unchanged()
        with random_state_kept([block]):
            assert draw(block.g) == first
        assert state(block.g) == fresh


def test_a_generator_without_a_state_is_left_alone() -> None:
    block = Block(nothing, g=random.SystemRandom())
    with random_state_kept([block]) as state:
        block.g.random()
        assert state.unchanged()
