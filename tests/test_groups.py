"""What a step sees of the user's groups, what it writes into them, and what is left when it raises."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from marked import (
    STEPS,
    Counting,
    FreezeScheduler,
    Marked,
    backward,
    batches,
    by_hand,
    freezing,
    network,
    same,
    set_by_hand,
    split_groups,
    unit_parameters,
    weights,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs

import fxfreeze.optim
from fxfreeze.schedule import Milestones, Schedule
from fxfreeze.units import Unit


class Raising(torch.optim.SGD):
    """SGD that raises after its first group when told to."""

    told = False

    def step(self, closure: Any = None) -> Any:
        if not self.told:
            return super().step(closure)
        self.param_groups[0]["momentum"] = 0.25
        raise RuntimeError("out of memory")


class Shrinking(torch.optim.SGD):
    """A subclass that calls super().step(), whose hooks torch may run as well, and then moves every parameter."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - 0.1 * group["lr"])
        return loss


def test_names_of_parameters_follow_them() -> None:
    seen: list[tuple[str, Tensor]] = []

    class Named(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.extend(
                (name, p) for g in self.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)
            )
            return super().step(closure)

    model = Marked(network(), Milestones({"1": 0}))
    optimizer = Named(list(model.named_parameters()), lr=0.1)
    names = optimizer.param_groups[0]["param_names"]
    FreezeScheduler(optimizer, model)
    optimizer.step()
    assert len(seen) == 4
    assert all(model.original.get_parameter(name) is p for name, p in seen)
    assert optimizer.param_groups[0]["param_names"] is names
    assert len(names) == 8


@pytest.mark.parametrize("schedule", [freezing(), Milestones({"0": 3, "1": 6, "2": 6})], ids=["out", "miles"])
def test_what_a_step_writes_into_its_group(schedule: Schedule) -> None:
    model = Marked(network(), schedule)
    biases = split_groups(model)[1]
    head: dict[str, Any] = {"params": unit_parameters(model, 3)[:1], "lr": 0.1}
    optimizer = Counting([biases, head], lr=1.0)
    groups = list(optimizer.param_groups)
    groups[1]["seen"] = torch.zeros(())
    seen = [group["seen"] for group in groups]
    scheduler = FreezeScheduler(optimizer, model)
    for step, batch in zip(range(1, 10), batches(), strict=False):
        backward(model, batch)
        optimizer.step()
        scheduler.step()
        for i, group in enumerate(groups):
            assert group["count"] == step
            assert group["seen"] is seen[i]
            assert group["seen"].item() == step
            assert group["lr"] == pytest.approx((0.02, 0.1)[i] * 0.5**step, rel=1e-12)
            # "fresh" is the copy's lr, of the unit nearest the head, in both groups the head's
            factor = schedule.factors(step - 1, model.units)[3]
            assert group["fresh"] == pytest.approx(group["lr"] * factor, rel=1e-12)


class Uneven:
    """A schedule by which the first and the last unit share a factor, and the second has half of it."""

    def depth(self, step: int, units: Sequence[Unit]) -> int:
        return 0

    def factors(self, step: int, units: Sequence[Unit]) -> tuple[float, ...]:
        return (0.25, 0.125, 0.5, 0.25)


