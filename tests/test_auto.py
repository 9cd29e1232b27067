"""backend="auto" under a clock of the test's own: what it builds, what it chooses, when it waits, what it remembers."""

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import frozen_to, images, network, plain_graph
from torch import Tensor, nn

import fxfreeze
from fxfreeze import FreezeOut, FreezeScheduler, Milestones, auto
from fxfreeze.auto import choose
from fxfreeze.backends import BACKENDS, Backend
from fxfreeze.computation import Computation
from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.runtime import Segment
from fxfreeze.schedule import until_next_freeze
from fxfreeze.timings import Times, Timings, case_of


class Clock:
    """``time.perf_counter`` of the module under test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auto.time, "perf_counter", clock)
    return clock


class Timed(Segment):
    """A segment that takes as long as it is told; ``after``: what the next operator takes longer for it; ``fails_at``: the
    call that drops what was compiled."""

    def __init__(
        self, name: str, clock: Clock, seconds: float, build: float = 0.0, after: float = 0.0, fails_at: int = 0
    ) -> None:
        super().__init__(0, 1, GRAPH, Computation("cpu", None))
        self.backend, self.seconds, self.took = name, build, seconds
        self.clock, self.after, self.calls, self.fails_at = clock, after, 0, fails_at

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        self.clock.now += self.took
        self.calls += 1
        if self.calls == self.fails_at:
            self.uncompiled = "running it failed"
        Timed.last = self
        return inputs

    def native(self, *inputs: Any) -> tuple[Any, ...]:
        self.clock.now += 0.01 * self.took + Timed.last.after
        return inputs

    last: "Timed"


GRAPH = plain_graph(network(), images())
PRIORS = {
    "plain": auto._Prior(0.002, 1.0),
    "library": auto._Prior(0.003, 0.8),
    "openvino": auto._Prior(0.02, 0.7),
    "inductor": auto._Prior(0.15, 0.75),
}


@pytest.fixture
def timings(tmp_path: Path) -> Timings:
    return Timings(tmp_path / "folder" / "backends.json")


Contest = Callable[..., tuple[Segment, list[str]]]


@pytest.fixture
def contest(clock: Clock, timings: Timings, monkeypatch: pytest.MonkeyPatch) -> Contest:
    """Runs ``choose`` among segments of given times; returns its choice, and what it built."""
    monkeypatch.setattr(auto, "_PRIORS", PRIORS)

    def run(first: dict[str, Any], rivals: dict[str, dict[str, Any]], steps: float, case: str = "case") -> Any:
        built: list[str] = []

        def build(name: str) -> Segment:
            built.append(name)
            segment = Timed(name, clock, **{k: v for k, v in rivals[name].items() if k != "broken"})
            if rivals[name].get("broken"):
                segment.uncompiled = "no such operator"
            return segment

        chosen = choose(Timed("library", clock, **first), build, list(rivals), [images()], steps, case, timings)
        return chosen, built

    return run


def test_the_fastest_is_chosen(contest: Contest) -> None:
    rivals = {"plain": {"seconds": 1.2}, "openvino": {"seconds": 0.7}, "inductor": {"seconds": 0.8}}
    chosen, built = contest({"seconds": 1.0}, rivals, steps=1e6)
    assert chosen.backend == "openvino"
    assert built == ["plain", "openvino", "inductor"]
    assert chosen.notes == ("auto: openvino 710.0 ms, inductor 810.0 ms, library 1.0 s, plain 1.2 s",)


def test_what_the_next_operator_pays_counts(contest: Contest) -> None:
    rivals = {"openvino": {"seconds": 0.9, "after": 0.3}, "inductor": {"seconds": 0.95}}
    assert contest({"seconds": 1.0}, rivals, steps=1e6)[0].backend == "inductor"


def test_a_tie_stays_with_the_first(contest: Contest) -> None:
    assert contest({"seconds": 1.0}, {"openvino": {"seconds": 0.99}}, steps=1e6)[0].backend == "library"


def test_nothing_is_even_timed_for_a_few_steps(contest: Contest, clock: Clock) -> None:
    """Where taking turns would cost more than there is to gain."""
    chosen, built = contest({"seconds": 1.0}, {"openvino": {"seconds": 0.1}}, steps=10)
    assert (chosen.backend, built, clock.now) == ("library", [], 0)
    assert chosen.notes == ("auto: nothing tried, with 10 steps ahead",)


def test_nothing_is_built_for_a_few_steps(contest: Contest) -> None:
    """The rule: built only if the expected gain times the steps is more than the building takes."""
    rivals = {"openvino": {"seconds": 0.1}, "inductor": {"seconds": 0.1}}
    chosen, built = contest({"seconds": 0.0001}, rivals, steps=100)
    assert (chosen.backend, built) == ("library", [])
    (note,) = chosen.notes
    assert note.startswith("auto: nothing tried; openvino takes ")


def test_a_call_that_was_held_up_is_not_what_calls_take(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine some take long: what might be gained is counted by the least."""
    held_up = iter([0.2, 0.1, 0.001])
    monkeypatch.setattr(auto, "_seconds", lambda *_: next(held_up, 0.001))
    monkeypatch.setattr(auto, "_SHORT", 1.0)
    _, built = contest({"seconds": 0.001}, {"openvino": {"seconds": 0.0001}}, steps=100)
    assert built == []


