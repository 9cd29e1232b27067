"""Schedules: a table worked out by hand, properties, names, refusals, states."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxfreeze.schedule
from fxfreeze.schedule import FreezeOut, Milestones, Schedule
from fxfreeze.units import Unit


def chain(count: int) -> tuple[Unit, ...]:
    return tuple(Unit(f"unit{i}", (f"unit{i}",), (f"unit{i}.weight",)) for i in range(count))


# A small residual network as `units` lists it: a stem of two modules, containers wholly in one unit or spread over two,
# a position embedding outside any module, and a last block that shares its unit with the norm after it.
NET = (
    Unit("conv1", ("conv1", "bn1"), ("conv1.weight", "bn1.weight", "bn1.bias")),
    Unit("layer1.0", ("layer1.0", "layer1.0.conv"), ("layer1.0.conv.weight",)),
    Unit("layer1.1", ("layer1.1", "layer1.1.conv"), ("layer1.1.conv.weight",)),
    Unit("layer2.0", ("layer2", "layer2.0", "layer2.0.conv"), ("layer2.0.conv.weight",)),
    Unit("encoder.pos", (), ("encoder.pos",)),
    Unit("layer10.0", ("layer10", "layer10.0", "norm"), ("layer10.0.weight", "norm.weight")),
    Unit("fc", ("fc", "fc.drop", "fc.out"), ("fc.out.weight",)),
)


# Five units (N = 4), t0 = 0.5, total_steps = 1000, worked out by hand:
#   t0 + (1 - t0) i / N   = 0.5      0.625        0.75       0.875        1
#   its square            = 0.25     0.390625     0.5625     0.765625     1
#   its cube              = 0.125    0.244140625  0.421875   0.669921875  1
# and a unit is frozen from the next whole step at or after 1000 times that; the head never is.
TABLE = {
    "linear": ((0.5, 0.625, 0.75, 0.875, 1), (500, 625, 750, 875, None)),
    "squared": ((0.25, 0.390625, 0.5625, 0.765625, 1), (250, 391, 563, 766, None)),
    "cubic": ((0.125, 0.244140625, 0.421875, 0.669921875, 1), (125, 245, 422, 670, None)),
}


@pytest.mark.parametrize("how", TABLE)
def test_freeze_steps_of_the_table(how: str) -> None:
    units, (_, expected) = chain(5), TABLE[how]
    schedule = FreezeOut(1000, t0=0.5, how=how)
    assert schedule.freeze_steps(units) == expected
    for depth, step in enumerate(expected[:-1], start=1):
        assert step is not None
        assert schedule.depth(step - 1, units) == depth - 1
        assert schedule.depth(step, units) == depth
    assert schedule.depth(0, units) == 0


@pytest.mark.parametrize("how", TABLE)
def test_factors_of_the_table(how: str) -> None:
    units, (times, _) = chain(5), TABLE[how]
    scaled, plain = FreezeOut(1000, t0=0.5, how=how), FreezeOut(1000, t0=0.5, how=how, scale_lr=False)
    assert scaled.factors(0, units) == pytest.approx([1 / t for t in times], rel=1e-14)  # cos 0 = 1
    assert plain.factors(0, units) == pytest.approx([1.0] * 5, rel=1e-14)
    for step in (1, 60, 124, 125, 300, 670, 999):
        cosines = [(1 + math.cos(math.pi * step / (1000 * t))) / 2 if step < 1000 * t else 0.0 for t in times]
        assert plain.factors(step, units) == pytest.approx(cosines, rel=1e-9, abs=1e-13)
        assert scaled.factors(step, units) == pytest.approx(
            [c / t for c, t in zip(cosines, times, strict=True)], rel=1e-9, abs=1e-13
        )


def test_factors_at_whole_angles() -> None:
    # Two units, t0 = 0.3 linear: the first freezes at 0.3 * 1000 = 300. A third of the way the angle is 60 degrees:
    # (1 + 0.5) / 2 = 3/4; half way 90: 1/2; two thirds 120: 1/4. The head at steps 100, 150, 200: 18, 27, 36 degrees.
    units = chain(2)
    for step, cosine, degrees in ((100, 0.75, 18), (150, 0.5, 27), (200, 0.25, 36)):
        first, head = FreezeOut(1000, t0=0.3, how="linear").factors(step, units)
        assert first == pytest.approx(cosine / 0.3, rel=1e-14)
        assert head == pytest.approx((1 + math.cos(math.radians(degrees))) / 2, rel=1e-14)
        assert FreezeOut(1000, 0.3, "linear", False).factors(step, units)[0] == pytest.approx(cosine, rel=1e-14)


@pytest.mark.parametrize(
    ("total", "t0", "how", "step"),
    [
        (1000, 0.8, "cubic", 512),  # 0.8**3 * 1000 = 512.0000000000001 in floating point
        (1000, 0.8, "squared", 640),  # 0.8**2 * 1000 = 640.0000000000001
        (125, 0.2, "cubic", 1),  # 0.008 * 125
        (10, 0.7, "cubic", 4),  # 3.43
        (7, 1.0, "linear", 7),
        (3, 1e-3, "cubic", 1),  # 3e-9 of a step: at the first step after the start, not before it
        (10**7, 0.8, "cubic", 5_120_000),
    ],
)
def test_first_freeze_step(total: int, t0: float, how: str, step: int) -> None:
    assert FreezeOut(total, t0, how).freeze_steps(chain(3))[0] == step


def test_a_frozen_unit_is_at_zero_and_a_live_one_is_not() -> None:
    # 0.512 * 1000 is 512 and noise: frozen at 512, at exactly 0. 0.51200000001 * 1000 is 10 billionths of a step more:
    # live at 512, with a rate below what 1 + cos can resolve.
    assert FreezeOut(1000).factors(512, chain(3))[0] == 0.0
    assert FreezeOut(1000).factors(511, chain(3))[0] > 0.0
    assert 0.0 < FreezeOut(1000, 0.51200000001, "linear").factors(512, chain(3))[0] < 1e-20


def test_defaults_are_the_papers() -> None:
    assert repr(FreezeOut(1000)) == "FreezeOut(total_steps=1000, t0=0.8, how='cubic', scale_lr=True)"


@pytest.mark.parametrize("schedule", [FreezeOut(10), FreezeOut(10, 1.0, "linear", False)])
def test_a_network_of_one_unit_is_all_head(schedule: Schedule) -> None:
    (unit,) = units = chain(1)
    assert schedule.freeze_steps(units) == (None,)
    assert [schedule.depth(step, units) for step in (0, 5, 10, 99)] == [0, 0, 0, 0]
    assert schedule.factors(5, units) == pytest.approx([0.5])  # 90 degrees
    with pytest.raises(ValueError, match="it is the only unit"):
        Milestones({unit.name: 0}).depth(0, units)


def test_head_stays_at_zero_after_the_end() -> None:
    units = chain(3)
    schedule = FreezeOut(100)
    for step in (100, 101, 150, 200, 10_000):
        assert schedule.factors(step, units) == (0.0, 0.0, 0.0)
        assert schedule.depth(step, units) == 2
    assert 0 < schedule.factors(99, units)[2] < 1e-3


freezeouts = st.builds(
    FreezeOut,
    total_steps=st.integers(1, 10**7),
    t0=st.floats(1e-3, 1),
    how=st.sampled_from(["linear", "squared", "cubic"]),
    scale_lr=st.booleans(),
)
chains = st.integers(1, 60).map(chain)


@st.composite
def milestones_and_chain(draw: st.DrawFn) -> tuple[Milestones, tuple[Unit, ...]]:
    units = chain(draw(st.integers(2, 30)))
    names = st.sampled_from([unit.name for unit in units[:-1]])
    return Milestones(draw(st.dictionaries(names, st.integers(0, 1000), min_size=1))), units


@given(st.one_of(st.tuples(freezeouts, chains), milestones_and_chain()), st.data())
def test_properties(case: tuple[Schedule, tuple[Unit, ...]], data: st.DataObject) -> None:
    schedule, units = case
    freeze_steps = schedule.freeze_steps(units)
    assert freeze_steps[-1] is None
    assert len(freeze_steps) == len(units)
    near = [step + d for step in freeze_steps if step is not None for d in (-1, 0, 1) if step + d >= 0]
    steps = sorted(data.draw(st.lists(st.one_of(st.integers(0, 2 * 10**7), st.sampled_from(near or [0])), min_size=1)))
    depths = [schedule.depth(step, units) for step in steps]
    assert depths == sorted(depths)
    for step, depth in zip(steps, depths, strict=True):
        assert 0 <= depth < len(units)
        frozen = [first is not None and step >= first for first in freeze_steps]
        assert frozen == [i < depth for i in range(len(units))]
        factors = schedule.factors(step, units)
        assert len(factors) == len(units)
        ended = isinstance(schedule, FreezeOut) and step >= schedule.total_steps
        for i, factor in enumerate(factors):
            is_head = i == len(units) - 1
            assert (factor == 0.0) == (i < depth or (is_head and ended))
            assert 0.0 <= factor <= _ceiling(schedule, i, len(units)) * (1 + 1e-12)


def _ceiling(schedule: Schedule, i: int, count: int) -> float:
    if not isinstance(schedule, FreezeOut) or not schedule.scale_lr or i == count - 1:
        return 1.0
    x = schedule.t0 + (1 - schedule.t0) * i / (count - 1)
    return 1 / x ** {"linear": 1, "squared": 2, "cubic": 3}[schedule.how]


@given(freezeouts, st.integers(2, 40).map(chain))
def test_a_unit_freezes_at_the_first_step_at_or_after_its_time(schedule: FreezeOut, units: tuple[Unit, ...]) -> None:
    power = {"linear": 1, "squared": 2, "cubic": 3}[schedule.how]
    for i, first in enumerate(schedule.freeze_steps(units)[:-1]):
        time = (schedule.t0 + (1 - schedule.t0) * i / (len(units) - 1)) ** power * schedule.total_steps
        noise = 1e-11 * time
        assert first is not None
        assert first - 1 - noise < time < first + 1 + noise  # within a step,
        assert first >= time - noise  # and not before its time


def test_milestones_freeze_a_unit_and_all_before_it() -> None:
    schedule = Milestones({"layer1.0": 10, "layer2.0": 30})
    assert schedule.freeze_steps(NET) == (10, 10, 30, 30, None, None, None)
    assert [schedule.depth(step, NET) for step in (0, 9, 10, 29, 30, 10**9)] == [0, 0, 2, 2, 4, 4]
    assert schedule.factors(9, NET) == (1.0,) * 7
    assert schedule.factors(10, NET) == (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_an_earlier_milestone_of_a_deeper_unit_wins() -> None:
    for milestones in ({"layer1.0": 10, "layer2.0": 5}, {"layer2.0": 5, "layer1.0": 10}):
        assert Milestones(milestones).freeze_steps(NET) == (5, 5, 5, 5, None, None, None)


def test_backbone_frozen_from_the_start() -> None:
    assert Milestones({"layer10": 0}).depth(0, NET) == 6


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("conv1", 1),  # a unit
        ("bn1", 1),  # a module in a unit
        ("layer1", 3),  # a module that holds two units, and is in neither
        ("layer1.0.conv", 2),  # a module inside a unit's module
        ("layer2", 4),  # a container wholly in one unit
        ("encoder.pos", 5),  # a unit without modules
        ("encoder", 5),  # a module that has a parameter of a unit
        ("norm", 6),
    ],
)
def test_what_a_name_stands_for(name: str, depth: int) -> None:
    assert Milestones({name: 3}).depth(3, NET) == depth
    assert Milestones({name: 3}).depth(2, NET) == 0


@pytest.mark.parametrize("name", ["fc", "fc.drop"])
def test_the_head_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}'.*head 'fc'.*deepest unit that can freeze is 'layer10.0'"):
        Milestones({"conv1": 0, name: 5}).freeze_steps(NET)


@pytest.mark.parametrize(("name", "meant"), [("layer1.2", "layer1.1"), ("fc.dorp", "fc.drop"), ("zzz", None)])
def test_an_unknown_name_is_refused(name: str, meant: str | None) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
        Milestones({name: 5}).depth(0, NET)
    assert "Units: conv1, layer1.0, layer1.1, layer2.0, encoder.pos, layer10.0, fc" in str(caught.value)
    assert ("Did you mean" in str(caught.value)) == (meant is not None)
    assert meant is None or f"Did you mean '{meant}'?" in str(caught.value)


@pytest.mark.parametrize("name", ["layer", "", "layer1.", "conv1.weight"])
def test_part_of_a_name_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="neither a unit nor a module"):
        Milestones({name: 5}).depth(0, NET)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"total_steps": 0}, "total_steps = 0"),
        ({"total_steps": -5}, "total_steps = -5"),
        ({"total_steps": 10.0}, "total_steps = 10.0"),
        ({"total_steps": True}, "total_steps = True"),
        ({"total_steps": "10"}, "total_steps = '10'"),
        ({"total_steps": None}, "total_steps = None"),
        ({"t0": 0}, "t0 = 0:"),
        ({"t0": 0.0}, "t0 = 0.0"),
        ({"t0": -0.5}, "t0 = -0.5"),
        ({"t0": 1.0001}, "t0 = 1.0001"),
        ({"t0": math.nan}, "t0 = nan"),
        ({"t0": math.inf}, "t0 = inf"),
        ({"t0": True}, "t0 = True"),
        ({"t0": "0.8"}, "t0 = '0.8'"),
        ({"t0": 1e-110}, "t0 = 1e-110"),
        ({"how": "quartic"}, "how = 'quartic'"),
        ({"how": "Cubic"}, "how = 'Cubic'"),
        ({"how": 3}, "how = 3"),
        ({"how": ["cubic"]}, r"how = \['cubic'\]"),
        ({"scale_lr": 1}, "scale_lr = 1"),
        ({"scale_lr": None}, "scale_lr = None"),
    ],
)
def test_freezeout_refuses(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FreezeOut(**{"total_steps": 10, **arguments})  # type: ignore[arg-type]


def test_no_milestones_freeze_nothing() -> None:
    schedule = Milestones({})
    units = [Unit(name, (name,), ()) for name in ("a", "b", "head")]
    assert schedule.freeze_steps(units) == (None, None, None)
    assert schedule.depth(10**6, units) == 0
    assert schedule.factors(10**6, units) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("milestones", "named"),
    [
        ([("layer4", 0)], r"milestones = \[\('layer4', 0\)\]"),
        ("layer4", "milestones = 'layer4'"),
        ({"layer4": -1}, r"milestones\['layer4'\] = -1"),
        ({"layer4": 0.5}, r"milestones\['layer4'\] = 0.5"),
        ({"layer4": False}, r"milestones\['layer4'\] = False"),
        ({"layer4": None}, r"milestones\['layer4'\] = None"),
        ({4: 0}, "the key 4"),
    ],
)
def test_milestones_refuses(milestones: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Milestones(milestones)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [FreezeOut(10), Milestones({"unit0": 1})])
def test_impossible_questions(schedule: Schedule) -> None:
    for step in (-1, 0.5, True):
        with pytest.raises(ValueError, match=f"step = {step}"):
            schedule.depth(step, chain(3))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"step = {step}"):
            schedule.factors(step, chain(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="units is empty"):
        schedule.freeze_steps(())


def test_whole_numbers_of_numpy() -> None:
    assert type(FreezeOut(np.int64(10)).total_steps) is int  # type: ignore[arg-type]
    assert json.dumps(Milestones({"unit0": np.int32(3)}).state_dict())  # type: ignore[dict-item]
    assert FreezeOut(10, np.float32(0.5)).t0 == 0.5  # type: ignore[arg-type]


def test_milestones_keeps_its_own_copy() -> None:
    given_mapping = {"unit0": 3}
    schedule = Milestones(given_mapping)
    given_mapping["unit0"] = 0
    schedule.state_dict()["milestones"]["unit0"] = 1
    assert schedule.milestones == {"unit0": 3}
    assert repr(schedule) == "Milestones({'unit0': 3})"


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (FreezeOut(77, 0.25, "squared", False), FreezeOut(5)),
        (Milestones({"unit0": 3, "unit1": 9}), Milestones({"unit2": 1})),
    ],
)
def test_state_round_trip(saved: Schedule, other: Schedule) -> None:
    other.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert repr(other) == repr(saved)
    assert other.state_dict() == saved.state_dict()
    assert other.freeze_steps(chain(5)) == saved.freeze_steps(chain(5))
    assert other.factors(2, chain(5)) == saved.factors(2, chain(5))


@pytest.mark.parametrize(
    ("schedule", "state", "message"),
    [
        (FreezeOut(5), Milestones({"unit0": 3}).state_dict(), "'Milestones' can't be loaded into FreezeOut"),
        (Milestones({"unit0": 3}), FreezeOut(5).state_dict(), "'FreezeOut' can't be loaded into Milestones"),
        (FreezeOut(5), {}, "None can't be loaded"),
        (FreezeOut(5), 7, "7 can't be loaded"),
        (FreezeOut(5), {"schedule": "FreezeOut", "total_steps": 9}, r"has the entries \['schedule', 'total_steps'\]"),
        (FreezeOut(5), {**FreezeOut(9).state_dict(), "warmup": 3}, "'warmup'"),
        (FreezeOut(5), {**FreezeOut(9).state_dict(), "t0": 2.0}, "t0 = 2.0"),
        (Milestones({"unit0": 3}), {"schedule": "Milestones", "milestones": {"unit0": -3}}, "-3"),
    ],
)
def test_a_foreign_or_broken_state_changes_nothing(schedule: Schedule, state: object, message: str) -> None:
    before = repr(schedule)
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state)  # type: ignore[arg-type]
    assert repr(schedule) == before


def test_runs_without_torch() -> None:
    script = (
        "import importlib.util, sys; sys.modules['torch'] = None; "
        "spec = importlib.util.spec_from_file_location('schedule', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "print(module.FreezeOut(1000).freeze_steps('abc'))"
    )
    path = Path(fxfreeze.schedule.__file__)
    ran = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "(512, 729, None)"  # 0.8 and 0.9 cubed
