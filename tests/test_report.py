"""What a comparison says: its verdict, notes, table, page, JSON and pictures."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from rich.console import Console
from tiny import after, make_run

from fxfreeze import page, pictures, report
from fxfreeze.compare import Row, Trial
from fxfreeze.progress import Bars, Lines, Silence, display, figures
from fxfreeze.recipes import Settings
from fxfreeze.report import Prediction, Report
from fxfreeze.train import Evaluation, Record
from fxfreeze.verdict import average, caution, summarise, verdict

SAMPLES = 1000


def make_row(
    name: str,
    *,
    seconds: float,
    right: int = 900,
    steps: int = 100,
    planned: int = 100,
    build: float = 0.0,
    loss: float = 1.0,
) -> Row:
    """A row that had the first `right` of the samples right."""
    freezing = name in ("freezeout", "fxfreeze", "by-hand")
    units = ("stem", "block", "head") if freezing else ()
    depths = [min(2, 3 * i // steps) if freezing else 0 for i in range(steps)]
    record = Record(seconds, 1.0, [loss] * steps, depths, [seconds / steps] * steps)
    record.evaluations = [Evaluation(i, seconds * i / steps, loss, 0.5 + 0.004 * i) for i in (steps // 2, steps)]
    return Row(
        name=name,
        about=f"about {name}",
        planned=planned,
        steps=steps,
        seconds=seconds,
        raw_seconds=seconds,
        build_seconds=build,
        evaluation_seconds=1.0,
        flops=seconds * 1e6,
        record=record,
        units=units,
        rates=[(i, [0.1 * (depths[i] <= u) for u in range(len(units) or 1)]) for i in range(0, steps, 10)],
        test=right / SAMPLES,
        correct=torch.arange(SAMPLES) < right,
    )


def make_trial(
    seed: int = 0, *, ours: int = 900, short: int = 900, plain: float = 20.0, finished: bool = True
) -> Trial:
    rows = [
        make_row("plain", seconds=plain, right=950),
        make_row("freezeout", seconds=10.0, right=ours, steps=200, planned=200),
        make_row("fxfreeze", seconds=8.0, right=ours, steps=200, planned=200, build=0.16),
        make_row("plain-short", seconds=8.0, right=short, steps=round(800 / plain), planned=round(800 / plain)),
    ]
    return Trial(seed, {row.name: row for row in rows}, finished, drift=1.25, identical=1.01)


def make_report(trials: Sequence[Trial]) -> Report:
    return Report(
        command="fxfreeze compare --rows '<i>x'",
        subject={"network": "net<1>", "data": "digits", "kind": "trained from scratch"},
        settings=Settings(),
        trials=trials,
        prediction=Prediction(0.4, 0.6),
        environment=report.environment(torch.device("cpu")),
    )


# ---- verdict


def test_verdict_gives_both_costs() -> None:
    assert verdict([make_trial()]).startswith(
        "fxfreeze took 0.80x the time of the same schedule without surgery and 0.40x that of plain training."
    )


@pytest.mark.parametrize(
    ("ours", "short", "words"),
    [
        (
            900,
            940,
            "Freezing lost in this one run: simply training for fewer steps was better, 94.0% test accuracy against 90.0%",
        ),
        (
            940,
            900,
            "Freezing won in this one run: 94.0% test accuracy against 90.0% for simply training for fewer steps",
        ),
        (
            900,
            903,
            "Freezing gained nothing in this one run: simply training for fewer steps tied, 90.3% test accuracy against 90.0%",
        ),
    ],
)
def test_verdict_of_one_seed(ours: int, short: int, words: str) -> None:
    trials = [make_trial(ours=ours, short=short)]
    assert words in verdict(trials)
    assert caution(trials).startswith("One seed: ")
    assert "--seeds 5" in caution(trials)


def test_one_seed_is_judged_by_the_samples_on_which_the_two_differ() -> None:
    """They differ on 40 samples, all for one side: 1.96 sqrt(40) / 1000 = 1.24 points. On 4: 0.39, no more than the gap."""
    assert "gaps up to 1.2 points" in caution([make_trial(ours=900, short=940)])
    assert "won" in verdict([make_trial(ours=904, short=900)])
    assert "tied" in verdict([make_trial(ours=903, short=900)])


def test_seeds_are_judged_by_their_spread() -> None:
    """Gaps of 10, 20 and 60: mean 30, standard deviation 26.5, half width 4.30 * 26.5 / sqrt(3) = 65.7 of 1000 samples."""
    trials = [make_trial(seed, ours=900 + gap, short=900) for seed, gap in enumerate((10, 20, 60))]
    assert "gained nothing here" in verdict(trials)
    assert caution(trials).startswith("3 seeds: mean gaps up to 6.6 points")
    assert "± 2.6%" in verdict(trials)
    alike = [make_trial(seed, ours=900 + gap, short=900) for seed, gap in enumerate((29, 30, 31))]
    assert "won here" in verdict(alike)
    assert "lost here" in verdict(
        [make_trial(seed, ours=900, short=900 + gap) for seed, gap in enumerate((29, 30, 31))]
    )


def test_seeds_of_equal_gap_are_still_judged_by_the_test_set() -> None:
    """Two seeds with a gap of one sample each: no spread at all, and no evidence either."""
    assert "tied" in verdict([make_trial(seed, ours=901, short=900) for seed in range(2)])


def test_verdict_says_when_freezing_cost_more_than_plain() -> None:
    text = verdict([make_trial(ours=900, short=940, plain=5.0)])
    assert "plain training for as long was better" in text
    assert "fewer steps" not in text
    assert "1.60x that of plain" in text


def test_nothing_is_concluded_from_a_comparison_that_was_stopped() -> None:
    stopped = make_trial(1, finished=False)
    assert "nothing is concluded" in verdict([stopped])
    assert caution([stopped]) == ""
    assert verdict([make_trial(0), stopped]).endswith("of 2 seeds, the 1 that came to it are counted.")
    assert caution([make_trial(0), stopped]) == caution([make_trial(0)])


def test_verdict_of_other_rows() -> None:
    trial = make_trial()
    del trial.rows["plain-short"]
    assert verdict([trial]).count(".") == verdict([trial]).count("0.80") + 1 + 1
    assert "Freezing" not in verdict([trial])
    alone = Trial(0, {"plain": trial.rows["plain"]}, True)
    assert "nothing to conclude" in verdict([alone])


def test_verdict_of_finetuning_names_the_hand_made_rival() -> None:
    trial = make_trial()
    trial.rows["by-hand"] = make_row("by-hand", seconds=4.0)
    assert "2.00x the time of the same backbone frozen by hand and 0.40x that of plain" in verdict([trial])


def test_average_and_spread() -> None:
    assert average([1.0]).show(".1f") == "1.0"
    assert average([1.0, 3.0]).show(".2f") == "2.00 ± 1.41"
    assert average([0.9, 0.92]).show(".1%") == "91.0 ± 1.4%"


def test_unfinished_trials_are_left_out_of_the_table_where_others_finished() -> None:
    short = make_trial(1, ours=100, finished=False)
    rows = {summary.name: summary for summary in summarise([make_trial(0), short])}
    assert rows["fxfreeze"].test.mean == 0.9
    assert {summary.name: summary for summary in summarise([short])}["fxfreeze"].test.mean == 0.1


# ---- table and notes


def shown(result: Report) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(report.table(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table_holds_time_flops_and_accuracy() -> None:
    lines = {
        line.split("│")[1].strip(): line for line in shown(make_report([make_trial()])).splitlines() if "│" in line
    }
    assert [cell.strip() for cell in lines["fxfreeze"].split("│")[2:-1]] == [
        *("200", "8.0", "0.40", "40.0", "0.40", "2.0%", "130.0%", "90.0%")
    ]
    assert [cell.strip() for cell in lines["plain"].split("│")[2:-1]] == [
        *("100", "20.0", "1", "200.0", "1", "-", "90.0%", "95.0%")
    ]


def test_table_shows_steps_that_were_not_taken() -> None:
    trial = make_trial(finished=False)
    trial.rows["plain"] = make_row("plain", seconds=10.0, steps=50, planned=100)
    assert "50 of 100" in shown(make_report([trial]))


def test_notes_give_events_drift_and_noise() -> None:
    text = "\n".join(report.notes(make_report([make_trial()])))
    assert "self-check): 2.0% of fxfreeze's training time" in text
    assert "took 1.250x the time of plain's earlier steps" in text
    assert "took 1.010x: the noise" in text
    assert "0.40x of plain's time, 0.40x of its FLOPs" in text
    assert "longer than plain" not in text
    assert "plain-short is longer than plain" in "\n".join(report.notes(make_report([make_trial(plain=5.0)])))


def test_notes_name_what_diverged_and_what_was_stopped() -> None:
    trial = make_trial(3, finished=False)
    trial.rows["plain"] = make_row("plain", seconds=1.0, steps=5, loss=math.nan)
    text = "\n".join(report.notes(make_report([trial])))
    assert "plain diverged (seed 3): its loss is not a finite number; try a lower --lr" in text
    assert "Stopped during seed 3, after these steps: plain 5/100, freezeout 200/200" in text


# ---- JSON and page


class Page(HTMLParser):
    """Checks that elements nest, and collects what a browser would fetch, and the text."""

    VOID = frozenset(("meta", "img", "br", "link", "input", "hr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data


def test_page_needs_nothing_beside_it() -> None:
    result = make_report([make_trial(0), make_trial(1)])
    text = page.as_html(result)
    parsed = Page(text)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert len(parsed.references) == 4
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in parsed.references)
    assert "url(" not in text
    assert "@import" not in text
    for reference in parsed.references:
        svg = base64.b64decode(reference.partition(",")[2]).decode()
        assert svg.rstrip().endswith("</svg>")
        assert not re.search(r"href=\"(?!#|data:)", svg)


def test_page_says_what_the_terminal_says() -> None:
    result = make_report([make_trial()])
    text = Page(page.as_html(result)).text
    for piece in (verdict(result.trials), caution(result.trials), result.command, *report.notes(result)):
        assert piece in text
    for value in (*result.environment.values(), "net<1>", "about plain-short", "weight decay", "0.0001"):
        assert value in text
    assert "$" not in text


def test_json_holds_every_figure(tmp_path: Path) -> None:
    path = page.write(make_report([make_trial(4)]), tmp_path / "new" / "folder")
    assert path.name == "report.html"
    content = json.loads((path.parent / "report.json").read_text())
    row = content["trials"][0]["rows"]["fxfreeze"]
    assert content["trials"][0]["seed"] == 4
    assert content["trials"][0]["drift"] == 1.25
    assert len(row["record"]["losses"]) == len(row["record"]["step_seconds"]) == len(row["record"]["depths"]) == 200
    assert row["correct"] == 900
    assert row["units"] == ["stem", "block", "head"]
    assert content["settings"]["t0"] == 0.3
    assert content["predicted_saving"] == {"uncached": 0.4, "cached": 0.6}
    assert content["verdict"] == verdict([make_trial(4)])
    assert [each["name"] for each in content["rows"]] == ["plain", "freezeout", "fxfreeze", "plain-short"]
    assert content["rows"][2]["relative_seconds"] == {"mean": 0.4, "spread": None}
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]


def test_json_of_a_diverged_run_is_json() -> None:
    trial = make_trial()
    trial.rows["plain"] = make_row("plain", seconds=20.0, loss=math.inf)
    content = json.loads(report.as_json(make_report([trial])), parse_constant=lambda name: pytest.fail(name))
    assert content["trials"][0]["rows"]["plain"]["record"]["losses"][0] is None


def test_a_failed_write_leaves_the_report_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page.write(make_report([make_trial()]), tmp_path)
    before = (tmp_path / "report.html").read_text()

    def full(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        page.write(make_report([make_trial(1)]), tmp_path)
    assert (tmp_path / "report.html").read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize("kept", [["plain"], ["fxfreeze"], ["plain", "freezeout"], ["freezeout", "plain-short"]])
def test_any_rows_make_a_page(kept: list[str], tmp_path: Path) -> None:
    trial = make_trial()
    trial.rows = {name: row for name, row in trial.rows.items() if name in kept}
    trial.identical = None
    assert page.write(make_report([trial]), tmp_path).exists()


def test_a_run_of_one_step_makes_a_page(tmp_path: Path) -> None:
    trial = make_trial(finished=False)
    trial.rows, trial.identical = {"fxfreeze": make_row("fxfreeze", seconds=1.0, steps=1)}, None
    assert page.write(make_report([trial]), tmp_path).exists()


# ---- pictures


def test_accuracy_picture_ends_where_rows_end() -> None:
    trial = make_trial()
    trial.rows["plain-short"].raw_seconds *= 1.25  # ran at 0.8 of the speed of the others
    for evaluation in trial.rows["plain-short"].record.evaluations:
        evaluation.seconds *= 1.25
    curves, ends = pictures.accuracy_against_time([trial]).axes
    lines = {line.get_label(): line for line in curves.lines}
    assert lines["fxfreeze"].get_xdata()[-1] == lines["plain-short"].get_xdata()[-1] == 8
    assert lines["plain"].get_xdata()[-1] == 20
    points = {to_hex(line.get_color()): (line.get_xdata()[0], line.get_ydata()[0]) for line in ends.lines}
    assert points[pictures.COLOURS["plain"].lower()] == (20, 0.95)
    assert ends.get_xlim()[1] > 20


def test_staircase_shows_each_step_of_each_row() -> None:
    rows = [row for name, row in make_trial().rows.items() if name != "plain-short"]
    times, depths = pictures.staircase(rows).axes
    assert {line.get_label(): len(line.get_ydata()) for line in times.lines} == {
        "plain": 100,
        "freezeout": 200,
        "fxfreeze": 200,
    }
    assert times.lines[2].get_ydata()[5] == pytest.approx(40)
    assert [line.get_label() for line in depths.lines] == ["freezeout", "fxfreeze"]
    assert list(depths.lines[0].get_ydata()) == rows[1].record.depths


def test_learning_rates_have_a_line_for_each_unit() -> None:
    row = make_trial().rows["fxfreeze"]
    axes = pictures.learning_rates(row).axes[0]
    assert len(axes.lines) == 3
    assert list(axes.lines[0].get_ydata()) == [rates[0] for _, rates in row.rates]


def test_savings_compare_the_prediction_with_the_measurement() -> None:
    bars = {label: value for label, value, _ in report.savings(make_report([make_trial()]))}
    assert bars["predicted, no cache"] == 0.4
    assert bars["predicted, with a cache"] == 0.6
    assert bars["FLOPs counted"] == pytest.approx(1 - 0.4 / 2)  # 0.4 of plain's FLOPs over twice its steps
    assert bars["time measured, fxfreeze"] == pytest.approx(1 - 0.04 / 0.2)
    assert bars["time measured, freezeout"] == pytest.approx(1 - 0.05 / 0.2)
    drawn = pictures.savings([("a", -0.1, "#000000"), ("b", 0.5, "#000000")]).axes[0]
    assert [patch.get_width() for patch in drawn.patches] == [-0.1, 0.5]  # type: ignore[attr-defined]
    assert drawn.get_xlim()[0] < -0.1


def test_running_median_leaves_no_spike() -> None:
    values = [1.0] * 50 + [100.0] + [2.0] * 50
    smooth = pictures.running_median(values)
    assert max(smooth) == 2
    assert smooth[0] == 1
    assert len(smooth) == 101


# ---- progress


def test_bars_show_each_run_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    shown = display(console, shown=True)
    assert isinstance(shown, Bars)
    run = make_run("fxfreeze")
    with shown as watch:
        run.train(30)
        watch("fxfreeze", run)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert re.search(r"fxfreeze .* 30/30 loss +\d\.\d+ +depth +4/4 +[\d.]+ ms/step .*ETA", text)


def test_lines_come_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=40)
    shown = display(console, shown=True)
    assert isinstance(shown, Lines)
    now = [100.0]
    monkeypatch.setattr("fxfreeze.progress.time.monotonic", lambda: now[0])
    run = make_run("plain")
    with shown as watch:
        for _ in range(20):
            now[0] += 1
            run.train(1)
            watch("plain", run)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[2] for line in lines] == ["6/20", "11/20", "16/20", "20/20"]
    assert all("loss" in line and "ETA" in line for line in lines)
    assert lines[0].endswith("ETA 12 s")  # 5 s for 6 steps since it was first seen


def test_nothing_is_shown_when_asked() -> None:
    assert isinstance(display(Console(file=io.StringIO()), shown=False), Silence)


def test_figures_of_a_run_that_took_no_step() -> None:
    run = make_run("plain")
    run.train(5, after(0))
    assert "loss" in figures(run)
