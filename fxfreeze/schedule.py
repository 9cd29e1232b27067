"""When units freeze, and each unit's learning rate until then: arithmetic on step numbers and unit names."""

from __future__ import annotations

import difflib
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from fxfreeze.units import Unit

_S = TypeVar("_S")
_POWERS = {"linear": 1, "squared": 2, "cubic": 3}
# 0.8**3 * 1000 is 512.0000000000001 in floating point and must freeze at step 512: relative slack of the ceiling.
_SLACK = 1e-12


class Schedule(Protocol):
    """What `compile` and `FreezeScheduler` ask of a schedule. `units` runs from the input to the head, the last one."""

    def depth(self, step: int, units: Sequence[Unit]) -> int:
        """How many units are frozen at `step`; never falls as `step` grows, and never counts the head."""
        ...

    def factors(self, step: int, units: Sequence[Unit]) -> tuple[float, ...]:
        """What each unit's learning rate is multiplied by at `step`: one factor per unit, 0.0 for a frozen one."""
        ...

    def freeze_steps(self, units: Sequence[Unit]) -> tuple[int | None, ...]:
        """The first step at which each unit is frozen; None for a unit that never is."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The arguments, in types that JSON has."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Overwrite the arguments by those of a `state_dict()` of the same class."""
        ...