def test_the_steps_decide_what_is_built(contest: Contest) -> None:
    """Over the horizons the quick builds come first, each from where it pays."""
    seen = []
    for steps in (10, 100, 1000, 10000, 100000):
        rivals = {name: {"seconds": 0.02} for name in ("plain", "openvino", "inductor")}
        seen.append(len(contest({"seconds": 0.02}, rivals, steps, case=str(steps))[1]))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 3)
    assert len(set(seen)) > 2


def test_what_can_t_be_built_is_left_out(contest: Contest, timings: Timings) -> None:
    rivals = {"openvino": {"seconds": 0.1, "broken": True}, "inductor": {"seconds": 0.9}}
    chosen, _ = contest({"seconds": 1.0}, rivals, steps=1e6)
    assert chosen.backend == "inductor"
    assert "openvino can't run it" in chosen.notes[0]
    assert timings.get("case").keys() == {"library", "inductor"}


def test_taking_turns_costs_a_hundredth(contest: Contest, clock: Clock) -> None:
    """At least three turns each, whatever they cost, and never more than fifteen."""
    before = clock.now
    contest({"seconds": 1.0}, {"plain": {"seconds": 1.0}}, steps=1e5, case="many")
    assert clock.now - before < 2 * 1.02 * 16 + 2
    before = clock.now
    contest({"seconds": 1.0}, {"plain": {"seconds": 1.0}}, steps=700, case="few")
    assert clock.now - before < 2 * 1.02 * 5 + 2


# ---- what is remembered


def test_nothing_is_measured_twice(contest: Contest, timings: Timings) -> None:
    rivals = {"openvino": {"seconds": 0.5, "build": 2.0}, "inductor": {"seconds": 0.4, "build": 60.0}}
    assert contest({"seconds": 1.0}, rivals, steps=1e6)[0].backend == "inductor"
    chosen, built = contest({"seconds": 1.0}, rivals, steps=1e6)
    assert (chosen.backend, built) == ("inductor", ["inductor"])
    assert chosen.notes[0].endswith("measured before; counted for 1000000 steps, with the building")
    chosen, built = contest({"seconds": 1.0}, rivals, steps=100)
    assert (chosen.backend, built) == ("openvino", ["openvino"])
    chosen, built = contest({"seconds": 1.0}, rivals, steps=3)
    assert (chosen.backend, built) == ("library", [])


def test_what_was_never_worth_measuring_is_no_reason_to_measure_the_rest_again(contest: Contest, clock: Clock) -> None:
    """Inductor takes too long to build for so few steps, each time; what OpenVINO was seen to win decides."""
    rivals = {"openvino": {"seconds": 0.5, "build": 2.0}, "inductor": {"seconds": 0.4, "build": 60.0}}
    chosen, built = contest({"seconds": 1.0}, rivals, steps=100)
    assert (chosen.backend, built) == ("openvino", ["openvino"])
    before = clock.now
    chosen, built = contest({"seconds": 1.0}, rivals, steps=100)
    assert (chosen.backend, built, clock.now) == ("openvino", ["openvino"], before)
    note = chosen.notes[0]
    assert note.startswith(
        "auto: openvino 510.0 ms, library 1.0 s, measured before; counted for 100 steps, with the building"
    )
    assert "; inductor takes " in note
    chosen, built = contest({"seconds": 1.0}, rivals, steps=1e6)  # now it is worth it
    assert (chosen.backend, built) == ("inductor", ["inductor", "openvino"])


