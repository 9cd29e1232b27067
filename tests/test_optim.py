"""FreezeScheduler: freezing by hand, optimizers that are frozen whole, the scaler, refusals."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from marked import (
    MODELS,
    FreezeScheduler,
    Marked,
    backward,
    batches,
    freezing,
    is_frozen_for_good,
    network,
    same,
    unit_parameters,
    weights,
)
from torch import Tensor, nn
from torch.optim import Optimizer

import fxfreeze
import fxfreeze.optim
from fxfreeze.schedule import Milestones


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_frozen_by_hand(make: Callable[..., Any]) -> None:
    """`model.freeze` between two steps: from the next optimizer step on the unit stands still, its state gone."""
    model = make(network(), Milestones({"0": 5}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    scheduler = FreezeScheduler(optimizer, model)
    stream = batches()
    backward(model, next(stream))
    optimizer.step()
    model.freeze(2)
    before = weights(model)
    assert scheduler.get_last_lr() == [0.0, 0.0, 0.1, 0.1]
    backward(model, next(stream))
    for p in unit_parameters(model, 0):
        p.grad = torch.ones_like(p)  # some trainers leave zeros, or worse
    optimizer.step()
    assert all(p not in optimizer.state for i in (0, 1) for p in unit_parameters(model, i))
    assert same(weights(model)[:4], before[:4])
    assert not any(torch.equal(a, b) for a, b in zip(weights(model)[4:], before[4:], strict=True))
    for _ in range(9):
        scheduler.step()
    assert model.depth == 2


ALL_OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (kind, extra)
    for kind in (
        *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam),
        *(torch.optim.RAdam, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Rprop),
        *(torch.optim.ASGD, torch.optim.Adafactor, torch.optim.Muon, torch.optim.SparseAdam),
    )
    for extra in ({}, {"foreach": False}, {"foreach": True}, {"fused": True})
    if not extra.keys() - set(kind.__init__.__code__.co_varnames)
    and not (
        "fused" in extra and kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    )
]


@pytest.mark.parametrize(("kind", "extra"), ALL_OPTIMIZERS)
def test_an_optimizer_whose_every_unit_is_frozen(kind: Any, extra: dict[str, Any]) -> None:
    model = Marked(network(), Milestones({"2": 0}))
    matrices = [p for i in range(3) for p in unit_parameters(model, i) if p.dim() == 2]
    optimizer = kind(matrices, lr=0.1, **extra)
    scheduler = FreezeScheduler(optimizer, model)
    groups, before = optimizer.param_groups, weights(model)
    backward(model, next(batches()))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups is groups
    assert groups[0]["params"] == matrices
    assert same(weights(model), before)
    assert not optimizer.state
    assert scheduler.get_last_lr() == [0.0, 0.0, 0.0]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_last_lr() -> None:
    model = Marked(network(), freezing())
    optimizer = torch.optim.SGD(list(model.parameters())[::-1], lr=torch.tensor(0.1))
    scheduler = FreezeScheduler(optimizer, model)
    for _ in range(6):
        scheduler.step()
    rates = scheduler.get_last_lr()
    assert rates == [torch.tensor(0.1) * factor for factor in freezing().factors(6, model.units)]
    assert rates[0] == 0
    for rate in rates:
        cast(Tensor, rate).fill_(9)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_grad_scaler(fused: bool, make: Callable[..., Any]) -> None:
    """Backbone and head each have an optimizer; GradScaler refuses the first once every unit in it is frozen."""
    model = make(network(), Milestones({"1": 2, "2": 4}))
    backbone = torch.optim.SGD([p for i in range(3) for p in unit_parameters(model, i)], lr=0.1, fused=fused)
    head = torch.optim.SGD(unit_parameters(model, 3), lr=0.1, fused=fused)
    schedulers = [FreezeScheduler(backbone, model), FreezeScheduler(head, model)]
    reference = Marked(network(), Milestones({"1": 2, "2": 4}))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    schedulers.append(FreezeScheduler(plain, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step, batch in zip(range(8), batches(), strict=False):
        torch.autograd.backward(nn.functional.mse_loss(reference(batch[0]), batch[1]))
        torch.autograd.backward(scaler.scale(nn.functional.mse_loss(model(batch[0]), batch[1])))
        if step == 6 and not fused:
            with pytest.raises(AssertionError, match="No inf checks"):
                scaler.step(backbone)
        if step % 2:
            scaler.unscale_(head)  # as before clipping
        assert fxfreeze.optim.scaler_step(scaler, backbone) is None
        fxfreeze.optim.scaler_step(scaler, head)
        scaler.update()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
        for each in (backbone, head, plain):
            each.zero_grad()
        assert same(weights(model), weights(reference)), step  # the scale is a power of two
    assert model.depth == 3


def test_scaler_step_steps_and_skips() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert fxfreeze.optim.scaler_step(scaler, optimizer) is None
    torch.autograd.backward(scaler.scale(weight.sum()))
    fxfreeze.optim.scaler_step(scaler, optimizer)
    scaler.update()
    assert weight.tolist() == [0.5, 0.5]
    torch.autograd.backward(scaler.scale(weight.sum() * float("inf")))
    fxfreeze.optim.scaler_step(scaler, optimizer)
    scaler.update()
    assert weight.tolist() == [0.5, 0.5]
    assert scaler.get_scale() == 2.0


class Closing(torch.optim.SGD):
    def step(self, closure: Any, *, backward: bool) -> Any:  # type: ignore[override]
        raise NotImplementedError


class Bare(torch.optim.SGD):
    """A wrapper that skips Optimizer.__init__, as some trainers' do."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner


