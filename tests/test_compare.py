"""The comparison: taking turns, the length of plain-short, the correction for drift, FLOPs, and the contests."""

import copy
import dataclasses

import pytest
import torch
from tiny import SETTINGS, Flat, Tiny, after, arena, lineup, make_run, net, never
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxfreeze import compare as engine
from fxfreeze.batches import Split
from fxfreeze.compare import Trial, compare, interleave, step_flops
from fxfreeze.contest import Finetune, FromScratch, choose, run_trial
from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import Recipe, plain
from fxfreeze.task import Task
from fxfreeze.train import Run


class Log:
    """Notes the step that each run stands at when it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __call__(self, name: str, run: Run) -> None:
        self.seen.append((name, run.step))


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


def test_blocks_of_plain_stand_between_those_of_plain_short(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    original = Run.train

    def note(run: Run, steps: int, *rest: object) -> None:
        original(run, steps, *rest)  # type: ignore[arg-type]
        taken.append((run.recipe.name, steps))

    run, probe = make_run("plain"), make_run("plain")
    run.recipe = dataclasses.replace(run.recipe, name="plain-short")
    monkeypatch.setattr(Run, "train", note)
    engine.alternate(run, probe, arena(block=8), Log(), never)
    assert run.done
    probes = [i for i, (name, _) in enumerate(taken) if name == "plain"]
    assert [taken[i][1] for i in probes] == [2, 2, 2]
    between = [sum(steps for _, steps in taken[a + 1 : b]) for a, b in zip(probes, [*probes[1:], None], strict=True)]
    assert between == [8, 8, 4]


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


# ---- contests


@pytest.fixture
def task() -> Task:
    field = arena()
    return Task("tiny:Tiny", "tiny:data", field.train, field.val, field.test, 4, 1, 6)


def test_a_task_builds_the_same_network_for_the_same_seed(task: Task) -> None:
    first, again, other = task.build(0), task.build(0), task.build(1)
    assert torch.equal(first.get_parameter("fc.weight"), again.get_parameter("fc.weight"))
    assert not torch.equal(first.get_parameter("fc.weight"), other.get_parameter("fc.weight"))


def test_from_scratch_scales_the_steps_of_freezing_rows(task: Task) -> None:
    contest = FromScratch(task, SETTINGS)
    assert {name: recipe.steps for name, recipe in contest.recipes.items()} == {
        "plain": 20,
        "freezeout": 30,
        "fxfreeze": 30,
    }


def test_finetuning_goes_on_to_other_classes_with_a_new_head(task: Task) -> None:
    contest = Finetune(task, SETTINGS)
    assert contest.source.num_classes == contest.task.num_classes == 2
    originals = {tuple(image.flatten().tolist()) for image in contest.source.train.images}
    assert not originals & {tuple(image.flatten().tolist()) for image in contest.task.train.images}
    assert set(contest.task.test.labels.tolist()) == {0, 1}

    log = Log()
    start = contest.start(5, log, never)
    assert isinstance(start, Tiny)
    assert log.seen[-1] == ("pretrain", contest.source.steps(SETTINGS))
    fresh = contest.task.build(5)
    assert torch.equal(start.fc.weight, fresh.get_parameter("fc.weight"))
    assert not torch.equal(start.block1[0].weight, fresh.get_parameter("block1.0.weight"))


def test_finetuning_freezes_every_unit_but_the_head(task: Task) -> None:
    contest = Finetune(task, SETTINGS)
    rows = ["plain", "by-hand", "fxfreeze", "freezeout", "plain-short"]
    outcome = run_trial(contest, SETTINGS, rows, 4, Log(), never)
    assert outcome is not None
    assert list(outcome.rows) == rows
    assert set(outcome.rows["fxfreeze"].record.depths) == set(outcome.rows["by-hand"].record.depths) == {4}
    assert outcome.rows["fxfreeze"].flops == outcome.rows["by-hand"].flops < outcome.rows["plain"].flops
    assert outcome.rows["fxfreeze"].record.losses == pytest.approx(outcome.rows["by-hand"].record.losses, rel=1e-3)
    assert outcome.rows["freezeout"].record.depths[0] == 0


def test_finetuning_stopped_while_pretraining_has_no_start(task: Task) -> None:
    assert Finetune(task, SETTINGS).start(0, Log(), after(1)) is None
    assert run_trial(Finetune(task, SETTINGS), SETTINGS, ["plain"], 4, Log(), after(1)) is None


def test_finetuning_needs_four_classes(task: Task) -> None:
    with pytest.raises(ChoiceError, match="tiny:data has 3, expected 4 or more"):
        Finetune(task.of_classes(range(3)), SETTINGS)


def test_a_network_of_one_unit_is_refused(task: Task) -> None:
    flat = dataclasses.replace(task, model=f"{Flat.__module__}:{Flat.__name__}")
    for contest in (FromScratch, Finetune):
        with pytest.raises(ChoiceError, match="one unit"):
            contest(flat, SETTINGS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["plain", "frezeout"], "'frezeout'; expected some of plain,freezeout,fxfreeze,plain-short"),
        (["plain", "plain-short"], "plain-short, whose length follows from plain and fxfreeze"),
        ([""], "''; expected some of"),
    ],
)
def test_impossible_rows_are_refused(rows: list[str], message: str, task: Task) -> None:
    with pytest.raises(ChoiceError, match=message):
        choose(FromScratch(task, SETTINGS), rows)


def test_rows_come_in_one_order(task: Task) -> None:
    assert choose(FromScratch(task, SETTINGS), ["fxfreeze", "plain"]) == ["plain", "fxfreeze"]
    assert choose(FromScratch(task, SETTINGS), None) == ["plain", "freezeout", "fxfreeze", "plain-short"]
