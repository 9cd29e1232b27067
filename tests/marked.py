"""A FreezableModel without surgery, and what the tests of FreezeScheduler train it with."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fxfreeze.optim
from fxfreeze.model import FreezableModel
from fxfreeze.schedule import FreezeOut, Schedule
from fxfreeze.units import Unit

STEPS = 14


class Marked(nn.Module):
    """What FreezeScheduler asks of a FreezableModel, and no surgery: depth is a mark on the parameters."""

    def __init__(self, net: nn.Sequential, schedule: Schedule) -> None:
        super().__init__()
        self._modules = dict(net._modules)
        self.net = [net]  # in a list: no submodule
        self.schedule = schedule
        children = [(name, [p for p, _ in child.named_parameters(prefix=name)]) for name, child in net.named_children()]
        self.units = tuple(Unit(name, (name,), tuple(names)) for name, names in children if names)
        self.depth = 0
        self.decisions: list[dict[str, Any]] = []
        self.freeze(schedule.depth(0, self.units))

    @property
    def original(self) -> nn.Sequential:
        return self.net[0]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.original(x))

    def freeze(self, depth: int) -> None:
        if not self.depth <= depth < len(self.units):
            raise ValueError(depth)
        self._restore_depth(depth)

    def _restore_depth(self, depth: int) -> None:
        self.depth = depth
        for i, unit in enumerate(self.units):
            for p in map(self.original.get_parameter, unit.parameters):
                p.requires_grad_(i >= depth)
                if i < depth:
                    p.grad = None

    def _decisions(self) -> list[dict[str, Any]]:
        return self.decisions

    def _load_decisions(self, decisions: list[dict[str, Any]]) -> None:
        self.decisions = decisions


Model = Marked | FreezableModel


def compiled(net: nn.Sequential, schedule: Schedule) -> FreezableModel:
    return fxfreeze.compile(net, schedule, units=[name for name, _ in net.named_children()])


MODELS: dict[str, Callable[[nn.Sequential, Schedule], Any]] = {"marked": Marked, "compiled": compiled}


def FreezeScheduler(optimizer: Optimizer, model: Model) -> fxfreeze.optim.FreezeScheduler:  # noqa: N802
    return fxfreeze.optim.FreezeScheduler(optimizer, cast(FreezableModel, model))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [5, 6, 7, 6, 3]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


def freezing() -> FreezeOut:
    """Four units that freeze at 14 (0.3 + 0.7 i / 3) = 4.2, 7.46, 10.73: first at steps 5, 8, 11."""
    return FreezeOut(STEPS, t0=0.3, how="linear")


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    while True:
        yield torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    torch.autograd.backward(loss)
    return loss.detach()


def unit_parameters(model: Model, i: int) -> list[nn.Parameter]:
    return [model.original.get_parameter(name) for name in model.units[i].parameters]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def is_frozen_for_good(model: Model, optimizer: Optimizer) -> bool:
    frozen = [p for i in range(model.depth) for p in unit_parameters(model, i)]
    return all(not p.requires_grad and p.grad is None and p not in optimizer.state for p in frozen)


class Counting(Optimizer):
    """SGD that writes into its group: a count (a number, and a tensor in place), a new entry, a decay of its lr."""

    def __init__(self, params: Any, lr: float, decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "count": 0, "seen": torch.zeros(())})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"] / (1 + group["count"]))
                    self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
            group["count"] += 1
            group["seen"].add_(1)
            group["lr"] *= group["decay"]
            group["fresh"] = group["lr"]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "counting": lambda p: Counting(p, lr=0.1, decay=1.0),
}


def split_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Weights with decay, biases without and at another rate, as users do."""
    named = list(net.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.1, "lr": 0.1},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0, "lr": 0.02},
    ]


def by_hand(net: nn.Sequential, make: Callable[[Any], Optimizer]) -> Optimizer:
    """An optimizer in which every unit's parameters are a group of their own."""
    return make([{"params": list(child.parameters())} for child in net.children()])


def set_by_hand(optimizer: Optimizer, schedule: Schedule, model: Model, step: int, entries: dict[str, Any]) -> None:
    """Give each unit's group `entries`, its lr times the unit's factor, and take the frozen units' gradients away."""
    factors = schedule.factors(step, model.units)
    depth = schedule.depth(step, model.units)
    for i, group in enumerate(optimizer.param_groups):
        group.update(entries, lr=entries["lr"] * factors[i])
        for p in group["params"]:
            p.requires_grad_(i >= depth)
            p.grad = None if i < depth else p.grad