def test_where_copies_disagree_the_one_nearest_the_head_counts() -> None:
    model, outside = Marked(network(), cast(Schedule, Uneven())), nn.Parameter(torch.ones(1))
    units = [unit_parameters(model, i) for i in range(4)]
    for order in ([3, 0, 1, 2], [2, 0, 3, 1], [1, 3, 2, 0]):
        optimizer = Counting([p for i in order for p in units[i]], lr=0.5, decay=1.0)
        FreezeScheduler(optimizer, model)
        optimizer.step()
        assert optimizer.param_groups[0]["fresh"] == 0.5 * 0.25  # of the copy that has unit 3
        # parameters that are not the model's train as long as the head, at the full rate
        optimizer = Counting([outside, *(p for i in order for p in units[i])], lr=0.5, decay=1.0)
        FreezeScheduler(optimizer, model)
        optimizer.step()
        assert optimizer.param_groups[0]["fresh"] == 0.5


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_tensor_lr_that_the_step_changes(how: str) -> None:
    class Decaying(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                if how == "in place":
                    group["lr"].mul_(0.5)
                else:
                    group["lr"] = group["lr"] * 0.5

    model = Marked(network(), freezing())
    optimizer = Decaying(model.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    lr = optimizer.param_groups[0]["lr"]
    scheduler = FreezeScheduler(optimizer, model)
    for step in range(1, STEPS):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1 * 0.5**step, rel=1e-12)
        assert (optimizer.param_groups[0]["lr"] is lr) == (how == "in place")


def test_a_rate_of_zero_says_nothing_about_the_users() -> None:
    """After the end of the schedule the head's factor is 0: what the step makes of a rate of 0 can't be scaled back."""

    class Warming(Counting):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                group["lr"] += 0.5

    model = Marked(network(), freezing())
    optimizer = Warming(model.parameters(), lr=0.1)
    scheduler = FreezeScheduler(optimizer, model)
    for _ in range(STEPS):
        scheduler.step()
    assert scheduler.get_last_lr() == [0.0, 0.0, 0.0, 0.0]
    before = weights(model)
    backward(model, next(batches()))
    optimizer.step()
    assert same(weights(model), before)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["count"] == 1


def test_with_nothing_live_a_step_sees_one_group_without_parameters() -> None:
    class Moving(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rate = self.param_groups[0]["lr"]  # some optimizers read their settings here
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(rate)  # whether or not it has a gradient

    model = Marked(network(), Milestones({"1": 0}))
    optimizer = Moving([p for i in (0, 1) for p in unit_parameters(model, i)], lr=0.1)
    FreezeScheduler(optimizer, model)
    before = weights(model)
    optimizer.step()
    assert same(weights(model), before)
    assert len(optimizer.param_groups[0]["params"]) == 4


def raising_case() -> tuple[Marked, Raising, fxfreeze.optim.FreezeScheduler]:
    model = Marked(network(), freezing())
    optimizer = Raising(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = FreezeScheduler(optimizer, model)
    backward(model, next(batches()))
    optimizer.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize("first", ["lr scheduler", "freeze scheduler"])
def test_a_step_that_raised_leaves_the_users_groups(first: str) -> None:
    model = Marked(network(), freezing())
    optimizer = Raising(model.parameters(), lr=0.1, momentum=0.9)
    groups = optimizer.param_groups
    if first == "lr scheduler":
        rates = lrs.ExponentialLR(optimizer, 0.5)
    scheduler = FreezeScheduler(optimizer, model)
    if first == "freeze scheduler":
        rates = lrs.ExponentialLR(optimizer, 0.5)
    backward(model, next(batches()))
    optimizer.told = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups is groups
    rates.step()
    assert groups[0]["lr"] == 0.05
    assert scheduler.get_last_lr() == [0.05 * factor for factor in freezing().factors(0, model.units)]


@pytest.mark.parametrize("call", ["step", "state_dict", "load_state_dict", "scheduler.step", "scheduler.state_dict"])
def test_a_step_called_past_the_guard_that_raised_is_restored_at_the_next_call(call: str) -> None:
    model, optimizer, scheduler = raising_case()
    groups, state = optimizer.param_groups, optimizer.state_dict()
    saved = scheduler.state_dict()
    optimizer.told = True
    with pytest.raises(RuntimeError, match="out of memory"):
        Raising.step(optimizer)  # as a trainer does that took the method before FreezeScheduler was made
    assert optimizer.param_groups is not groups
    assert scheduler.get_last_lr() == [0.1 * factor for factor in freezing().factors(0, model.units)]
    optimizer.told = False
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: Raising.step(optimizer),
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
        "scheduler.step": scheduler.step,
        "scheduler.state_dict": lambda: scheduler.load_state_dict(saved),
    }
    calls[call]()
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.1
    if call != "load_state_dict":
        assert optimizer.param_groups is groups
    if call not in ("load_state_dict", "step"):
        assert groups[0]["momentum"] == 0.25  # as the step left it, as without a FreezeScheduler


def test_a_step_that_raised_within_a_step_leaves_no_trace() -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    model = Marked(network(), freezing())
    optimizer = Shrinking(model.parameters(), lr=0.1)
    groups, calls = optimizer.param_groups, []
    FreezeScheduler(optimizer, model)

    def raise_within(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    optimizer.register_step_pre_hook(raise_within)
    backward(model, next(batches()))
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups is groups
    torch.optim.SGD.step(optimizer)  # past the guard, which would hide that a count of nested steps was left behind
    assert optimizer.param_groups is groups


def test_a_step_within_a_step() -> None:
    """torch runs the hooks of SGD.step inside Shrinking.step; what comes after it must still see the copies."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # from here on SGD.step runs hooks itself
    model, reference = Marked(network(), freezing()), network()
    optimizer, theirs = Shrinking(model.parameters(), lr=0.1), by_hand(reference, lambda p: Shrinking(p, lr=0.1))
    groups = optimizer.param_groups
    scheduler = FreezeScheduler(optimizer, model)
    for step, batch in zip(range(STEPS), batches(), strict=False):
        backward(model, batch)
        backward(reference, batch)
        set_by_hand(theirs, freezing(), model, step, {"lr": 0.1})  # a factor of 0 keeps a frozen unit where it is
        optimizer.step()
        theirs.step()
        scheduler.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        assert optimizer.param_groups is groups
        assert same(weights(model), weights(reference)), step


def test_a_compiled_step_gives_each_unit_its_rate() -> None:
    model, reference = Marked(network(), freezing()), Marked(network(), freezing())
    optimizer, theirs = (torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (model, reference))
    schedulers = [FreezeScheduler(optimizer, model), FreezeScheduler(theirs, reference)]
    compiled = torch.compile(optimizer.step, backend="eager")
    for step, batch in zip(range(STEPS), batches(), strict=False):
        backward(model, batch)
        backward(reference, batch)
        compiled()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        assert same(weights(model), weights(reference)), step
