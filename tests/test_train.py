"""One run: its rates, forms of freezing, own random state, timing, and resuming bit for bit."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SETTINGS, Tiny, after, arena, lineup, make_run, net
from torch import Tensor, nn

from fxfreeze import checkpoint
from fxfreeze.batches import Batches, Split
from fxfreeze.cached import CachedBatches
from fxfreeze.imports import ChoiceError
from fxfreeze.model import FreezableModel
from fxfreeze.recipes import Recipe, Settings, finetune, plain, renew_head, units_of
from fxfreeze.schedule import Milestones
from fxfreeze.stored import Boundary
from fxfreeze.train import Run

FREEZES = (1, 4, 9, 17)  # of the 30 steps of a freezing run: 30 (0.3 + 0.7 i / 4)^3, rounded up


def tensors_of(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.net.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# ---- rates


def test_plain_rate_is_a_cosine_to_zero() -> None:
    run = make_run("plain")
    assert [run.lr(step) for step in (0, 10, 20)] == pytest.approx([0.05, 0.025, 0], abs=1e-12)
    run.train(11)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 10 / 20)) / 2)


def test_freezing_rates_come_from_the_schedule_alone() -> None:
    run = make_run("fxfreeze")
    run.train(10)
    assert run.optimizer.param_groups[0]["lr"] == 0.05
    assert run.rates(8)[:2] == [0, 0]
    t = (0.3 + 0.7 * 3 / 4) ** 3
    assert run.rates(8)[3] == pytest.approx(0.05 * (1 + math.cos(math.pi * 8 / (t * 30))) / 2)


# ---- forms


def test_surgery_and_marking_follow_the_same_trajectory() -> None:
    runs = [make_run(name, dtype=torch.float64) for name in ("freezeout", "fxfreeze")]
    for run in runs:
        run.train(30)
    marked, surgery = runs
    assert marked.record.depths == surgery.record.depths
    assert [surgery.record.depths.index(depth) for depth in (1, 2, 3, 4)] == list(FREEZES)
    assert surgery.record.losses == pytest.approx(marked.record.losses, rel=1e-8)
    assert marked.record.losses[-1] < 0.8 * marked.record.losses[0]


def test_only_surgery_runs_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(self: FreezableModel, args: tuple[Tensor], _: object) -> object:
        calls.append(self)
        return self.original(*args)

    monkeypatch.setattr(FreezableModel, "_run", stand_in)
    for name in ("plain", "freezeout", "fxfreeze"):
        run = make_run(name)
        run.train(3)
        assert len(calls) == (3 if name == "fxfreeze" else 0)


@pytest.mark.parametrize("name", ["freezeout", "fxfreeze"])
def test_frozen_units_never_change_again(name: str) -> None:
    run = make_run(name)
    run.train(FREEZES[1])
    assert run.depth == 2
    before = tensors_of(run)
    run.evaluate(arena().val)
    modes = {path: run.net.get_submodule(path).training for path in ("stem.1", "block1.1", "block2.1", "fc")}
    assert modes == {"stem.1": False, "block1.1": False, "block2.1": True, "fc": True}
    run.train(3)
    after_training = tensors_of(run)
    changed = {key for key in before if not torch.equal(before[key], after_training[key])}
    assert not any(key.startswith(("stem.", "block1.")) for key in changed)
    assert {"block2.0.weight", "block2.1.running_mean", "fc.weight"} <= changed


def by_hand() -> Run:
    tiny = net(torch.float64)
    field = arena(dtype=torch.float64)
    recipe = finetune(SETTINGS, 6, units_of(tiny, field.train.images[:2]))["by-hand"]
    return Run(tiny, recipe, SETTINGS, Batches(field.train, 8, SETTINGS.seed))


def test_by_hand_the_backbone_runs_without_a_tape_and_the_head_with_one() -> None:
    run, modes = by_hand(), {}
    for name in ("stem.0", "block3.0", "fc"):

        def note(*_: object, name: str = name) -> None:
            modes[name] = torch.is_grad_enabled()

        run.net.get_submodule(name).register_forward_hook(note)
    before = tensors_of(run)
    run.train(6)
    assert modes == {"stem.0": False, "block3.0": False, "fc": True}
    assert torch.is_grad_enabled()
    changed = {key for key, tensor in tensors_of(run).items() if not torch.equal(tensor, before[key])}
    assert changed == {"fc.weight", "fc.bias"}


def test_by_hand_agrees_with_surgery() -> None:
    hand = by_hand()
    field = arena(dtype=torch.float64)
    recipe = Recipe("fxfreeze", "", 6, "surgery", True, Milestones({"block3.0": 0}))
    surgery = Run(net(torch.float64), recipe, SETTINGS, Batches(field.train, 8, SETTINGS.seed))
    for run in (hand, surgery):
        run.train(6)
    assert hand.record.depths == surgery.record.depths == [4] * 6
    assert surgery.record.losses == pytest.approx(hand.record.losses, rel=1e-10)


class LooseHead(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_by_hand_refuses_a_head_parameter_that_no_module_owns() -> None:
    field = arena()
    recipe = Recipe("by-hand", "", 6, "by hand", True, Milestones({"block3.0": 0}))
    with pytest.raises(ChoiceError, match="owns parameters outside its modules"):
        Run(LooseHead(), recipe, SETTINGS, Batches(field.train, 8, 0))


def test_a_new_head_keeps_the_backbone() -> None:
    old, field = net(seed=1), arena()
    head = units_of(old, field.train.images[:2])[-1]
    renewed = renew_head(lambda: net(seed=2), old, head)
    fresh = net(seed=2)
    for key, tensor in renewed.state_dict().items():
        source = fresh if key.startswith("fc.") else old
        assert torch.equal(tensor, source.state_dict()[key]), key


def test_auxiliary_outputs_are_left_aside() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.tiny(x), x

    torch.manual_seed(0)
    double, single = Double(), net()
    runs = [Run(each, plain(3), SETTINGS, make_run("plain").batches) for each in (double, single)]
    for run in runs:
        run.train(3)
    assert runs[0].record.losses == runs[1].record.losses


# ---- the cache


@pytest.mark.usefixtures("storing")
def test_the_cache_changes_no_bit_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    original = CachedBatches.__next__

    def note(batches: CachedBatches) -> Any:
        given.append(original(batches))
        return given[-1]

    monkeypatch.setattr(CachedBatches, "__next__", note)
    computed, cached = make_run("fxfreeze"), make_run("fxfreeze+cache")
    for run in (computed, cached):
        run.train(30)
    assert cached.record.losses == computed.record.losses
    assert cached.record.depths == computed.record.depths
    assert_same(tensors_of(cached), tensors_of(computed))
    assert_same(cached._random, computed._random)
    for step, (images, labels) in enumerate(given):
        expected = computed.batches[step]
        assert torch.equal(labels, expected.labels)
        assert isinstance(images, Boundary) or torch.equal(images, expected.images)
    assert computed.cache is None
    assert computed.record.served == [0] * 30


@pytest.mark.usefixtures("storing")
def test_a_run_notes_what_the_cache_gave_it() -> None:
    """In the first epoch of ten batches there is nothing to read; in the second most batches have what is stored whole."""
    run = make_run("fxfreeze+cache")
    run.train(30)
    record, cache = run.record, run.cache
    assert cache is not None
    assert len(record.served) == len(record.depths) == 30
    assert record.served[:10] == [0] * 10
    assert all(served <= depth for served, depth in zip(record.served, record.depths, strict=True))
    assert sum(served > 0 for served in record.served) >= 10
    assert [sum(epoch["samples"].values()) for epoch in cache.epochs] == [80, 80, 80]
    assert cache.epochs[0]["samples"] == {"forward": 80}
    read = sum(count for epoch in cache.epochs for origin, count in epoch["samples"].items() if origin != "forward")
    assert read >= 8 * sum(served > 0 for served in record.served)
    assert sum(epoch["bytes"] for epoch in cache.epochs) > 0
    assert any("storing depth" in note for note in cache.notes)


@pytest.mark.parametrize("steps", [0, 3, 14, 30])
@pytest.mark.usefixtures("storing")
def test_the_stores_go_with_the_run(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = make_run("fxfreeze+cache")
    run.train(steps)
    assert len(list(tmp_path.iterdir())) == 1
    del run
    assert not list(tmp_path.iterdir())


def test_the_cache_says_nothing_while_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("fxfreeze+cache")
    run.train(15)
    assert capsys.readouterr() == ("", "")


# ---- taking turns


def test_taking_turns_changes_nothing() -> None:
    alone = make_run("fxfreeze")
    alone.train(30)
    outer = torch.get_rng_state()
    first, second = make_run("fxfreeze"), make_run("plain")
    torch.set_rng_state(outer)
    for _ in range(10):
        first.train(3)
        first.evaluate(arena().val)
        second.train(2)
    assert torch.equal(torch.get_rng_state(), outer)
    assert first.record.losses == alone.record.losses
    assert_same(tensors_of(first), tensors_of(alone))


def test_a_run_draws_its_own_random_numbers() -> None:
    losses = []
    for seed in (3, 4):
        field = arena()
        run = Run(net(), lineup()["plain"], dataclasses.replace(SETTINGS, seed=seed), Batches(field.train, 8, 0))
        run.train(1)
        losses.append(run.record.losses[0])
    assert losses[0] != losses[1]  # same weights, same batch, other dropout


def test_stops_after_the_step_it_is_in() -> None:
    run = make_run("plain")
    run.train(10, after(4))
    assert run.step == len(run.record.losses) == len(run.record.step_seconds) == 4


def test_ends_where_its_recipe_ends() -> None:
    run = make_run("plain")
    run.train(1000)
    assert run.done
    assert run.step == 20


# ---- scores and times


def test_scores_are_those_of_the_network_in_eval_mode() -> None:
    run = make_run("fxfreeze")
    run.train(16)
    images, labels = arena().test
    score = run.evaluate(arena().test)
    with torch.no_grad():
        logits = run.net.eval()(images)
    assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.equal(score.correct, logits.argmax(1) == labels)
    assert score.accuracy == pytest.approx(score.correct.float().mean().item())
    assert 0 < score.accuracy < 1


def test_scores_of_many_batches_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("plain")
    whole = run.evaluate(arena().test)
    monkeypatch.setattr("fxfreeze.train.EVALUATION_BATCH", 7)
    parts = run.evaluate(arena().test)
    assert torch.equal(parts.correct, whole.correct)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


def test_time_is_that_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ten seconds pass on at each step, and a thousand at each score."""
    now = [0.0]
    monkeypatch.setattr("fxfreeze.train.time.perf_counter", lambda: now[0])
    run = make_run("plain")
    step, evaluate = run._step, run.evaluate

    def slow_step() -> Tensor:
        now[0] += 10
        return step()

    def slow_evaluate(split: Split) -> object:
        now[0] += 1000
        return evaluate(split)

    monkeypatch.setattr(run, "_step", slow_step)
    monkeypatch.setattr(run, "evaluate", slow_evaluate)
    run.train(3)
    run.validate(arena().val)
    run.train(2)
    run.validate(arena().val)
    assert run.record.step_seconds == [10.0] * 5
    assert run.record.seconds == 50
    assert run.record.evaluation_seconds == 2000
    assert [(each.step, each.seconds) for each in run.record.evaluations] == [(3, 30), (5, 50)]


