"""The comparison: taking turns, the length of plain-short, the correction for drift, stopping, and FLOPs."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from tiny import SETTINGS, Log, after, arena, lineup, make_run, net, never
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxfreeze import compare as engine
from fxfreeze.batches import Split
from fxfreeze.cache.loader import CachedLoader
from fxfreeze.compare import Trial, compare, interleave, step_flops
from fxfreeze.recipes import CACHED, FROM_SCRATCH, SHORTS, Recipe, plain, plain_short
from fxfreeze.train import Record, Run


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


def uncached() -> list[Recipe]:
    return [recipe for name, recipe in lineup().items() if name != CACHED]


def full(watch: engine.Watch = Log(), block: int = 4) -> Trial:  # noqa: B008
    return compare(net(), arena(block=block), uncached(), shorts=["plain-short"], watch=watch, stop=never)


@pytest.fixture(scope="module")
def trial() -> Trial:
    return full()


@pytest.fixture(scope="module")
def cached_trial() -> Trial:
    """All rows; the cache stores whatever it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CachedLoader.__init__.__kwdefaults__, "when", "always")
        return compare(net(), arena(), list(lineup().values()), shorts=list(SHORTS), watch=Log(), stop=never)


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
    assert len(log.seen) >= 4 * 4


def test_no_run_is_always_first_in_turn() -> None:
    runs = [make_run(name) for name in lineup()]
    log = Log()
    interleave(runs, arena(block=5), log, never)
    order = [name for i, (name, _) in enumerate(log.seen) if i == 0 or log.seen[i - 1][0] != name]
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert {names[0] for names in rounds} == set(lineup())


def test_all_contenders_start_alike_and_see_the_same_batches(trial: Trial) -> None:
    first = {row.record.losses[0] for row in trial.rows.values()}
    assert len(first) == 1
    assert trial.rows["freezeout"].record.depths == trial.rows["fxfreeze"].record.depths


def test_comparing_leaves_the_network_and_the_random_state_alone() -> None:
    start = net()
    before, random = copy.deepcopy(start.state_dict()), torch.get_rng_state()
    compare(start, arena(), [plain(4)], shorts=[], watch=Log(), stop=never)
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

    def slower(name: str, steps: int) -> Recipe:
        clock.step = 2.0
        return plain_short(name, steps)

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


# ---- the cache, and a rival to each freezing row


def test_the_cached_row_trains_as_without(cached_trial: Trial) -> None:
    rows = cached_trial.rows
    assert list(rows) == list(FROM_SCRATCH)
    assert cached_trial.finished
    assert rows[CACHED].record.losses == rows["fxfreeze"].record.losses
    assert rows[CACHED].record.depths == rows["fxfreeze"].record.depths
    assert [each.accuracy for each in rows[CACHED].record.evaluations] == [
        each.accuracy for each in rows["fxfreeze"].record.evaluations
    ]
    assert torch.equal(rows[CACHED].correct, rows["fxfreeze"].correct)
    assert rows[CACHED].units == rows["fxfreeze"].units
    assert rows[CACHED].build_seconds > 0
    assert {name for name, row in rows.items() if row.cache is not None} == {CACHED}


def test_the_cached_row_is_spared_the_forward_of_what_it_read(cached_trial: Trial) -> None:
    row = cached_trial.rows[CACHED]
    counts = step_flops(net(), arena().train, 8, range(5))
    spared = sum(counts.frozen[served] for served in row.record.served)
    assert spared > 0
    assert row.flops == cached_trial.rows["fxfreeze"].flops - spared
    assert row.cache is not None
    assert sum(count for epoch in row.cache.epochs for count in epoch["samples"].values()) == 8 * row.steps


