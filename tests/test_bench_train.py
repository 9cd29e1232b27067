"""The end-to-end bench: the frontier and the verdict by hand, what its options refuse, and a whole run in small."""

import dataclasses
import json
import signal
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_cifar import make
from tiny import SETTINGS, Log, after, arena, never

from bench import end_to_end, train
from bench.candidates import FORMS, Candidate, parted, recipes
from bench.end_to_end import FRESH, Design, Search, shrunk, work
from bench.end_to_end_kept import Deadline, Kept
from bench.end_to_end_report import NOTE, cells, claim, comparable, notes
from bench.error_against_time import CLAIM, picture
from bench.time_to_accuracy import (
    Confirmation,
    Figures,
    Seed,
    accuracy_at,
    frontier,
    leader,
    share_at,
    standings,
    verdict,
)
from fxfreeze.compare import Trial, compare
from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import CACHED
from fxfreeze.schedule import FreezeOut
from fxfreeze.task import Task

# ---- the frontier

POINTS = [(0.4, 0.50), (0.6, 0.60), (1.0, 0.70)]


@pytest.mark.parametrize(
    ("share", "accuracy"),
    [(0.4, 0.50), (0.5, 0.55), (0.6, 0.60), (0.9, 0.675), (1.0, 0.70), (0.39, None), (1.01, None)],
)
def test_the_frontier_is_a_line_between_lengths_and_nothing_beyond(share: float, accuracy: float | None) -> None:
    found = accuracy_at(POINTS, share)
    assert found is None if accuracy is None else found == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("accuracy", "share"), [(0.3, 0.4), (0.50, 0.4), (0.55, 0.5), (0.65, 0.8), (0.70, 1.0), (0.71, None)]
)
def test_the_time_that_plain_needs(accuracy: float, share: float | None) -> None:
    found = share_at(POINTS, accuracy)
    assert found is None if share is None else found == pytest.approx(share)


def test_the_first_time_that_plain_needs_where_its_frontier_bends() -> None:
    assert share_at([(0.4, 0.5), (0.6, 0.7), (0.8, 0.6), (1.0, 0.8)], 0.65) == pytest.approx(0.55)


# ---- standings and the verdict, on figures made up


def figures(accuracy: float, steps: int = 100, seconds: float | None = None) -> Figures:
    """A second a step; the test split is a point harder."""
    seconds = float(steps) if seconds is None else seconds
    return Figures(steps, seconds, seconds, 0.0, 1e9 * seconds, accuracy, accuracy - 0.01, None)


def seed(luck: float = 0.0, **candidates: tuple[float, float]) -> Seed:
    """Plain at 0.70 and half of it at 0.60, both moved by `luck`; candidates: (share of time, validation accuracy)."""
    plain = {"plain": figures(0.70 + luck), "plain x0.5": figures(0.60 + luck, 50)}
    names = {"published": "freezeout cubic:0.5", "ours": "fxfreeze cubic:0.5", "cached": f"{CACHED} cubic:0.5"}
    return plain | {names[key]: figures(value, 100, 100 * share) for key, (share, value) in candidates.items()}


def named(found: Sequence[Any], name: str) -> Any:
    return next(each for each in found if each.name == name)


def test_a_candidate_stands_against_plain_of_its_own_time_seed_by_seed() -> None:
    found = standings([seed(0.0, ours=(0.7, 0.69)), seed(0.1, ours=(0.8, 0.76))])
    ours = named(found, "fxfreeze cubic:0.5")
    assert ours.share.mean == pytest.approx(0.75)
    assert ours.margin.mean == pytest.approx(0.025)
    assert ours.half_width == pytest.approx(12.71 * 0.015)  # the t of one degree, times half of their distance
    assert ours.needed == pytest.approx(0.5 + 0.5 * (0.725 - 0.65) / 0.1)
    assert ours.flops.mean == pytest.approx(0.75)
    plain = named(found, "plain x0.5")
    assert (plain.margin, plain.needed) == (None, None)


def test_the_frontier_goes_by_steps_not_by_times_that_are_noise() -> None:
    noisy = {**seed(), "plain x0.5": figures(0.6, 50, seconds=58.0)}
    assert frontier(noisy) == [(0.5, 0.60), (1.0, 0.70)]
    assert frontier(noisy, "test") == [(0.5, pytest.approx(0.59)), (1.0, pytest.approx(0.69))]
    assert "1.160" in " ".join(notes("vgg-16-bn", [noisy]))