def test_freeze_events_are_charged_to_surgery_alone() -> None:
    cached = make_run("fxfreeze+cache")
    assert 0 < cached.build_seconds < cached.record.seconds
    surgery, marked = make_run("fxfreeze"), make_run("freezeout")
    compiled = surgery.build_seconds
    assert 0 < compiled == surgery.record.seconds
    for run in (surgery, marked):
        run.train(8)
    assert compiled < surgery.build_seconds < surgery.record.seconds
    assert marked.build_seconds == 0
    assert marked.record.seconds == pytest.approx(sum(marked.record.step_seconds))


# ---- precision


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("name", ["plain", "fxfreeze", "fxfreeze+cache"])
def test_autocast_reaches_the_network(name: str, precision: str, dtype: torch.dtype) -> None:
    run = make_run(name, dataclasses.replace(SETTINGS, precision=precision))
    seen = set()
    run.net.get_submodule("fc").register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    run.train(8)
    run.evaluate(arena().val)
    assert dtype in seen
    assert all(map(math.isfinite, run.record.losses))
    assert run.record.losses[-1] != run.record.losses[0]
    assert all(tensor.dtype != dtype for tensor in run.net.state_dict().values())


def test_fp16_scales_the_loss() -> None:
    run = make_run("plain", dataclasses.replace(SETTINGS, precision="fp16"))
    run.train(2)
    assert run.state_dict()["scaler"]["scale"] > 1
    assert make_run("plain").state_dict()["scaler"] == {}