def test_refusals() -> None:
    model = Marked(network(), freezing())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = sgd.step
    with pytest.raises(TypeError, match=r"LBFGS.step needs the argument 'closure'.*SGD or AdamW"):
        FreezeScheduler(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(TypeError, match=r"Closing.step needs the argument 'closure'"):
        FreezeScheduler(Closing(model.parameters(), lr=0.1), model)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer with step hooks, and got a Bare: pass the torch"):
        FreezeScheduler(Bare(sgd), model)
    with pytest.raises(TypeError, match="with step hooks, and got a Marked"):
        FreezeScheduler(model, sgd)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"FreezableModel, and got a Sequential: pass what fxfreeze.compile"):
        FreezeScheduler(sgd, model.original)  # type: ignore[arg-type]
    wrapper = nn.Module()
    wrapper.module = model
    with pytest.raises(TypeError, match=r"got a Module: pass its .module"):
        FreezeScheduler(sgd, wrapper)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of the parameters of this SGD belongs to the model"):
        FreezeScheduler(torch.optim.SGD(network().parameters(), lr=0.1), model)
    rateless = Optimizer(model.parameters(), {})
    with pytest.raises(TypeError, match="Optimizer has a parameter group without 'lr'"):
        FreezeScheduler(rateless, model)
    assert sgd.step == step  # a refused optimizer is as it was
    assert not sgd._optimizer_step_pre_hooks
    FreezeScheduler(sgd, model)
    with pytest.raises(ValueError, match="this SGD has a FreezeScheduler already"):
        FreezeScheduler(sgd, model)


def test_state_made_before_the_scheduler_is_dropped() -> None:
    """Adagrad makes its state at once, for a backbone frozen from the start too."""
    model = Marked(network(), Milestones({"1": 0}))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    assert len(optimizer.state) == 8
    FreezeScheduler(optimizer, model)
    assert is_frozen_for_good(model, optimizer)
    assert len(optimizer.state) == 4


def test_a_scheduler_that_is_never_stepped_warns_once() -> None:
    model = fxfreeze.compile(network(), fxfreeze.FreezeOut(1000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = FreezeScheduler(optimizer, model)
    for _ in range(99):
        optimizer.step()
    with pytest.warns(
        UserWarning, match=r"taken 100 steps, and FreezeScheduler.step\(\) was never called.*call it once"
    ):
        optimizer.step()
    for _ in range(200):
        optimizer.step()
    again = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = FreezeScheduler(again, model)
    scheduler.step()
    for _ in range(200):
        again.step()


def test_a_scheduler_that_has_nothing_ahead_need_not_be_stepped() -> None:
    model = fxfreeze.compile(network(), Milestones({"2": 0}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    FreezeScheduler(optimizer, model)
    for _ in range(200):
        optimizer.step()


def test_more_steps_than_the_schedule_has_warn_once() -> None:
    model = fxfreeze.compile(network(), fxfreeze.FreezeOut(5))
    scheduler = FreezeScheduler(torch.optim.SGD(model.parameters(), lr=0.01), model)
    for _ in range(5):
        scheduler.step()
    with pytest.warns(
        UserWarning, match=r"called 6 times, and the schedule has total_steps=5: all learning rates"
    ) as said:
        scheduler.step()
    assert said[0].filename == __file__
    for _ in range(5):
        scheduler.step()