@pytest.mark.parametrize("share", [0.45, 1.05])
def test_no_margin_where_plain_has_no_such_length(share: float) -> None:
    seeds = [seed(ours=(share, 0.99)), seed(ours=(share, 0.99))]
    ours = named(standings(seeds), "fxfreeze cubic:0.5")
    assert (ours.margin, ours.half_width, ours.leads) == (None, None, False)
    assert "no candidate took a time" in verdict(seeds, None)


def three(**candidates: tuple[float, float]) -> list[Seed]:
    """Three seeds whose luck moves all runs alike, but for a tenth of a point."""
    moved = [(0.0, 0.0), (0.02, 0.021), (-0.02, -0.019)]
    return [
        seed(luck, **{key: (share, value + other) for key, (share, value) in candidates.items()})
        for luck, other in moved
    ]


def test_the_leader_is_the_furthest_ahead_beyond_its_spread() -> None:
    seeds = three(ours=(0.8, 0.70), cached=(0.6, 0.68), published=(0.5, 0.75))
    first = leader(standings(seeds))
    assert first is not None
    assert first.name == f"{CACHED} cubic:0.5"  # 6 points ahead, ours 4; what is published may not win
    assert first.margin is not None
    assert first.margin.mean == pytest.approx(0.06, abs=0.001)


def test_no_leader_within_the_spread() -> None:
    seeds = [seed(ours=(0.75, value)) for value in (0.62, 0.69, 0.70)]  # against 0.65
    assert named(standings(seeds), "fxfreeze cubic:0.5").margin.mean == pytest.approx(0.02)
    assert leader(standings(seeds)) is None
    text = verdict(seeds, None)
    assert text.startswith("None wins: no candidate beats plain training")
    assert "fxfreeze cubic:0.5, stands at +2.0 ± " in text


def test_what_the_verdict_says_at_each_stage() -> None:
    seeds = three(ours=(0.75, 0.70), published=(0.9, 0.6))
    name = "fxfreeze cubic:0.5"
    won = Confirmation(name, [1000], True, "Freezing won here: a against b.", "3 seeds.")
    assert verdict([], None).startswith("No seed came to its end")
    assert verdict(seeds[:1], None).startswith("None wins by one seed")
    assert verdict(seeds, None).startswith(f"{name} is the best of 1 on these seeds, at +5.1 ± 0.1 points")
    other = dataclasses.replace(won, name="fxfreeze linear:0.5")
    assert verdict(seeds, None) == verdict(seeds, other)
    assert "were not run" in verdict(seeds, None)
    assert verdict(seeds, won).startswith(f"{name} wins. It was the best of 1")
    assert verdict(seeds, won).endswith("on fresh seeds: Freezing won here: a against b. 3 seeds.")
    lost = dataclasses.replace(won, won=False, verdict="Freezing lost here.")
    assert verdict(seeds, lost).startswith(f"None wins. {name} was the best of 1")
    assert verdict(seeds, lost).endswith("on fresh seeds: Freezing lost here. 3 seeds.")


def test_a_row_of_the_table() -> None:
    found = standings(three(ours=(0.75, 0.70)))
    assert cells(named(found, "plain x0.5")) == [
        "plain x0.5", "0.50 ± 0.00", "0.50", "+50%", "60.0 ± 2.0%", "-", "-", "41.0%"
    ]  # fmt: skip
    assert cells(named(found, "fxfreeze cubic:0.5"))[3:] == [
        "+25%", "70.1 ± 2.0%", "+5.1 ± 0.1", "more than 1", "30.9%"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("network", "saved", "error"),
    [
        ("densenet-bc-12-100", 0.2, 1.03),
        ("wrn-40-4", 0.2, 1.0),
        ("bench.resnet18:build", 0.2, 1.0),
        ("vgg-16-bn", 0, 1.0),
    ],
)
def test_the_claim_is_drawn_at_its_time_and_error(network: str, saved: float, error: float) -> None:
    well = [seed(0.25 + luck, ours=(0.75, 0.95)) for luck in (0.0, 0.01, -0.01)]  # plain's own test error is 6%
    figure = picture({network: well, "timm:other": well})
    with_claim, without = figure.axes
    stars = [line for line in with_claim.lines if line.get_color() == CLAIM]
    assert [tuple(line.get_xydata()[0]) for line in stars] == [(saved, pytest.approx(error * 0.06))]
    assert not [line for line in without.lines if line.get_color() == CLAIM]
    points = [tuple(line.get_xydata()[0]) for line in with_claim.lines if line.get_marker() == "o"]
    assert (pytest.approx(0.25), pytest.approx(0.06, abs=0.001)) in points
    assert "claimed by arXiv 1706.04983" in legend_of(figure)
    assert "star" not in " ".join(notes(network, well))
    assert claim("timm:other") is None


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_no_claim_is_drawn_beside_a_plain_that_was_trained_too_short() -> None:
    seeds = three(ours=(0.75, 0.70))  # plain's own test error is 31%
    figure = picture({"wrn-40-4": seeds})
    assert not [line for line in figure.axes[0].lines if line.get_color() == CLAIM]
    assert "claimed by arXiv 1706.04983" not in legend_of(figure)
    assert "Its star is not drawn: plain's own error here is 31%, past 15%" in " ".join(notes("wrn-40-4", seeds))
    assert [comparable([seed(luck)]) for luck in (0.161, 0.159)] == [True, False]  # of 0.69 and as much