# ---- resuming


@pytest.mark.parametrize("step", [2, FREEZES[1] - 1, FREEZES[1], FREEZES[1] + 1, 29])
@pytest.mark.parametrize("name", ["fxfreeze", "freezeout"])
def test_resuming_is_not_having_stopped(name: str, step: int, tmp_path: Path) -> None:
    check_resuming(name, step, SETTINGS, tmp_path)


def test_resuming_plain_training(tmp_path: Path) -> None:
    check_resuming("plain", 13, SETTINGS, tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resuming_in_lower_precision(precision: str, tmp_path: Path) -> None:
    check_resuming("fxfreeze", FREEZES[1], dataclasses.replace(SETTINGS, precision=precision), tmp_path)


def check_resuming(name: str, step: int, settings: Settings, folder: Path) -> None:
    whole = make_run(name, settings)
    whole.train(step)
    checkpoint.save(folder / "run.pt", run=whole.state_dict(), about={"name": name})
    whole.train(1000)

    state, about = checkpoint.load(folder / "run.pt")
    resumed = make_run(name, settings)
    torch.rand(17)  # another process has other random numbers behind it
    resumed.load_state_dict(state)
    assert about == {"name": name}
    assert resumed.step == step
    resumed.train(1000)
    assert resumed.record.losses == whole.record.losses[step:]
    assert resumed.record.depths == whole.record.depths[step:]
    assert_same(tensors_of(resumed), tensors_of(whole))
    assert resumed.state_dict()["scaler"] == whole.state_dict()["scaler"]
