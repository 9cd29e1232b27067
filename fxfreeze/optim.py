"""FreezeScheduler: each unit's learning rate and the end of its updates, for any torch optimizer with step hooks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxfreeze.groups import GroupCopy, GroupSwap

if TYPE_CHECKING:
    from fxfreeze.model import FreezableModel

_FORMAT = 2
_IDLE = 100  # steps of an optimizer after which a scheduler that never took one was forgotten


class FreezeScheduler:
    """Steps a FreezableModel along its schedule, and gives each unit's parameters lr x factor in `optimizer.step()`.

    Call `step()` once an iteration, after `optimizer.step()`. The optimizer's groups stay the user's: any other
    scheduler may set ``group["lr"]``, and may be built before or after this one. Only while `optimizer.step()` runs do
    copies of the groups stand in for them, one per group and factor, without the frozen parameters. What the step
    changes in a copy's other entries is written back to the user's group (where the copies of one group disagree, the
    one nearest the head counts); a change to a copy's lr is written back divided by its factor. Step pre-hooks that
    change groups must be registered before this object is made. Parameters that are not the model's have factor 1.

    A model trained by several optimizers has one FreezeScheduler for each, and all are stepped in every iteration.

    optimizer: any `torch.optim.Optimizer` whose step needs no closure and whose state is per parameter.
    model: what `fxfreeze.compile` returned.
    Raises TypeError for any other optimizer or model, ValueError for an optimizer that has a FreezeScheduler already or
    that has none of the model's parameters.
    """

    last_step: int  # calls of `step()` so far

    def __init__(self, optimizer: Optimizer, model: FreezableModel) -> None:
        _check_optimizer(optimizer)
        _check_model(model)
        self.optimizer = optimizer
        self.model = model
        self.last_step = 0
        self._attach()
        self._freeze()

    def step(self) -> None:
        """Go on to the next step of the schedule: freeze the units whose time has come, drop their optimizer state."""
        self._swap.restore()
        self.last_step += 1
        self._stepped = True
        self._freeze()
        total = getattr(self.model.schedule, "total_steps", None)
        if total is not None and self.last_step == total + 1:  # once, for it only grows
            warnings.warn(
                f"scheduler.step() was called {self.last_step} times, and the schedule has total_steps={total}: all learning "
                "rates are zero from now on; give FreezeOut the steps of the whole training, epochs * len(loader)",
                stacklevel=2,
            )

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates that the next `optimizer.step()` uses: lr x factor for each group of the optimizer, in
        order, and in it for each unit that has parameters there, from the input side; 0 for a frozen unit. A group's
        parameters that are not the model's come last. For a group whose lr is a tensor, the values are new tensors.
        """
        factors = self._factors()
        rates = []
        for group in self._swap.user_groups():
            units = {self._unit_of(p) for p in group["params"]}
            own = [factors[unit] for unit in sorted(unit for unit in units if unit is not None)]
            rates += [group["lr"] * factor for factor in ([*own, 1.0] if None in units else own)]
        return rates

    def state_dict(self) -> dict[str, Any]:
        """The step, the schedule, the depth, and what the model decided for its prefix: all in types that JSON has."""
        self._swap.restore()
        return {
            "format": _FORMAT,
            "last_step": self.last_step,
            "depth": self.model.depth,
            "units": [unit.name for unit in self.model.units],
            "schedule": self.model.schedule.state_dict(),
            "decisions": self.model._decisions(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`. The model, the optimizer and this may be loaded in any order.

        It alone may lower the model's depth. The schedule's arguments are overwritten by the saved ones.
        Raises ValueError for a state of another format, schedule or network; then nothing has changed.
        """
        _check_state(state, [unit.name for unit in self.model.units])
        self._swap.restore()
        self.model.schedule.load_state_dict(state["schedule"])
        self.last_step = state["last_step"]
        self.model.step = self.last_step
        self.model._restore_depth(state["depth"])
        self._drop_frozen_state()
        self.model._load_decisions(state["decisions"])

    def __getstate__(self) -> dict[str, Any]:
        self._swap.restore()
        return {"optimizer": self.optimizer, "model": self.model, "last_step": self.last_step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled optimizer has lost its hooks: torch leaves them out of its state.
        self.__dict__.update(state)
        self._attach()

    def _attach(self) -> None:
        kind = type(self.optimizer).__name__
        hooks = self.optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), FreezeScheduler) for hook in hooks):
            raise ValueError(f"this {kind} has a FreezeScheduler already: use that one, or build a new optimizer")
        self._units: dict[Tensor, int | None] = {}
        self._stepped, self._unstepped = False, 0  # whether `step()` was called, and the optimizer's steps before that
        self._swap: GroupSwap = GroupSwap(self.optimizer)
        if all(self._unit_of(p) is None for group in self.optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"none of the parameters of this {kind} belongs to the model: build it from model.parameters(), and "
                "after anything that replaces parameters (a copy, a new head)"
            )
        self._swap.guard()
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)
        self.optimizer.register_state_dict_pre_hook(self._restore_groups)
        self.optimizer.register_load_state_dict_pre_hook(self._restore_groups)

    def _freeze(self) -> None:
        depth = self.model.schedule.depth(self.last_step, self.model.units)
        if depth > self.model.depth:
            self.model.freeze(depth)
        self.model.step = self.last_step
        self._drop_frozen_state()

    def _drop_frozen_state(self) -> None:
        for group in self._swap.user_groups():
            for p in group["params"]:
                if self._is_frozen(p):
                    self.optimizer.state.pop(p, None)

    def _factors(self) -> list[float]:
        """The schedule's factor of each unit now, and 0.0 for those that the user froze ahead of it."""
        factors = self.model.schedule.factors(self.last_step, self.model.units)
        return [0.0 if i < self.model.depth else factor for i, factor in enumerate(factors)]

    def _unit_of(self, p: Tensor) -> int | None:
        """The index of the unit that `p` is in; None if it is not the model's."""
        if p not in self._units:  # a group added later, or the first time
            named = ((i, name) for i, unit in enumerate(self.model.units) for name in unit.parameters)
            mine = {self.model.original.get_parameter(name): i for i, name in named}
            self._units = {q: mine.get(q) for group in self._swap.user_groups() for q in group["params"]}
        return self._units[p]

    def _is_frozen(self, p: Tensor) -> bool:
        unit = self._unit_of(p)
        return unit is not None and unit < self.model.depth

    def _before_step(self, *_: object) -> None:
        if self._swap.nested():
            return
        if not self._stepped:
            self._count_unstepped()
        self._drop_frozen_state()
        factors = self._factors()
        copies = [copy for group in self.optimizer.param_groups for copy in self._copies(group, factors)]
        self._swap.begin(copies)

    def _count_unstepped(self) -> None:
        self._unstepped += 1
        if self._unstepped != _IDLE:
            return
        steps = getattr(self.model.schedule, "freeze_steps", None)  # a schedule of the user's own may have none
        ahead = [] if steps is None else steps(self.model.units)
        if any(at is not None and at > self.last_step for at in ahead):
            warnings.warn(
                f"the optimizer has taken {_IDLE} steps, and FreezeScheduler.step() was never called: nothing freezes, and no "
                "learning rate changes; call it once after each optimizer.step()",
                stacklevel=2,
            )

    def _after_step(self, *_: object) -> None:
        self._swap.end()

    def _restore_groups(self, *_: object) -> None:
        self._swap.restore()

    def _copies(self, group: dict[str, Any], factors: list[float]) -> Iterator[GroupCopy]:
        """Copies of `group` that share out its live parameters by factor, in the group's order."""
        members: dict[float, list[int]] = {}
        nearest: dict[float, float] = {}
        for i, p in enumerate(group["params"]):
            unit = self._unit_of(p)
            if unit is not None and unit < self.model.depth:
                continue
            factor, place = (1.0, float("inf")) if unit is None else (factors[unit], unit)
            members.setdefault(factor, []).append(i)
            nearest[factor] = max(place, nearest.get(factor, place))
        for factor, indices in members.items():
            yield GroupCopy.of(group, indices, factor, nearest[factor])


def scaler_step(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> float | None:
    """``scaler.step(optimizer)``, or nothing when no parameter of the optimizer has a gradient.

    GradScaler takes such an optimizer for a mistake (AssertionError: no inf checks were recorded), but it is one whose
    every unit is frozen. ``scaler.update()`` needs another optimizer to have been stepped.
    """
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        return None
    return scaler.step(optimizer)


def _check_optimizer(optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer) or "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise TypeError(
            f"FreezeScheduler needs a torch.optim.Optimizer with step hooks, and got a {kind}: "
            "pass the torch optimizer that it wraps"
        )
    _, *arguments = inspect.signature(type(optimizer).step).parameters.values()
    needed = [a.name for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if needed:
        raise TypeError(
            f"{kind}.step needs the argument {needed[0]!r}: an optimizer that evaluates the model within its step "
            "can't be given one learning rate per unit; use one that steps from gradients, such as SGD or AdamW"
        )
    if any("lr" not in group for group in optimizer.param_groups):
        raise TypeError(f"{kind} has a parameter group without 'lr', which FreezeScheduler scales: give it one")


def _check_model(model: object) -> None:
    if not all(hasattr(model, name) for name in ("units", "depth", "freeze", "schedule")):
        inner = getattr(model, "module", None)
        remedy = "pass its .module" if hasattr(inner, "units") else "pass what fxfreeze.compile(net, schedule) returned"
        raise TypeError(f"FreezeScheduler needs a FreezableModel, and got a {type(model).__name__}: {remedy}")


def _check_state(state: Mapping[str, Any], units: list[str]) -> None:
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        given = state.get("format") if isinstance(state, Mapping) else state
        raise ValueError(f"a FreezeScheduler state of format {given!r}: expected {_FORMAT}, from its state_dict()")
    missing = {"last_step", "depth", "units", "schedule", "decisions"} - state.keys()
    if missing:
        raise ValueError(f"the FreezeScheduler state lacks {', '.join(sorted(missing))}: it is not from state_dict()")
    if list(state["units"]) != units:
        raise ValueError(
            f"the FreezeScheduler state is of a network with the units {', '.join(state['units'])}, and this one has "
            f"{', '.join(units)}: compile the same network with the same units"
        )
    for name, end in (("last_step", None), ("depth", len(units))):
        value = state[name]
        if type(value) is not int or value < 0 or (end is not None and value >= end):
            below = "" if end is None else f" below {end}"
            raise ValueError(f"the FreezeScheduler state has {name} = {value!r}: expected a whole number from 0{below}")