def test_the_picture_says_what_is_drawn_and_which_way_is_better() -> None:
    several, one = picture({"net": three(ours=(0.75, 0.70))}), picture({"net": [seed(ours=(0.75, 0.70))]})
    spread = {"one seed of plain", "spread over seeds"}
    assert spread <= set(legend_of(several))
    assert not spread & set(legend_of(one))
    assert several.axes[0].get_xlabel() == "time saved (share of plain training's)"
    assert several.axes[0].get_title(loc="right") == "better: down and right"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_panel_a_network(count: int) -> None:
    figure = picture({f"net {i}": three(ours=(0.75, 0.70)) for i in range(count)})
    figure.draw_without_rendering()
    shown = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert shown == [f"net {i}  (3 seeds)" for i in range(count)]


# ---- candidates


def test_schedules_are_read_and_written() -> None:
    for text in ("cubic:0.8:scaled", "linear:0.5", "cubic:0.3:x2", "squared:1:scaled:x1.5"):
        assert str(Candidate.parse(text)) == text
    assert Candidate.parse("cubic:0.3:x2") == Candidate("cubic", 0.3, scale_lr=False, longer=2.0)


@pytest.mark.parametrize("text", ["", "cubic", "cubic:0", "cubic:1.1", "quartic:0.5", "cubic:0.5:x0", "cubic:0.5:fast"])
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ChoiceError, match="expected HOW:T0"):
        Candidate.parse(text)


def test_every_candidate_in_every_form_beside_plain_and_its_shorter_ones() -> None:
    chosen = recipes([Candidate("cubic", 0.3, longer=2.0)], FORMS, [0.5], 20)
    assert [(each.name, each.steps, each.form, each.cosine) for each in chosen] == [
        ("plain", 20, "bare", True),
        ("plain x0.5", 10, "bare", True),
        ("freezeout cubic:0.3:x2", 40, "marked", False),
        ("fxfreeze cubic:0.3:x2", 40, "surgery", False),
        (f"{CACHED} cubic:0.3:x2", 40, "cached", False),
    ]
    for each in chosen[2:]:
        assert isinstance(each.schedule, FreezeOut)
        assert (each.schedule.total_steps, each.schedule.t0, each.schedule.scale_lr) == (40, 0.3, False)
    assert [parted(each.name) for each in (chosen[1], chosen[4])] == [("plain x0.5", ""), (CACHED, "cubic:0.3:x2")]


# ---- a search on a network that trains in milliseconds


def task() -> Task:
    field = arena()
    return Task("tiny:Tiny", "tiny:data", field.train, field.val, field.test, 4, 1, 6)


def search(*candidates: str, forms: Sequence[str] = ("fxfreeze",), seeds: int = 2) -> Search:
    design = Design([Candidate.parse(text) for text in candidates or ("cubic:0.5",)], forms, [0.5], seeds, block=4)
    return Search(task(), SETTINGS, design)


def test_a_seed_holds_every_run_and_is_counted_once_whole() -> None:
    found = search("cubic:0.5", "linear:0.5", forms=("freezeout", "fxfreeze"))
    assert not found.run_seed(3, Log(), after(30))
    assert found.missing() == [3, 4]
    assert found.run_seed(3, Log(), never)
    assert found.missing() == [4]
    runs = found.seeds[3]
    assert list(runs) == [
        "plain", "plain x0.5", "freezeout cubic:0.5", "fxfreeze cubic:0.5", "freezeout linear:0.5", "fxfreeze linear:0.5"
    ]  # fmt: skip
    assert runs["plain x0.5"].steps * 2 == runs["plain"].steps
    assert runs["fxfreeze cubic:0.5"].flops < runs["plain"].flops
    again = search()
    again.load(json.loads(json.dumps(found.state())))
    assert again.seeds == found.seeds