class FreezeOut:
    """A cosine per unit that reaches zero at the unit's own time, earliest units first.

    With N + 1 units, unit i reaches zero at t_i = g(t0 + (1 - t0) i / N), as a fraction of `total_steps`, and the head
    (i = N) at 1. At step s the factor is (1 / t_i if scale_lr else 1) (1 + cos(pi s / (t_i total_steps))) / 2. A unit
    is frozen from the first step s >= t_i total_steps; the head never is, and its factor stays 0 after `total_steps`.

    total_steps: calls of `FreezeScheduler.step()` in the whole training, at least 1.
    t0: the first unit's time before the power g, in (0, 1].
    how: g, one of "linear", "squared" (x**2) and "cubic" (x**3).
    scale_lr: whether the rate of a unit that freezes early is raised, so that each unit's rates have the same sum.
    Raises ValueError for any other argument. Source: Brock, Lim, Ritchie, Weston 2017, arXiv 1706.04983.
    """

    def __init__(self, total_steps: int, t0: float = 0.8, how: str = "cubic", scale_lr: bool = True) -> None:
        self.total_steps: int = _whole("total_steps", total_steps, least=1)
        if not isinstance(how, str) or how not in _POWERS:
            raise ValueError(f"how = {how!r}: expected one of {', '.join(map(repr, _POWERS))}")
        self.how: str = how
        if isinstance(t0, bool) or not isinstance(t0, Real) or not 0 < t0 <= 1:
            raise ValueError(f"t0 = {t0!r}: expected a number in (0, 1], the first unit's freeze time before the power")
        self.t0: float = float(t0)
        if self.t0 ** _POWERS[how] < sys.float_info.min:
            raise ValueError(f"t0 = {t0!r}: its power ({how}) underflows, and 1 / t is infinite: give a larger t0")
        if not isinstance(scale_lr, bool):
            raise ValueError(f"scale_lr = {scale_lr!r}: expected True or False")
        self.scale_lr: bool = scale_lr

    def __repr__(self) -> str:
        return f"FreezeOut(total_steps={self.total_steps}, t0={self.t0}, how={self.how!r}, scale_lr={self.scale_lr})"

    def freeze_steps(self, units: Sequence[Unit]) -> tuple[int | None, ...]:
        """The first integer step at or after t_i * total_steps for each unit; None for the head."""
        steps = (math.ceil(t * self.total_steps * (1 - _SLACK)) for t in self._times(units)[:-1])
        return (*steps, None)

    def depth(self, step: int, units: Sequence[Unit]) -> int:
        """How many units are frozen at `step`."""
        return _count_reached(self.freeze_steps(units), step)

    def factors(self, step: int, units: Sequence[Unit]) -> tuple[float, ...]:
        """One factor per unit, in [0, 1 / t_i] (in [0, 1] without `scale_lr`); 0.0 exactly for a frozen unit."""
        depth = self.depth(step, units)
        return tuple(0.0 if i < depth else self._factor(step, t) for i, t in enumerate(self._times(units)))

    def _times(self, units: Sequence[Unit]) -> tuple[float, ...]:
        head = _head_index(units)
        power = _POWERS[self.how]
        return (*((self.t0 + (1 - self.t0) * i / head) ** power for i in range(head)), 1.0)

    def _factor(self, step: int, t: float) -> float:
        # (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)**2, without the cancellation that can round a live unit's rate to 0
        left = max(0.0, 1 - step / (t * self.total_steps))
        cosine = math.sin(math.pi * left / 2) ** 2
        return cosine / t if self.scale_lr else cosine

    def state_dict(self) -> dict[str, Any]:
        """The arguments."""
        return {"schedule": "FreezeOut", **vars(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Overwrite the arguments. Raises ValueError, changing nothing, for a state of another schedule."""
        self.__dict__.update(vars(_from_state(FreezeOut, self.state_dict(), state)))


class Milestones:
    """Units that train at their full rate until a step and then stop dead.

    milestones: {name: step}; none leaves freezing to ``model.freeze``. A name is a unit's, or the qualified name of a
    module: the units that lie in that module, or the unit that it lies in. From that step (0 or later) the unit and every
    unit before it are frozen.
    A backbone frozen from the start is ``Milestones({"layer4": 0})``.
    Raises ValueError for any other argument, and when first asked about a network's units, for a name that no unit
    has or that reaches into the head, which stays live.
    """

    def __init__(self, milestones: Mapping[str, int]) -> None:
        if not isinstance(milestones, Mapping):
            raise ValueError(f'milestones = {milestones!r}: expected a mapping such as {{"layer4": 0}}, name to step')
        for name in milestones:
            if not isinstance(name, str):
                raise ValueError(f"milestones has the key {name!r}: expected the name of a unit or a module")
        self.milestones = {name: _whole(f"milestones[{name!r}]", step, least=0) for name, step in milestones.items()}

    def __repr__(self) -> str:
        return f"Milestones({self.milestones})"

    def freeze_steps(self, units: Sequence[Unit]) -> tuple[int | None, ...]:
        """The earliest milestone of each unit and of those after it; None from the first unit that has none."""
        steps: list[int | None] = [None] * (_head_index(units) + 1)
        for name, step in self.milestones.items():
            for i in range(_last_unit(name, units) + 1):
                earlier = steps[i]
                steps[i] = step if earlier is None else min(earlier, step)
        return tuple(steps)

    def depth(self, step: int, units: Sequence[Unit]) -> int:
        """How many units are frozen at `step`."""
        return _count_reached(self.freeze_steps(units), step)

    def factors(self, step: int, units: Sequence[Unit]) -> tuple[float, ...]:
        """0.0 for each frozen unit, 1.0 for each live one."""
        depth = self.depth(step, units)
        return (0.0,) * depth + (1.0,) * (len(units) - depth)

    def state_dict(self) -> dict[str, Any]:
        """The milestones."""
        return {"schedule": "Milestones", "milestones": dict(self.milestones)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Overwrite the milestones. Raises ValueError, changing nothing, for a state of another schedule."""
        self.__dict__.update(vars(_from_state(Milestones, self.state_dict(), state)))


def _whole(name: str, value: object, least: int) -> int:
    """`value` as an int if it is a whole number (numpy's included, bool not) of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name} = {value!r}: expected a whole number of steps, at least {least}")
    return operator.index(value)


def until_next_freeze(schedule: Schedule, units: Sequence[Unit], step: int | None) -> float:
    """Steps from ``step`` to the next freeze, or to the end of the schedule; inf where nothing tells."""
    if step is None:
        return math.inf
    freezes = getattr(schedule, "freeze_steps", None)  # a schedule of the user's own may have none
    later = [] if freezes is None else [at for at in freezes(units) if at is not None and at > step]
    end = getattr(schedule, "total_steps", None)
    return min(later, default=math.inf if end is None else end) - step


def _head_index(units: Sequence[Unit]) -> int:
    if not units:
        raise ValueError("units is empty: a network has at least one unit, its head")
    return len(units) - 1


def _count_reached(freeze_steps: Sequence[int | None], step: int) -> int:
    step = _whole("step", step, least=0)
    return sum(first is not None and first <= step for first in freeze_steps)


def _last_unit(name: str, units: Sequence[Unit]) -> int:
    """The index of the last unit that `name` stands for."""
    matches = [i for i, unit in enumerate(units) if unit.name == name]
    if not matches:
        matches = [i for i, unit in enumerate(units) if _touches(unit, name)]
    head = _head_index(units)
    if not matches:
        raise ValueError(
            f"milestones has {name!r}, which is neither a unit nor a module in one.{_suggestion(name, units)}"
        )
    if matches[-1] == head:
        deepest = f"the deepest unit that can freeze is {units[head - 1].name!r}" if head else "it is the only unit"
        raise ValueError(f"milestones has {name!r}, which is in the head {units[head].name!r}, always live: {deepest}")
    return matches[-1]


def _touches(unit: Unit, module: str) -> bool:
    inside = module + "."
    return module in unit.modules or any(name.startswith(inside) for name in (*unit.modules, *unit.parameters))


def _suggestion(name: str, units: Sequence[Unit]) -> str:
    known = dict.fromkeys(name for unit in units for name in (unit.name, *unit.modules))
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{meant} Units: {', '.join(unit.name for unit in units)} (or name any module in them)"


def _from_state(make: Callable[..., _S], own: Mapping[str, Any], state: Mapping[str, Any]) -> _S:
    """A schedule made from `state`, which must have the form of `own`, the state of the schedule that loads it."""
    kind = own["schedule"]
    if not isinstance(state, Mapping) or state.get("schedule") != kind:
        given = state.get("schedule") if isinstance(state, Mapping) else state
        raise ValueError(f"a state of the schedule {given!r} can't be loaded into {kind}: make that schedule first")
    if state.keys() != own.keys():
        raise ValueError(f"the state of {kind} has the entries {sorted(state)}: expected {sorted(own)}")
    return make(**{key: value for key, value in state.items() if key != "schedule"})