def test_each_rival_takes_the_time_of_its_row(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second, those of the cached row of half a second: in 30 of them plain takes 15."""
    original = Run._step

    def step(run: Run) -> Tensor:
        clock.step = 0.5 if run.recipe.name == CACHED else 1.0
        return original(run)

    monkeypatch.setattr(Run, "_step", step)
    log = Log()
    outcome = compare(net(), arena(), list(lineup().values()), shorts=list(SHORTS), watch=log, stop=never)
    assert {name: row.steps for name, row in outcome.rows.items() if name in SHORTS} == {
        "plain-short": 30,
        "plain-short+cache": 15,
    }
    assert all(row.steps == row.planned for row in outcome.rows.values())
    assert {name: row.seconds for name, row in outcome.rows.items() if name in SHORTS} == {
        "plain-short": pytest.approx(outcome.rows["fxfreeze"].seconds),
        "plain-short+cache": pytest.approx(outcome.rows[CACHED].seconds),
    }
    assert outcome.identical == pytest.approx(1)
    assert outcome.rows["plain-short+cache"].about.endswith("to take the time that fxfreeze+cache took")
    order = [name for name, _ in log.seen if name in SHORTS]
    assert order == sorted(order)  # one after the other


def test_the_rival_of_the_cached_row_needs_no_other_freezing_row() -> None:
    recipes = [lineup()["plain"], lineup()[CACHED]]
    outcome = compare(net(), arena(), recipes, shorts=["plain-short+cache"], watch=Log(), stop=never)
    assert list(outcome.rows) == ["plain", CACHED, "plain-short+cache"]
    assert outcome.finished


def test_stopping_between_the_rivals_keeps_the_first() -> None:
    seen = Log()

    def stop() -> bool:
        return bool(seen.seen) and seen.seen[-1][0] == "plain-short" and short_is_done()

    planned: list[int] = []

    def watch(name: str, run: Run) -> None:
        seen(name, run)
        planned[:] = [run.recipe.steps]

    def short_is_done() -> bool:
        return seen.seen[-1][1] == planned[0]

    outcome = compare(net(), arena(), list(lineup().values()), shorts=list(SHORTS), watch=watch, stop=stop)
    assert list(outcome.rows) == [name for name in FROM_SCRATCH if name != "plain-short+cache"]
    assert all(row.steps == row.planned for row in outcome.rows.values())
    assert outcome.identical is not None
    assert not outcome.finished


@pytest.mark.parametrize("taken", [0, 1])
def test_stopping_in_the_probe_of_the_second_rival_keeps_the_first(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is stopped before its first step, and after it."""
    monkeypatch.setattr(engine, "PROBE_SHARE", 1)  # of four steps
    stopped, started = [False], [0]
    original = engine.alternate

    def alternate(run: Run, probe: Run, *rest: object) -> object:
        started[0] += 1
        if started[0] == 2:
            train = probe.train

            def cut(steps: int, stop: Callable[[], bool]) -> None:
                train(taken)
                stopped[0] = True

            monkeypatch.setattr(probe, "train", cut)
        return original(run, probe, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "alternate", alternate)
    recipes = list(lineup().values())
    outcome = compare(net(), arena(), recipes, shorts=list(SHORTS), watch=Log(), stop=lambda: stopped[0])
    assert list(outcome.rows) == [name for name in FROM_SCRATCH if name != "plain-short+cache"]
    assert not outcome.finished


# ---- stopping


def test_stopping_scores_what_was_trained() -> None:
    outcome = compare(net(), arena(), uncached(), shorts=["plain-short"], watch=Log(), stop=after(43))
    assert not outcome.finished
    assert "plain-short" not in outcome.rows
    assert all(0 < row.steps < row.planned for row in outcome.rows.values())
    # One of them stopped where validation was not due.
    assert any(row.steps % (row.planned // engine.LEAST_EVALUATIONS) for row in outcome.rows.values())
    for row in outcome.rows.values():
        assert row.record.evaluations[-1].step == row.steps
        assert len(row.correct) == 40


def test_stopping_before_the_first_step_leaves_no_rows() -> None:
    outcome = compare(net(), arena(), uncached(), shorts=["plain-short"], watch=Log(), stop=after(0))
    assert outcome.rows == {}
    assert not outcome.finished


def test_stopping_in_plain_short_keeps_its_steps() -> None:
    seen = Log()
    outcome = compare(
        net(),
        arena(),
        uncached(),
        shorts=["plain-short"],
        watch=seen,
        stop=lambda: ("plain-short", 4) in seen.seen,
    )
    assert outcome.rows["plain-short"].steps == 4 < outcome.rows["plain-short"].planned
    assert outcome.rows["plain"].steps == 20
    assert not outcome.finished


def test_stopping_before_plain_short_is_not_the_end() -> None:
    main = Log()
    assert compare(net(), arena(), uncached(), shorts=[], watch=main, stop=never).finished
    seen = Log()
    outcome = compare(
        net(),
        arena(),
        uncached(),
        shorts=["plain-short"],
        watch=seen,
        stop=lambda: len(seen.seen) == len(main.seen),
    )
    assert all(row.steps == row.planned for row in outcome.rows.values())
    assert not outcome.finished


def test_stopping_in_the_first_block_of_the_probe_leaves_plain_short_out() -> None:
    main = Log()
    compare(net(), arena(), uncached(), shorts=[], watch=main, stop=never)
    seen, calls = Log(), [0]

    def stop() -> bool:  # asked once before plain-short begins, then before each step of its probe
        calls[0] += len(seen.seen) == len(main.seen)
        return calls[0] > 3

    outcome = compare(net(), arena(), uncached(), shorts=["plain-short"], watch=seen, stop=stop)
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
    assert counted.step == {0: 6 * (2 * convolution + 3 * linear), 1: 6 * (convolution + 2 * linear)}
    assert counted.frozen == {0: 0, 1: 6 * convolution}
    # Three steps: nothing frozen; frozen and computed; frozen and read.
    spent = counted.of(Record(depths=[0, 1, 1], served=[0, 0, 1]))
    assert spent == 6 * (2 * convolution + 3 * linear) + 6 * (convolution + 2 * linear) + 6 * (2 * linear)


def test_step_flops_are_those_of_a_whole_batch() -> None:
    field = arena()
    images, labels = field.train.images[:8], field.train.labels[:8]
    tiny = net()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(tiny(images), labels).backward()
    assert step_flops(net(), field.train, 8, [0]).step[0] == counter.get_total_flops()


def test_flops_fall_with_depth_and_counting_leaves_no_trace() -> None:
    tiny = net()
    before, random = copy.deepcopy(tiny.state_dict()), torch.get_rng_state()
    counts = step_flops(tiny, arena().train, 8, range(5))
    whole, frozen = list(counts.step.values()), list(counts.frozen.values())
    assert sorted(whole, reverse=True) == whole
    assert sorted(frozen) == frozen
    assert len(set(whole)) == len(set(frozen)) == 5
    assert all(part < all_of_it for part, all_of_it in zip(frozen, whole, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tiny.state_dict().items())
    assert all(parameter.requires_grad for parameter in tiny.parameters())


def test_flops_of_a_row_are_summed_over_its_depths(trial: Trial) -> None:
    counts = step_flops(net(), arena().train, 8, range(5))
    freezing = trial.rows["fxfreeze"]
    assert trial.rows["plain"].flops == 20 * counts.step[0]
    total = sum(counts.step[depth] for depth in freezing.record.depths)
    assert freezing.flops == trial.rows["freezeout"].flops == total
