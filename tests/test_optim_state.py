"""FreezeScheduler's state: resuming in every order of loading, foreign states, copies."""

import copy
import io
import itertools
import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from marked import (
    MODELS,
    OPTIMIZERS,
    STEPS,
    FreezeScheduler,
    Marked,
    Model,
    backward,
    batches,
    compiled,
    freezing,
    is_frozen_for_good,
    network,
    same,
    weights,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

from fxfreeze.schedule import FreezeOut, Milestones, Schedule


def train(model: Model, optimizer: Optimizer, schedulers: Sequence[Any], steps: range) -> list[Tensor]:
    """Train over the batches of `steps`; the weights and the optimizer's state after each."""
    seen = []
    for step, batch in zip(range(steps.stop), batches(), strict=False):
        if step not in steps:
            continue
        backward(model, batch)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        optimizer.zero_grad()
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        seen += [*weights(model), *(v.clone() for v in state)]
    return seen


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "optimizer", "scheduler"])))
@pytest.mark.parametrize(
    ("make", "name", "at"),
    [
        *itertools.product([Marked], ["sgd momentum", "adamw foreach", "adagrad", "counting"], [0, 4, 5, 6, 8, 12]),
        *itertools.product([compiled], ["sgd momentum", "adamw fused"], [4, 5, 6]),
    ],
)
def test_resume(name: str, at: int, order: tuple[str, ...], make: Callable[..., Any]) -> None:
    """Saved after `at` steps (a unit freezes at 5, 8 and 11) and loaded in any order, training goes on bit for bit."""

    def start(seed: int, schedule: Schedule) -> tuple[Any, Optimizer, Any, Any]:
        model = make(network(seed), schedule)
        optimizer = OPTIMIZERS[name](model.parameters())
        rates = lrs.ExponentialLR(optimizer, 0.9)
        return model, optimizer, rates, FreezeScheduler(optimizer, model)

    model, optimizer, rates, scheduler = start(0, freezing())
    train(model, optimizer, (rates, scheduler), range(at))
    if make is Marked:
        model.decisions = [{"start": 0, "end": 1, "backend": "plain"}]
    decisions = model._decisions()
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rates": rates}
    saved = through_a_file({key: part.state_dict() for key, part in parts.items()})
    expected = train(model, optimizer, (rates, scheduler), range(at, STEPS))

    model, optimizer, rates, scheduler = start(1, FreezeOut(999))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rates": rates}
    rates.load_state_dict(saved["rates"])
    for part in order:
        parts[part].load_state_dict(saved[part])
    assert scheduler.last_step == at
    assert repr(model.schedule) == repr(freezing())
    assert model._decisions() == decisions
    assert is_frozen_for_good(model, optimizer)
    assert same(train(model, optimizer, (rates, scheduler), range(at, STEPS)), expected)
    assert is_frozen_for_good(model, optimizer)


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "optimizer", "scheduler"])))
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_going_back_in_the_same_process(order: tuple[str, ...], make: Callable[..., Any]) -> None:
    """A shallower checkpoint loaded into a deeper run lowers the depth, and the thawed units have their state again."""
    model = make(network(), freezing())
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    scheduler = FreezeScheduler(optimizer, model)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    train(model, optimizer, (scheduler,), range(4))
    saved = through_a_file({key: part.state_dict() for key, part in parts.items()})
    expected = train(model, optimizer, (scheduler,), range(4, STEPS))
    assert model.depth == 3
    for part in order:
        parts[part].load_state_dict(saved[part])
    assert model.depth == 0
    assert all(p.requires_grad for p in model.parameters())
    assert same(train(model, optimizer, (scheduler,), range(4, STEPS)), expected)


def test_loading_drops_the_state_of_frozen_units_at_once() -> None:
    """An optimizer that is not loaded and made its state for every parameter when it was built, as Adagrad does."""
    model = Marked(network(), freezing())
    scheduler = FreezeScheduler(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(6):
        scheduler.step()
    fresh = Marked(network(), freezing())
    optimizer = torch.optim.Adagrad(fresh.parameters(), lr=0.1)
    FreezeScheduler(optimizer, fresh).load_state_dict(scheduler.state_dict())
    assert fresh.depth == 1
    assert len(optimizer.state) == 6
    assert is_frozen_for_good(fresh, optimizer)


def test_state_is_json() -> None:
    model = Marked(network(), freezing())
    scheduler = FreezeScheduler(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(6):
        scheduler.step()
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["last_step"], state["depth"]) == (6, 1)
    assert state["schedule"] == freezing().state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1: expected 2"),
        ({"format": None}, "format None"),
        ({"last_step": None, "depth": ...}, "lacks depth"),
        ({"last_step": -1}, "last_step = -1"),
        ({"last_step": True}, "last_step = True"),
        ({"last_step": 1.0}, "last_step = 1.0"),
        ({"depth": 4}, "depth = 4: expected a whole number from 0 below 4"),
        ({"depth": -1}, "depth = -1"),
        ({"units": ["0", "1", "2", "head"]}, "units 0, 1, 2, head, and this one has 0, 1, 2, 3"),
        ({"schedule": Milestones({"0": 3}).state_dict()}, "'Milestones' can't be loaded into FreezeOut"),
    ],
)
def test_a_foreign_state_changes_nothing(changes: dict[str, Any], message: str) -> None:
    model = Marked(network(), freezing())
    scheduler = FreezeScheduler(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(6):
        scheduler.step()
    before = scheduler.state_dict()
    foreign = {**before, "last_step": 2, "depth": 0, "schedule": FreezeOut(99).state_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict({key: value for key, value in foreign.items() if value is not ...})
    assert scheduler.state_dict() == before
    with pytest.raises(ValueError, match="format 7"):
        scheduler.load_state_dict(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_copies_go_on_by_themselves(clone: Callable[[Any], Any], make: Callable[..., Any]) -> None:
    model = make(network(), freezing())
    optimizer = OPTIMIZERS["sgd momentum"](model.parameters())
    scheduler = FreezeScheduler(optimizer, model)
    train(model, optimizer, (scheduler,), range(6))
    twin, twin_optimizer, twin_scheduler = clone((model, optimizer, scheduler))
    expected = train(model, optimizer, (scheduler,), range(6, STEPS))
    assert (twin.depth, twin_scheduler.last_step) == (1, 6)
    assert same(train(twin, twin_optimizer, (twin_scheduler,), range(6, STEPS)), expected)
    assert is_frozen_for_good(twin, twin_optimizer)
    bare = clone(optimizer)  # an optimizer alone loses its hooks, as in torch, and takes a new scheduler
    assert not bare._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="has a FreezeScheduler already"):
        copy.copy(scheduler)
