"""The contests: from scratch and fine-tuning, which rows run, and what they start from."""

import dataclasses
import sys

import pytest
import torch
from tiny import SETTINGS, Flat, Log, Tiny, after, arena, never

from fxfreeze.contest import Finetune, FromScratch, choose, run_trial
from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import FINETUNE, FROM_SCRATCH
from fxfreeze.task import Task


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
        "fxfreeze+cache": 30,
    }


def test_int8_is_a_row_more(task: Task) -> None:
    """Beside its like in floating point, and nothing else changes."""
    settings = dataclasses.replace(SETTINGS, precision="int8")
    for kind in (FromScratch, Finetune):
        bare, recipes = (
            {name: dataclasses.replace(recipe, schedule=None) for name, recipe in kind(task, each).recipes.items()}
            for each in (SETTINGS, settings)
        )
        row = recipes.pop("fxfreeze+int8")
        assert recipes == bare
        assert row == dataclasses.replace(bare["fxfreeze"], name=row.name, about=row.about, int8=True)


def test_int8_without_its_package(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = FromScratch(task, dataclasses.replace(SETTINGS, precision="int8"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ChoiceError, match=r"pip install 'fxfreeze\[int8\]'"):
        choose(contest, ["plain", "fxfreeze+int8"])


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


@pytest.mark.usefixtures("storing")
def test_finetuning_freezes_every_unit_but_the_head(task: Task) -> None:
    contest = Finetune(task, SETTINGS)
    rows = ["plain", "by-hand", "fxfreeze", "fxfreeze+cache", "freezeout", "plain-short", "plain-short+cache"]
    outcome = run_trial(contest, SETTINGS, rows, 4, Log(), never)
    assert outcome is not None
    assert list(outcome.rows) == rows
    assert set(outcome.rows["fxfreeze"].record.depths) == set(outcome.rows["by-hand"].record.depths) == {4}
    assert outcome.rows["fxfreeze"].flops == outcome.rows["by-hand"].flops < outcome.rows["plain"].flops
    assert outcome.rows["fxfreeze"].record.losses == pytest.approx(outcome.rows["by-hand"].record.losses, rel=1e-3)
    assert outcome.rows["freezeout"].record.depths[0] == 0
    cached = outcome.rows["fxfreeze+cache"]
    assert cached.record.losses == outcome.rows["fxfreeze"].record.losses
    assert cached.record.depths == outcome.rows["fxfreeze"].record.depths
    assert set(cached.record.served) == {0, 4}
    assert cached.flops < outcome.rows["fxfreeze"].flops


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
        (
            ["plain", "frezeout"],
            r"'frezeout'; expected some of plain,freezeout,fxfreeze,fxfreeze\+cache,plain-short,plain-short\+cache$",
        ),
        (["plain", "plain-short"], "plain-short, whose length follows from plain and fxfreeze: name them too"),
        (["fxfreeze", "plain-short"], "plain-short, whose length follows from plain and fxfreeze: name them too"),
        (["plain", "fxfreeze+cache", "plain-short"], "plain-short, whose length follows from plain and fxfreeze: "),
        (
            ["plain", "fxfreeze", "plain-short", "plain-short+cache"],
            r"plain-short\+cache, whose length follows from plain and fxfreeze\+cache: name them too",
        ),
        ([""], "''; expected some of"),
    ],
)
def test_impossible_rows_are_refused(rows: list[str], message: str, task: Task) -> None:
    with pytest.raises(ChoiceError, match=message):
        choose(FromScratch(task, SETTINGS), rows)


def test_rows_come_in_one_order(task: Task) -> None:
    assert choose(FromScratch(task, SETTINGS), ["fxfreeze", "plain"]) == ["plain", "fxfreeze"]
    assert choose(FromScratch(task, SETTINGS), None) == list(FROM_SCRATCH)
    assert choose(Finetune(task, SETTINGS), None) == list(FINETUNE)
    names = ["plain-short+cache", "fxfreeze+cache", "plain"]
    assert choose(FromScratch(task, SETTINGS), names) == names[::-1]


@pytest.mark.parametrize("package", ["xxhash", "safetensors"])
def test_the_cached_row_needs_its_packages(package: str, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for rows in (None, ["plain", "fxfreeze+cache"]):
        with pytest.raises(ChoiceError, match=rf"{package} is not installed; .* pip install xxhash 'safetensors>=0.8'"):
            choose(FromScratch(task, SETTINGS), rows)
    rows = ["plain", "freezeout", "fxfreeze", "plain-short"]
    assert choose(FromScratch(task, SETTINGS), rows) == rows
