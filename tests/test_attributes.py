"""Numbers and flags that modules hold, which a training loop may change between calls."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import compare, freezable, freeze_by_hand, settle
from split_cases import C, Net, conv, image
from torch import Tensor, nn


class Scheduled(nn.Module):
    """Reads numbers and flags that a training loop may change."""

    rate = 0.5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels)
        self.temperature, self.on, self.weights, self.name = 1.0, True, [1.0, 2.0], "relu"
        self.act, self.nested, self.kinds, self.config = (
            F.relu,
            {"a": [1.0, (2.0,)]},
            {"add"},
            SimpleNamespace(gain=2.0),
        )
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) / self.temperature * self.weights[1] * self.rate
        x = self.act(x) * getattr(self, "scale", 1.5) * self.nested["a"][0] * self.config.gain
        x = x + 1 if "add" in self.kinds else x
        x = x if self.mask is None else x * self.mask
        return getattr(F, self.name)(x) if self.on else x


CHANGES: dict[str, Callable[[Any], None]] = {
    "number": lambda m: setattr(m, "temperature", 3.0),
    "flag": lambda m: setattr(m, "on", False),
    "item": lambda m: m.weights.__setitem__(1, -3.0),
    "string": lambda m: setattr(m, "name", "gelu"),
    "hides its class's": lambda m: setattr(m, "rate", -2.0),
    "new list": lambda m: setattr(m, "weights", [0.0, 0.5]),
    "tensor": lambda m: setattr(m, "temperature", torch.full((6,), 3.0, dtype=torch.float64)),
    "function": lambda m: setattr(m, "act", F.silu),
    "one that was absent": lambda m: setattr(m, "scale", -0.5),
    "nested": lambda m: m.nested["a"].__setitem__(0, -1.0),
    "set": lambda m: m.kinds.clear(),
    "an object's": lambda m: setattr(m.config, "gain", -1.0),
    "another object": lambda m: setattr(m, "config", SimpleNamespace(gain=3.0)),
    "a buffer at last": lambda m: setattr(m, "mask", torch.full((6,), 0.5, dtype=torch.float64)),
    "list of tensors": lambda m: setattr(m, "weights", [1.0, torch.full((6,), 3.0, dtype=torch.float64)]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["frozen", "live"])
def test_an_attribute_that_changes_is_obeyed(change: str, where: str) -> None:
    parts = {"m": Scheduled(C), "n": Scheduled(C)}
    net = settle(Net(lambda self, x: self.head(self.n(self.b(self.m(self.a(x))))), **parts))
    model = freezable(net)
    model.freeze(3)
    assert [unit.name for unit in model.units[:4]] == ["a.0", "m", "b.0", "n"]
    reference = settle(Net(lambda self, x: self.head(self.n(self.b(self.m(self.a(x))))), **parts))
    reference.load_state_dict(net.state_dict())
    freeze_by_hand(reference, model.units[:3])
    compare(model, reference, (image(),), 0, "before")
    CHANGES[change](parts["m" if where == "frozen" else "n"])
    compare(model, reference, (image(),), 1, "after")
    made = model.prefix.build_seconds
    compare(model, reference, (image(),), 2, "again")
    assert model.prefix.build_seconds == made  # one trace, not one at each call


def test_a_class_s_attribute_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = settle(Net(lambda self, x: self.head(self.b(self.m(self.a(x)))), m=Scheduled(C)))
    model = freezable(net)
    model.freeze(2)
    model.eval()
    before = model(image())
    monkeypatch.setattr(Scheduled, "rate", -1.0)
    torch.testing.assert_close(model(image()), net(image()))
    assert not torch.equal(before, model(image()))


def test_modules_put_in_place_of_others_are_obeyed() -> None:
    net = settle(Net(lambda self, x: self.head(self.c(self.b(self.a(x))))))
    model = freezable(net)
    model.freeze(1)
    model.eval()
    model(image())
    for change in (
        lambda: net.c.__setitem__(1, nn.Tanh()),
        lambda: net.c.append(nn.Sigmoid()),
        lambda: net.b.insert(1, nn.Softplus()),
        lambda: net.a.__setitem__(1, nn.Softsign()),
        lambda: net.c.__delitem__(2),
    ):
        before = model(image())
        change()
        assert not torch.equal(before, model(image()))
        torch.testing.assert_close(model(image()), net(image()))


@pytest.mark.parametrize("looks_at_shapes", [False, True])
def test_what_a_module_kept_whole_counts_asks_for_no_new_trace(looks_at_shapes: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.calls = conv(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.conv(x)

    def function(self: Net, x: Tensor) -> Tensor:
        x = self.m(self.a(x))
        if looks_at_shapes and len(x) > 5:
            x = x * 2
        return self.head(self.c(self.b(x)))

    net = settle(Net(function, m=Counting()))
    model = freezable(net, example_inputs=(image(),))
    model.freeze(1)
    model(image())
    made = model.prefix.build_seconds
    for _ in range(3):
        model(image())
    assert model.prefix.build_seconds == made
    assert net.m.calls == 4


def test_numbers_that_change_at_every_call_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stepped(Net):
        def forward(self, x: Tensor, step: int = 0) -> Any:  # type: ignore[override]
            return self.head(self.c(self.b(self.a(x)))) * step

    net = settle(Stepped(None))  # type: ignore[arg-type]
    model = freezable(net)
    model.freeze(1)
    monkeypatch.setattr("fxfreeze.surgery._MOST_PLANS", 8)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        first = model(image(), 1)
        for step in range(20):
            torch.testing.assert_close(model.eval()(image(), step), net(image(), step))
        torch.testing.assert_close(model.train()(image(), 1), first)
    (told,) = (str(w.message) for w in met)
    assert "traced 16 times at depth 1" in told
    assert "arguments not met before" in told
    assert len(model._derived.surgery._plans) <= 8


class Annealed(Net):
    """Reads a number in a frozen and in a live block."""

    temperature = 1

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x) * self.temperature)))


def test_what_changes_at_every_call_is_named_and_leaves_no_pile_behind() -> None:
    net = settle(Annealed())
    model = freezable(net)
    model.freeze(2)
    model.eval()
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        for net.temperature in range(20):
            torch.testing.assert_close(model(image()), net(image()))
    (told,) = (str(w.message) for w in met)
    assert "traced 16 times at depth 2" in told
    assert "self.temperature of a Annealed has changed" in told
    surgery = model._derived.surgery
    assert sum(map(len, surgery._segments.values())) == len(surgery._plans) == 1