def test_what_lost_is_not_built_to_measure_another(contest: Contest) -> None:
    rivals = {"openvino": {"seconds": 2.0}, "inductor": {"seconds": 0.4}}
    contest({"seconds": 1.0}, {"openvino": rivals["openvino"]}, steps=1e6)
    chosen, built = contest({"seconds": 1.0}, rivals, steps=1e6)
    assert (chosen.backend, built) == ("inductor", ["inductor"])


def test_what_can_t_be_built_is_no_reason_to_build_what_is_known(contest: Contest) -> None:
    rivals = {"openvino": {"seconds": 0.5}, "inductor": {"seconds": 0.4, "broken": True}}
    contest({"seconds": 1.0}, {"openvino": rivals["openvino"]}, steps=1e6)
    chosen, built = contest({"seconds": 1.0}, rivals, steps=1e6)
    assert (chosen.backend, built) == ("openvino", ["inductor", "openvino"])  # the one that was chosen
    assert chosen.notes[0].endswith("with the building; inductor can't run it: no such operator")


@pytest.mark.parametrize("fails_at", [1, 3])
def test_what_fails_in_its_turns_is_neither_chosen_nor_remembered(
    contest: Contest, timings: Timings, fails_at: int
) -> None:
    """What it took is the time of what ran in its place."""
    rivals = {"openvino": {"seconds": 0.1, "fails_at": fails_at}, "inductor": {"seconds": 0.9}}
    chosen, _ = contest({"seconds": 1.0}, rivals, steps=1e6)
    assert chosen.backend == "inductor"
    assert chosen.notes == ("auto: inductor 910.0 ms, library 1.0 s; openvino failed: running it failed",)
    assert timings.get("case").keys() == {"inductor", "library"}


def test_a_first_choice_that_fails_in_its_turns(contest: Contest, timings: Timings) -> None:
    chosen, _ = contest({"seconds": 1.0, "fails_at": 5}, {"plain": {"seconds": 1.0}}, steps=1e6)
    assert chosen.backend == "plain"
    assert timings.get("case").keys() == {"plain"}


def test_a_remembered_choice_that_can_t_be_built_any_more(contest: Contest) -> None:
    contest({"seconds": 1.0}, {"openvino": {"seconds": 0.5}}, steps=1e6)
    chosen, built = contest({"seconds": 1.0}, {"openvino": {"seconds": 0.5, "broken": True}}, steps=1e6)
    assert (chosen.backend, built) == ("library", ["openvino"])


def test_timings_of_several_processes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "backends.json"
    one, other = Timings(path), Timings(path)
    one.add("a", {"plain": Times(1.0, 0.5)})
    other.add("b", {"plain": Times(2.0, 0.5)})
    one.add("a", {"library": Times(0.5, 0.25)})
    assert Timings(path).get("a") == {"plain": (1.0, 0.5), "library": (0.5, 0.25)}
    assert Timings(path).get("b") == {"plain": (2.0, 0.5)}
    assert [p.name for p in path.parent.iterdir()] == ["backends.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"a": 1}',
        '{"a": {"plain": [1]}}',
        '{"a": {"plain": "xy"}}',
        "null",
        "[" * 10**5,
        f'{{"a": {{"plain": [{"9" * 400}, 1]}}}}',
        '{"a": {"plain": [-1, 0.1], "library": [NaN, 1], "openvino": [1, Infinity], "inductor": [0, 1]}}',
    ],
)
def test_an_unreadable_file_is_measured_again(text: str, tmp_path: Path) -> None:
    path = tmp_path / "backends.json"
    path.write_text(text)
    timings = Timings(path)
    assert timings.get("a") == {}
    timings.add("a", {"plain": Times(1.0, 0.5)})
    assert json.loads(path.read_text()) == {"a": {"plain": [1.0, 0.5]}}


