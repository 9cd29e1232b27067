"""The comparison: taking turns, the length of plain-short, the correction for drift, stopping, and FLOPs."""

import copy
import dataclasses

import pytest
import torch
from tiny import SETTINGS, Log, after, arena, lineup, make_run, net, never
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxfreeze import compare as engine
from fxfreeze.batches import Split
from fxfreeze.compare import Trial, compare, interleave, step_flops
from fxfreeze.recipes import Recipe, plain
from fxfreeze.train import Run


class Clock:
    """Stands in for perf_counter: `step` seconds pass in each step of any run, and none elsewhere."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.step = 0.0, 1.0
        original = Run._step

        def timed(run: Run) -> Tensor:
            self.now += self.step
            return original(run)

        monkeypatch.setattr(Run, "_step", timed)
        monkeypatch.setattr("fxfreeze.train.time.perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def full(watch: engine.Watch = Log(), block: int = 4) -> Trial:  # noqa: B008
    return compare(net(), arena(block=block), list(lineup().values()), short=True, watch=watch, stop=never)


@pytest.fixture(scope="module")
def trial() -> Trial:
    return full()


# ---- taking turns


def test_turns_keep_all_runs_at_the_same_share_of_their_training() -> None:
    runs = [make_run(name) for name in lineup()]
    log, shares = Log(), []

    def watch(name: str, run: Run) -> None:
        log(name, run)
        shares.append(max(r.step / r.recipe.steps for r in runs) - min(r.step / r.recipe.steps for r in runs))

    interleave(runs, arena(block=5), watch, never)
    assert all(run.done for run in runs)
    assert max(shares) <= 5 / 20 + 1 / 30  # a block, and a step for rounding
    assert len(log.seen) >= 3 * 4


def test_no_run_is_always_first_in_turn() -> None:
    runs = [make_run(name) for name in lineup()]
    log = Log()
    interleave(runs, arena(block=5), log, never)
    order = [name for i, (name, _) in enumerate(log.seen) if i == 0 or log.seen[i - 1][0] != name]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert {names[0] for names in rounds} == {"plain", "freezeout", "fxfreeze"}


def test_all_contenders_start_alike_and_see_the_same_batches(trial: Trial) -> None:
    first = {row.record.losses[0] for row in trial.rows.values()}
    assert len(first) == 1
    assert trial.rows["freezeout"].record.depths == trial.rows["fxfreeze"].record.depths


def test_comparing_leaves_the_network_and_the_random_state_alone() -> None:
    start = net()
    before, random = copy.deepcopy(start.state_dict()), torch.get_rng_state()
    compare(start, arena(), [plain(4)], short=False, watch=Log(), stop=never)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[key]) for key, tensor in start.state_dict().items())


def test_rows_are_what_the_recipes_ask_for(trial: Trial) -> None:
    assert list(trial.rows) == ["plain", "freezeout", "fxfreeze", "plain-short"]
    assert [trial.rows[name].steps for name in ("plain", "freezeout", "fxfreeze")] == [20, 30, 30]
    assert all(row.steps == row.planned for row in trial.rows.values())
    assert trial.finished
    assert trial.rows["fxfreeze"].build_seconds > 0
    assert {row.build_seconds for name, row in trial.rows.items() if name != "fxfreeze"} == {0}


def test_validation_is_scored_along_the_way_and_at_the_end(trial: Trial) -> None:
    for row in trial.rows.values():
        steps = [evaluation.step for evaluation in row.record.evaluations]
        assert steps == sorted(set(steps))
        assert steps[-1] == row.steps
        assert len(steps) == pytest.approx(engine.LEAST_EVALUATIONS, abs=3)


def test_rates_reach_zero_unit_by_unit(trial: Trial) -> None:
    row = trial.rows["fxfreeze"]
    assert [len(rates) for _, rates in row.rates] == [len(row.units)] * 30
    for step, rates in row.rates:
        assert [rate == 0 for rate in rates] == [i < row.record.depths[step] for i in range(5)]


# ---- plain-short


def test_plain_short_takes_the_time_that_fxfreeze_took(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps of a second and three seconds of compiling and freezing, plain has time for 33 steps."""
    monkeypatch.setattr(Run, "build_seconds", property(lambda run: 3.0 if run.recipe.form == "surgery" else 0.0))
    original = Run.__init__

    def slow(run: Run, tiny: nn.Module, recipe: Recipe, *rest: object) -> None:
        original(run, tiny, recipe, *rest)  # type: ignore[arg-type]
        run.record.seconds += 3.0 if recipe.form == "surgery" else 0.0

    monkeypatch.setattr(Run, "__init__", slow)
    rows = full().rows
    assert rows["fxfreeze"].seconds == 33
    assert rows["plain-short"].planned == rows["plain-short"].steps == 33
    assert rows["plain-short"].seconds == pytest.approx(33)


