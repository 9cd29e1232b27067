"""Training with FreezeScheduler is training with one group per unit, whose rates are set by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marked import (
    MODELS,
    OPTIMIZERS,
    STEPS,
    FreezeScheduler,
    Marked,
    backward,
    batches,
    by_hand,
    freezing,
    is_frozen_for_good,
    network,
    same,
    set_by_hand,
    split_groups,
    unit_parameters,
    weights,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

from fxfreeze.schedule import Milestones, Schedule


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "schedule", [freezing(), Milestones({"0": 3, "1": 6, "2": 6}), Milestones({"1": 0})], ids=["out", "miles", "start"]
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_trajectory(name: str, schedule: Schedule, make: Callable[..., Any]) -> None:
    model, reference = make(network(), schedule), network()
    optimizer = OPTIMIZERS[name](model.parameters())
    groups, (group,) = optimizer.param_groups, optimizer.param_groups
    lr = group["lr"]
    scheduler = FreezeScheduler(optimizer, model)
    ours, theirs = optimizer, by_hand(reference, OPTIMIZERS[name])
    start, depths = weights(model), set()
    for step, batch in zip(range(STEPS), batches(), strict=False):
        assert model.depth == schedule.depth(step, model.units)
        depths.add(model.depth)
        set_by_hand(theirs, schedule, model, step, {"lr": lr})
        assert torch.equal(backward(model, batch), backward(reference, batch))
        set_by_hand(theirs, schedule, model, step, {"lr": lr})
        ours.step()
        theirs.step()
        assert optimizer.param_groups is groups
        assert len(groups) == 1
        assert groups[0] is group
        assert group["lr"] is lr
        assert group["params"] == list(model.parameters())
        scheduler.step()
        assert is_frozen_for_good(model, optimizer)
        ours.zero_grad()
        theirs.zero_grad()
        assert same(weights(model), weights(reference)), step
    assert len(depths) == len({schedule.depth(step, model.units) for step in range(STEPS)})
    assert not same(weights(model)[-2:], start[-2:])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "one cycle": lambda o: lrs.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.8),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=3), lrs.ExponentialLR(o, 0.8)], [4]),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=4),
}


def advance(scheduler: Any, loss: Tensor) -> None:
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


def without_members(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


@pytest.mark.parametrize("first", ["lr scheduler", "freeze scheduler"])
@pytest.mark.parametrize("name", ["sgd momentum", "sgd tensor lr", "adamw"])
@pytest.mark.parametrize("lr_scheduler", SCHEDULERS)
def test_other_schedulers(lr_scheduler: str, name: str, first: str) -> None:
    """Beside a ghost: the same optimizer and LR scheduler without a FreezeScheduler, whose rates the reference uses."""
    schedule = freezing()
    model, reference = Marked(network(), schedule), network()
    optimizer, theirs = OPTIMIZERS[name](model.parameters()), by_hand(reference, OPTIMIZERS[name])
    if first == "freeze scheduler":
        scheduler = FreezeScheduler(optimizer, model)
    rates = SCHEDULERS[lr_scheduler](optimizer)
    if first == "lr scheduler":
        scheduler = FreezeScheduler(optimizer, model)
    ghost = OPTIMIZERS[name]([nn.Parameter(torch.ones(1))])
    ghost_rates = SCHEDULERS[lr_scheduler](ghost)
    groups, (group,) = optimizer.param_groups, optimizer.param_groups
    seen = set()
    for step, batch in zip(range(STEPS), batches(), strict=False):
        (ghosts,) = without_members(ghost.param_groups)
        seen.add(float(ghosts["lr"]))
        loss = backward(model, batch)
        assert torch.equal(loss, backward(reference, batch))
        set_by_hand(theirs, schedule, model, step, ghosts)
        for each in (optimizer, theirs, ghost):
            each.step()
        for each in (rates, ghost_rates):
            advance(each, loss)
        scheduler.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        assert optimizer.param_groups is groups
        assert groups[0] is group
        assert without_members(groups) == without_members(ghost.param_groups)
        assert rates.get_last_lr() == ghost_rates.get_last_lr()
        assert same(weights(model), weights(reference)), step
    assert len(seen) > 2


def reference_groups(net: nn.Sequential) -> list[dict[str, Any]]:
    """`split_groups`, with one group for each of its groups and units."""
    return [{**group, "params": [p]} for group in split_groups(net) for p in group["params"]]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_several_groups(kind: Any) -> None:
    model, reference = Marked(network(), freezing()), network()
    optimizer, theirs = kind(split_groups(model)), kind(reference_groups(reference))
    user = list(optimizer.param_groups)
    scheduler = FreezeScheduler(optimizer, model)
    for step, batch in zip(range(STEPS), batches(), strict=False):
        backward(model, batch)
        backward(reference, batch)
        factors = freezing().factors(step, model.units)
        for i, group in enumerate(theirs.param_groups):
            group["lr"] = (0.1, 0.02)[i // 4] * factors[i % 4]
            group["params"][0].grad = None if factors[i % 4] == 0 else group["params"][0].grad
        assert scheduler.get_last_lr() == [group["lr"] for group in theirs.param_groups]
        optimizer.step()
        theirs.step()
        scheduler.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        assert all(a is b for a, b in zip(optimizer.param_groups, user, strict=True))
        assert same(weights(model), weights(reference)), step
    assert model.depth == 3


def test_groups_added_later_and_foreign_parameters() -> None:
    """A temperature that is not the model's trains at its own rate; units added at step 3 freeze with the rest."""
    model, reference = Marked(network(), freezing()), network()
    (ours, theirs) = (nn.Parameter(torch.ones(())) for _ in range(2))
    optimizer = torch.optim.SGD([*unit_parameters(model, 3), ours], lr=0.1, momentum=0.9)
    hand = torch.optim.SGD([{"params": list(reference[3].parameters())}, {"params": [theirs]}], lr=0.1, momentum=0.9)
    scheduler = FreezeScheduler(optimizer, model)
    for step, batch in zip(range(STEPS), batches(), strict=False):
        if step == 3:
            optimizer.add_param_group({"params": [p for i in range(3) for p in unit_parameters(model, i)], "lr": 0.05})
            for i in range(3):
                hand.add_param_group({"params": list(reference[i].parameters()), "lr": 0.05})
        factors = freezing().factors(step, model.units)
        for group, rate, factor in zip(
            hand.param_groups, (0.1, 0.1, 0.05, 0.05, 0.05), (factors[3], 1.0, *factors[:3]), strict=False
        ):
            group["lr"] = rate * factor
        assert scheduler.get_last_lr() == [group["lr"] for group in hand.param_groups]
        for net, temperature in ((model, ours), (reference, theirs)):
            torch.autograd.backward(nn.functional.mse_loss(net(batch[0]) * temperature, batch[1]))
        for i, unit in enumerate(reference.children()):
            for p in unit.parameters():
                p.grad = None if factors[i] == 0 else p.grad
        optimizer.step()
        hand.step()
        scheduler.step()
        optimizer.zero_grad()
        hand.zero_grad()
        assert torch.equal(ours, theirs)
        assert same(weights(model), weights(reference)), step
        assert is_frozen_for_good(model, optimizer)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_two_optimizers(make: Callable[..., Any]) -> None:
    """One for the first two units and one for the rest, each with a FreezeScheduler, train as one optimizer does."""
    model, reference = make(network(), freezing()), Marked(network(), freezing())
    momentum = OPTIMIZERS["sgd momentum"]
    halves = [momentum([p for i in half for p in unit_parameters(model, i)]) for half in ((0, 1), (2, 3))]
    schedulers = [FreezeScheduler(half, model) for half in halves]
    whole = momentum(reference.parameters())
    scheduler = FreezeScheduler(whole, reference)
    for step, batch in zip(range(STEPS), batches(), strict=False):
        backward(model, batch)
        backward(reference, batch)
        for optimizer in (*halves, whole):
            optimizer.step()
        for stepped in (*schedulers, scheduler):
            stepped.step()
        assert [each.last_step for each in schedulers] == [step + 1, step + 1]
        for each in (*halves, whole):
            each.zero_grad()
        assert all(is_frozen_for_good(model, half) for half in halves)
        assert model.depth == reference.depth
        assert same(weights(model), weights(reference)), step


def test_closure() -> None:
    model, reference = Marked(network(), freezing()), Marked(network(), freezing())
    for net in (model, reference):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scheduler = FreezeScheduler(optimizer, net)
        for _, batch in zip(range(STEPS), batches(), strict=False):

            def closure(net: Marked = net, batch: Any = batch, optimizer: Optimizer = optimizer) -> float:
                optimizer.zero_grad()
                return backward(net, batch).item()

            if net is model:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
            scheduler.step()
    assert same(weights(model), weights(reference))
