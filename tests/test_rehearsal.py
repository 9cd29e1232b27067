"""Builds look at the frozen part; the user's own modules and hooks notice nothing of it."""

import copy
from typing import Any

import pytest
import torch
from parity import freezable, freeze_by_hand, settle
from split_cases import Net, conv, image
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:frozen module .* runs as it is")


def chain(**parts: nn.Module) -> Net:
    return settle(Net(lambda self, x: self.head(self.b(self.m(self.a(x)))), **parts))  # type: ignore[return-value]


def test_a_hook_on_a_frozen_module_sees_each_batch_once() -> None:
    net = chain(m=conv())
    seen: list[int] = []
    model = freezable(net)
    model.freeze(2)
    net.m.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    net.m.register_forward_pre_hook(lambda module, args: seen.append(-len(args[0])))
    for n in (8, 8, 6, 1):
        model(image(n))
    assert seen == [-8, 8, -8, 8, -6, 6, -1, 1]


class Bank(nn.Module):
    """Keeps what it saw, in a buffer and in Python, and uses it."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls, self.sums = conv(), 0, [0.0]
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += x.detach().mean()
        self.sums.append(float(x.detach().sum()))
        return self.conv(x) * self.count + self.calls + len(self.sums)


def frozen_bank() -> tuple[Any, Any, Any]:
    """(network, its model frozen through the bank, the same frozen by hand)."""
    net = chain(m=Bank())
    reference = copy.deepcopy(net)
    model = freezable(net)
    model.freeze(2)
    freeze_by_hand(reference, model.units[:2])
    return net, model, reference


def test_a_frozen_module_that_remembers_is_run_once_a_step() -> None:
    net, model, reference = frozen_bank()
    for number, n in enumerate((8, 8, 6, 1, 8)):
        torch.testing.assert_close(model(image(n)), reference(image(n)))
        assert net.m.calls == reference.m.calls == number + 1
        assert net.m.sums == pytest.approx(reference.m.sums)
        torch.testing.assert_close(net.m.count, reference.m.count)
        if number == 0:
            built = model.prefix.build_seconds
    assert model.prefix.build_seconds == built  # its own writes are no sign of a change, and its size is its own affair


def test_a_change_from_outside_is_still_seen() -> None:
    net, model, reference = frozen_bank()
    for step in range(3):
        torch.testing.assert_close(model(image(8)), reference(image(8)))
        with torch.no_grad():
            for each in (net, reference):
                each.a[0].weight.mul_(1.5)
                each.m.count.fill_(step)