@pytest.fixture
def led() -> Search:
    """A search that is done, with a leader."""
    found = search()
    found.seeds = dict(enumerate(three(ours=(0.75, 0.70))[:2], SETTINGS.seed))
    assert found.missing() == []
    return found


@pytest.mark.parametrize(("ahead", "won"), [(0.05, True), (0.01, False)])
def test_the_leader_is_tried_on_fresh_seeds(
    led: Search, ahead: float, won: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[Trial] = []

    def noted(*given: Any, **options: Any) -> Trial:
        trials.append(compare(*given, **options))
        return trials[-1]

    monkeypatch.setattr(end_to_end, "compare", noted)
    monkeypatch.setattr(end_to_end, "gap", lambda trials, pair: (ahead, 0.02))
    ((_, title, run),) = work([led])
    assert title == "fxfreeze cubic:0.5 on fresh seeds"
    assert run(Log(), never)
    first = SETTINGS.seed + FRESH
    assert [trial.seed for trial in trials] == [first, first + 1]
    assert all(list(trial.rows) == ["plain", "fxfreeze", "plain-short"] for trial in trials)
    assert led.confirmation is not None
    assert (led.confirmation.won, led.confirmation.seeds) == (won, [trial.seed for trial in trials])
    assert led.confirmation.verdict.startswith("Freezing ")
    assert list(work([led])) == []
    assert led.verdict().startswith("fxfreeze cubic:0.5 wins." if won else "None wins.")


def test_a_confirmation_that_was_stopped_says_nothing(led: Search) -> None:
    assert not led.confirm("fxfreeze cubic:0.5", Log(), after(30))
    assert led.confirmation is None
    assert led.unconfirmed() == "fxfreeze cubic:0.5"


def test_work_goes_seed_by_seed_through_all_networks_and_leaves_out_what_is_done() -> None:
    one, other = search(), search()
    one.seeds = {3: seed(ours=(0.7, 0.5))}
    order = [(each is one, title) for each, title, _ in work([one, other])]
    assert order == [(False, "seed 3"), (True, "seed 4"), (False, "seed 4")]


def test_samples_are_drawn_alike_each_time() -> None:
    whole = task()
    few = shrunk(whole, (20, 8, 10))
    assert [len(split.labels) for split in (few.train, few.val, few.test)] == [20, 8, 10]
    assert torch.equal(few.train.images, shrunk(whole, (20, 8, 10)).train.images)
    for pixels, label in zip(*few.train, strict=True):
        (place,) = (whole.train.images == pixels).flatten(1).all(1).nonzero().flatten()
        assert whole.train.labels[place] == label
    with pytest.raises(ChoiceError, match="asks for 85 of train; tiny:data has 84"):
        shrunk(whole, (85, 8, 10))


def test_the_deadline() -> None:
    assert not Deadline(None, never)()
    assert not Deadline(1.0, never)()
    assert Deadline(1.0, lambda: True)()
    assert Deadline(-1.0, never)()


# ---- the whole script


@pytest.fixture
def archive(tmp_path: Path) -> str:
    """Images whose brightness tells one of three classes."""
    random = np.random.RandomState(0)
    parts = {}
    for split, count in (("train", 120), ("test", 30)):
        labels = np.arange(count) % 3
        noise = random.randint(0, 60, (count, 8, 8, 3))
        parts |= {f"x_{split}": (noise + 80 * labels[:, None, None, None]).astype(np.uint8), f"y_{split}": labels}
    np.savez(tmp_path / "images.npz", **parts)
    return str(tmp_path / "images.npz")


def options(archive: str, out: Path, *more: str) -> list[str]:
    small = "--networks resnet-8 --schedules cubic:0.4 --shares 0.5 --seeds 2 --epochs 4 --batch-size 12 --no-progress"
    return ["--data", archive, "--out", str(out), *f"{small} --samples 96,12,30 --device cpu --lr 0.05".split(), *more]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "figures.json"


def test_end_to_end(
    archive: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, storing: None
) -> None:
    assert train.main(options(archive, out)) == 0
    content = json.loads(out.read_text())
    assert content["about"]["data"] == "images.npz"
    assert str(out.parent) not in out.read_text()
    found = content["networks"]["resnet-8"]
    assert list(found["seeds"]) == ["0", "1"]
    runs = found["seeds"]["0"]
    assert list(runs) == ["plain", "plain x0.5", *(f"{form} cubic:0.4" for form in FORMS)]
    assert [run["steps"] for run in runs.values()] == [32, 16, 32, 32, 32]
    assert runs["plain"]["test"] > 0.8  # of three classes that brightness tells
    assert runs[f"{CACHED} cubic:0.4"]["flops"] < runs["fxfreeze cubic:0.4"]["flops"] < runs["plain"]["flops"]
    assert found["verdict"]
    printed = capsys.readouterr().out
    assert f"resnet-8: {found['verdict']}" in printed
    assert NOTE in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    def trains(*given: Any, **options: Any) -> Trial:
        raise AssertionError("what is done is not run again")

    monkeypatch.setattr(end_to_end, "compare", trains)
    monkeypatch.setattr(Search, "unconfirmed", lambda search: None)
    assert train.main(options(archive, out)) == 0
    assert json.loads(out.read_text())["networks"] == content["networks"]
    assert train.main(options(archive, out, "--lr", "0.1")) == 2
    assert "holds runs with lr 0.05, not 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ([-1.0], "Not begun for want of time: resnet-8, seed 0."),
        ([1.0, 1.0, -1.0], "Stopped, and so not counted: resnet-8, seed 0."),
    ],
)
def test_no_time_is_no_result_and_no_failure(
    left: list[float],
    said: str,
    archive: str,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = chain(left, repeat(-1.0))
    monkeypatch.setattr(Deadline, "left", property(lambda deadline: next(seconds)))
    assert train.main(options(archive, out, "--forms", "fxfreeze")) == 0
    captured = capsys.readouterr()
    assert "resnet-8: No seed came to its end" in captured.out
    assert said in captured.err
    assert json.loads(out.read_text())["networks"]["resnet-8"]["seeds"] == {}


def test_after_ctrl_c_the_columns_are_not_explained(
    archive: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "_work", interrupted)
    assert train.main(options(archive, out)) == 130
    printed = capsys.readouterr().out
    assert "No seed came to its end" in printed
    assert NOTE not in printed


def test_no_seed_is_begun_that_would_not_end_in_time(
    archive: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Kept] = []
    save = Kept.save

    def noted(kept: Kept, searches: Any) -> None:
        saved.append(kept)
        save(kept, searches)

    monkeypatch.setattr(Kept, "save", noted)  # once before the first seed, once after it
    monkeypatch.setattr(Deadline, "left", property(lambda deadline: 1e9 if len(saved) < 2 else 1e-6))
    assert train.main(options(archive, out, "--forms", "fxfreeze")) == 0
    captured = capsys.readouterr()
    assert "Not begun for want of time: resnet-8, seed 1." in captured.err
    assert "None wins by one seed" in captured.out
    assert list(json.loads(out.read_text())["networks"]["resnet-8"]["seeds"]) == ["0"]


def test_the_files_of_torchvision_are_taken_too(tmp_path: Path, out: Path) -> None:
    make(tmp_path, "cifar10")
    found = train._searches(train._parser().parse_args(options(str(tmp_path), out)))
    task = found["resnet-8"].task
    assert (task.data, task.num_classes, task.image_size) == ("cifar10", 10, 32)
    assert [len(split.labels) for split in (task.train, task.val, task.test)] == [96, 12, 30]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--data", "absent.npz"), "no such file"),
        (("--networks", "resnet-9"), "depth 9"),
        (("--schedules", "cubic:2"), "expected HOW:T0"),
        (("--forms", "frozen"), "--forms has 'frozen'"),
        (("--shares", "0.5,1"), "between 0 and 1"),
        (("--samples", "96,12"), "expected 3 numbers"),
        (("--samples", "999,12,30"), "asks for 999 of train"),
        (("--minutes", "nan"), "is not a number above 0"),
        (("--out", "absent/figures.json"), "can't be written"),
    ],
)
def test_what_is_refused_before_anything_trains(
    archive: str, out: Path, more: tuple[str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = train.main(options(archive, out, *more))
    except SystemExit as refused:  # by the parser
        status = refused.code
    assert status == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_a_file_of_something_else_is_left_alone(archive: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.write_text("[1, 2]")
    assert train.main(options(archive, out)) == 2
    assert "is not of this bench" in capsys.readouterr().err
    assert out.read_text() == "[1, 2]"


def test_resnet18_keeps_small_images_large() -> None:
    from bench.resnet18 import build

    net = build(num_classes=7, in_channels=1)
    sizes: list[int] = []
    net.layer1.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert sizes == [32]