def test_drift_is_measured_and_corrected(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine takes twice as long for everything once plain-short is on."""

    def slower(steps: int) -> Recipe:
        clock.step = 2.0
        return dataclasses.replace(plain(steps), name="plain-short")

    monkeypatch.setattr(engine, "plain_short", slower)
    outcome = full()
    short = outcome.rows["plain-short"]
    assert outcome.drift == pytest.approx(2)
    assert outcome.identical == pytest.approx(1)
    assert short.planned == 30
    assert short.raw_seconds == pytest.approx(60)
    assert short.seconds == pytest.approx(30)
    assert outcome.rows["plain"].seconds == outcome.rows["plain"].raw_seconds == 20


def test_a_machine_that_is_disturbed_for_a_while_changes_no_verdict(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen steps take less; in the last third of the training, everything takes five times as long."""
    original = Run._step

    def step(run: Run) -> Tensor:
        slow = 5.0 if run.step >= 0.7 * run.recipe.steps and run.recipe.name != "plain-short" else 1.0
        clock.step = slow * (0.5 if run.depth >= 2 else 1.0)
        return original(run)

    quiet = full()
    monkeypatch.setattr(Run, "_step", step)
    disturbed = full(block=2)
    frozen = sum(depth >= 2 for depth in quiet.rows["fxfreeze"].record.depths)
    assert frozen > 5
    short = disturbed.rows["plain-short"]
    assert short.planned == pytest.approx(30 - frozen / 2, abs=1)
    assert disturbed.rows["fxfreeze"].raw_seconds > 2 * disturbed.rows["fxfreeze"].seconds
    assert disturbed.rows["plain"].seconds == pytest.approx(20)
    assert disturbed.disturbed == pytest.approx(3 / (10 + 12), abs=0.05)
    assert quiet.disturbed == 0


def test_blocks_of_plain_stand_between_those_of_plain_short(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    original = Run.train

    def note(run: Run, steps: int, *rest: object) -> None:
        original(run, steps, *rest)  # type: ignore[arg-type]
        taken.append((run.recipe.name, steps))

    run, probe = make_run("plain"), make_run("plain")
    run.recipe = dataclasses.replace(run.recipe, name="plain-short")
    monkeypatch.setattr(Run, "train", note)
    engine.alternate(run, probe, arena(block=8), 1.0, Log(), never)
    assert run.done
    probes = [i for i, (name, _) in enumerate(taken) if name == "plain"]
    assert [taken[i][1] for i in probes] == [2, 2, 2]
    between = [sum(steps for _, steps in taken[a + 1 : b]) for a, b in zip(probes, [*probes[1:], None], strict=True)]
    assert between == [7, 6, 7]


def test_plain_short_anneals_its_own_cosine() -> None:
    outcome = full()
    short = outcome.rows["plain-short"]
    steps, rates = zip(*[(step, rate[0]) for step, rate in short.rates], strict=True)
    assert rates[0] == SETTINGS.lr
    assert rates[-1] < SETTINGS.lr / 2
    assert steps[-1] == pytest.approx(short.planned, abs=max(1, short.planned // 200))


# ---- stopping


def test_stopping_scores_what_was_trained() -> None:
    outcome = compare(net(), arena(), list(lineup().values()), short=True, watch=Log(), stop=after(43))
    assert not outcome.finished
    assert "plain-short" not in outcome.rows
    assert all(0 < row.steps < row.planned for row in outcome.rows.values())
    # One of them stopped where validation was not due.
    assert any(row.steps % (row.planned // engine.LEAST_EVALUATIONS) for row in outcome.rows.values())
    for row in outcome.rows.values():
        assert row.record.evaluations[-1].step == row.steps
        assert len(row.correct) == 40


def test_stopping_before_the_first_step_leaves_no_rows() -> None:
    outcome = compare(net(), arena(), list(lineup().values()), short=True, watch=Log(), stop=after(0))
    assert outcome.rows == {}
    assert not outcome.finished


def test_stopping_in_plain_short_keeps_its_steps() -> None:
    seen = Log()
    outcome = compare(
        net(),
        arena(),
        list(lineup().values()),
        short=True,
        watch=seen,
        stop=lambda: ("plain-short", 4) in seen.seen,
    )
    assert outcome.rows["plain-short"].steps == 4 < outcome.rows["plain-short"].planned
    assert outcome.rows["plain"].steps == 20
    assert not outcome.finished


def test_stopping_before_plain_short_is_not_the_end() -> None:
    main = Log()
    assert compare(net(), arena(), list(lineup().values()), short=False, watch=main, stop=never).finished
    seen = Log()
    outcome = compare(
        net(),
        arena(),
        list(lineup().values()),
        short=True,
        watch=seen,
        stop=lambda: len(seen.seen) == len(main.seen),
    )
    assert all(row.steps == row.planned for row in outcome.rows.values())
    assert not outcome.finished


def test_stopping_in_the_first_block_of_the_probe_leaves_plain_short_out() -> None:
    main = Log()
    compare(net(), arena(), list(lineup().values()), short=False, watch=main, stop=never)
    seen, calls = Log(), [0]

    def stop() -> bool:  # asked once before plain-short begins, then before each step of its probe
        calls[0] += len(seen.seen) == len(main.seen)
        return calls[0] > 3

    outcome = compare(net(), arena(), list(lineup().values()), short=True, watch=seen, stop=stop)
    assert list(outcome.rows) == ["plain", "freezeout", "fxfreeze"]
    assert outcome.identical is None
    assert not outcome.finished


# ---- FLOPs


def test_step_flops_by_hand() -> None:
    """A 1x1 convolution 1 -> 2 and a linear 2 -> 3, on 4 x 4 pixels: multiply and add as two."""
    tiny = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    split = Split(torch.randn(6, 1, 4, 4), torch.arange(6) % 3)
    convolution, linear = 2 * 16 * 1 * 2, 2 * 2 * 3
    counted = step_flops(tiny, split, 6, {0, 1})
    # The first layer's input needs no gradient; nor does that of the first live one.
    assert counted == {0: 6 * (2 * convolution + 3 * linear), 1: 6 * (convolution + 2 * linear)}


def test_step_flops_are_those_of_a_whole_batch() -> None:
    field = arena()
    images, labels = field.train.images[:8], field.train.labels[:8]
    tiny = net()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(tiny(images), labels).backward()
    assert step_flops(net(), field.train, 8, [0])[0] == counter.get_total_flops()


def test_flops_fall_with_depth_and_counting_leaves_no_trace() -> None:
    tiny = net()
    before, random = copy.deepcopy(tiny.state_dict()), torch.get_rng_state()
    counts = step_flops(tiny, arena().train, 8, range(5))
    assert sorted(counts.values(), reverse=True) == list(counts.values())
    assert len(set(counts.values())) == 5
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tiny.state_dict().items())
    assert all(parameter.requires_grad for parameter in tiny.parameters())


def test_flops_of_a_row_are_summed_over_its_depths(trial: Trial) -> None:
    counts = step_flops(net(), arena().train, 8, range(5))
    freezing = trial.rows["fxfreeze"]
    assert trial.rows["plain"].flops == 20 * counts[0]
    assert freezing.flops == trial.rows["freezeout"].flops == sum(counts[depth] for depth in freezing.record.depths)