class Table(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(5, 3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x]


@pytest.mark.parametrize("make", [lambda dtype: nn.Sequential(nn.Embedding(5, 3, dtype=dtype)), Table])
def test_a_case_is_of_one_dtype(make: Callable[[torch.dtype], nn.Module]) -> None:
    """Of the weights, where the inputs are indices."""
    x = torch.tensor([1, 2, 3])
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    cases = [case_of(plain_graph(make(dtype), x), [x], None, torch.device("cpu")) for dtype in dtypes]
    assert len(set(cases)) == 3
    assert cases[0] == cases[3]


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in every process; nothing is written anywhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    timings = Timings()
    timings.add("a", {"plain": Times(1.0, 0.5)})
    assert timings.get("a") == {"plain": (1.0, 0.5)}
    assert Timings().get("a") == {}


def test_a_folder_that_can_t_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timings = Timings(tmp_path / "file" / "backends.json")
    with pytest.warns(UserWarning, match="the times of backends can't be kept: .*measures them again"):
        timings.add("a", {"plain": Times(1.0, 0.5)})
    assert timings.get("a") == {"plain": (1.0, 0.5)}


# ---- in a model


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every backend is worth building; what was built, in order."""
    names: list[str] = []

    def compiler(name: str) -> Any:
        def compile(module: Any, inputs: Any, autocast: Any) -> Any:
            names.append(name)
            return module.forward

        return compile

    free = {name: prior._replace(build=0.0) for name, prior in auto._PRIORS.items()}
    monkeypatch.setattr(auto, "_PRIORS", free)
    monkeypatch.setattr("fxfreeze.builder.rivals", lambda segment: ["inductor"])
    monkeypatch.setitem(BACKENDS, "inductor", Backend(BACKENDS["plain"].passes, compiler("inductor")))
    return names


def trained(net: nn.Module) -> tuple[Any, torch.optim.Optimizer, FreezeScheduler]:
    model = fxfreeze.compile(net, Milestones({"stem": 0}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, FreezeScheduler(optimizer, model)


def test_a_validation_batch_decides_nothing(tried: list[str]) -> None:
    model, _, scheduler = trained(network())
    with torch.no_grad():
        model.eval()(images())
        model.train()(images())
    model.eval()(images())
    assert not tried
    assert not scheduler.state_dict()["decisions"]["segments"]
    model.train()(images())
    assert tried == ["inductor"]
    assert len(scheduler.state_dict()["decisions"]["segments"]) == 1
    model(images())
    assert tried == ["inductor"]


def test_turns_are_not_calls_that_training_made(tried: list[str]) -> None:
    """They had few samples too."""
    model, _, _ = trained(network())
    model(images())
    (segment,) = model.prefix.segments
    assert any("inductor " in note and "library " in note for note in segment.notes)
    assert segment.times.median is None


def test_what_was_decided_serves_validation_too(tried: list[str]) -> None:
    model, _, _ = trained(network())
    with torch.no_grad():
        model.eval()(images())
    model.train()(images())
    with torch.no_grad():
        model.eval()(images())
    assert {id(s) for s in model.prefix.segments} == {id(s) for s in model._derived.surgery.prefix.segments}
    assert not model.prefix.segments[0].undecided


def test_a_resumed_run_obeys(tried: list[str]) -> None:
    net = network()
    model, _, scheduler = trained(copy.deepcopy(net))
    model(images())
    (decision,) = (state := json.loads(json.dumps(scheduler.state_dict())))["decisions"]["segments"]
    tried.clear()
    resumed, _, again = trained(copy.deepcopy(net))
    again.load_state_dict(state)
    resumed(images())
    assert resumed.prefix.segments[0].runs_by == decision["backend"]
    assert len(tried) == (decision["backend"] == "inductor")
    assert again.state_dict()["decisions"] == state["decisions"]


def test_auto_trains_as_the_original() -> None:
    net = network()
    model, optimizer, scheduler = trained(copy.deepcopy(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            x = images()
            with torch.no_grad():
                expected = model.original.eval()(x)
                assert relative_error(model.eval()(x), expected) <= BOUNDS[torch.float32]
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()
            scheduler.step()
    assert "auto: " in str(model.prefix)


def test_a_network_that_no_library_speeds_up_runs_plain() -> None:
    model = frozen_to("blocks.0", network(torch.float64), backend="auto")
    model(images(dtype=torch.float64))
    assert model.prefix.segments[0].backend == "plain"


@pytest.mark.parametrize(("step", "expected"), [(None, math.inf), (0, 10), (10, 20), (30, math.inf)])
def test_until_the_next_freeze(step: int | None, expected: float) -> None:
    schedule = Milestones({"stem": 10, "blocks.0": 30})
    units = fxfreeze.compile(network(), schedule).units
    assert until_next_freeze(schedule, units, step) == expected


def test_after_the_last_freeze_the_end_counts() -> None:
    schedule = FreezeOut(100)
    units = fxfreeze.compile(network(), schedule).units
    last = max(step for step in schedule.freeze_steps(units) if step is not None and step < 100)
    assert until_next_freeze(schedule, units, last) == 100 - last
    assert until_next_freeze(schedule, units, last - 1) == 1
