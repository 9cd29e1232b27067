"""What a comparison reports: its table, notes, JSON and page."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rows import make_cache, make_cached_trial, make_int8_trial, make_report, make_row, make_traffic, make_trial

from fxfreeze import page, report
from fxfreeze.cached import CacheRecord
from fxfreeze.compare import Trial
from fxfreeze.recipes import FROM_SCRATCH
from fxfreeze.report import Report
from fxfreeze.verdict import caution, verdict

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
    assert "a step of plain took 1.250x its earlier time" in text
    assert "its steps took 1.010x the time of plain's, which are the same code" in text
    assert "disturbed" not in text
    assert "0.40x of plain's time, 0.40x of its FLOPs" in text
    assert "longer than plain" not in text
    assert "plain-short is longer than plain" in "\n".join(report.notes(make_report([make_trial(plain=5.0)])))


def test_notes_set_int8_beside_the_same_without() -> None:
    """Of 1000 samples ten are right in one of the two rows alone, which leaves 1.96 * sqrt(10) of them to chance."""
    notes = report.notes(make_report([make_int8_trial()]))
    assert (
        "Freeze events (trace, split, rewrite, self-check): 2.0% of fxfreeze's training time, 10.0% of fxfreeze+int8's "
        in (notes[1])
    )
    assert notes[2] == (
        "fxfreeze+int8 took 0.75x the time of fxfreeze, and has 89.0% test accuracy against 90.0% (-1.0 ± 0.6 points). It is "
        "scored in floating point, as the network is given back."
    )
    over_seeds = report.notes(make_report([make_int8_trial(right=right) for right in (890, 910)]))
    assert "0.75 ± 0.00x the time of fxfreeze, and has 90.0 ± 1.4% test accuracy" in over_seeds[2]


@pytest.mark.parametrize("missing", ["fxfreeze", "fxfreeze+int8"])
def test_notes_compare_int8_with_nothing_that_is_missing(missing: str) -> None:
    trial = make_int8_trial()
    del trial.rows[missing]
    text = "\n".join(report.notes(make_report([trial])))
    assert "given back" not in text
    assert f"of {missing}'s" not in text
    assert "self-check): " in text


def test_notes_conclude_nothing_on_int8_from_a_run_that_was_stopped() -> None:
    trial = make_int8_trial()
    trial.finished = False
    assert "given back" not in "\n".join(report.notes(make_report([trial])))


def test_notes_are_about_each_rival_that_ran() -> None:
    text = "\n".join(report.notes(make_report([make_cached_trial()])))
    assert "plain-short is as long as the time of fxfreeze allows: 0.40x of plain's time, 0.40x of its FLOPs.\n" in text
    assert "plain-short+cache is as long as the time of fxfreeze+cache allows: 0.20x of plain's time, 0.20x" in text
    assert text.count("ran last") == 1
    assert "cache" not in "\n".join(report.notes(make_report([make_trial()])))


def test_notes_say_where_the_cached_samples_came_from() -> None:
    """Of 4000 samples: 1100 computed, 900 from disk at 900 MB in 0.5 s, 2000 from RAM at 2 GB in 0.25 s."""
    text = "\n".join(report.notes(make_report([make_cached_trial(3), make_cached_trial(4)])))
    assert (
        "fxfreeze+cache (seed 3): 28% of its samples came from the data set, 22% from stores on disk, "
        "50% from stores in RAM. Stores were read at 1.8 GB/s the first time and 8.0 GB/s later."
    ) in text
    assert "(seed 4)" not in text


@pytest.mark.parametrize(
    ("epochs", "words"),
    [
        ([make_traffic(forward=10)], "100% of its samples came from the data set."),
        (
            [make_traffic(device=10, seconds=0.01, cold=True)],
            "100% of its samples came from stores in the device's memory. Stores were read at 1.0 GB/s the first time.",
        ),
        (
            [make_traffic(ram=10, seconds=0.01)],
            "100% of its samples came from stores in RAM. Stores were read at 1.0 GB/s later.",
        ),
    ],
)
def test_notes_on_a_cache_claim_no_reading_that_was_not(epochs: list[dict[str, Any]], words: str) -> None:
    trial = make_cached_trial()
    trial.rows["fxfreeze+cache"].cache = CacheRecord([], epochs)
    assert report.notes(make_report([trial]))[-1].endswith(words)


def test_notes_pass_by_a_cache_that_gave_nothing() -> None:
    for epochs in ([], [make_traffic()]):
        trial = make_cached_trial()
        trial.rows["fxfreeze+cache"].cache = CacheRecord([], epochs)
        assert "of its samples" not in "\n".join(report.notes(make_report([trial])))


def test_notes_say_when_the_machine_was_disturbed() -> None:
    trial = make_trial()
    trial.disturbed = 0.25
    text = "\n".join(report.notes(make_report([trial])))
    assert "in 25% of the rounds plain's steps took more than 1.5x their usual time" in text


def test_notes_name_what_diverged_and_what_was_stopped() -> None:
    trial = make_trial(3, finished=False)
    trial.rows["plain"] = make_row("plain", seconds=1.0, steps=5, loss=math.nan)
    text = "\n".join(report.notes(make_report([trial])))
    assert "plain diverged (seed 3): its loss is not a finite number since step 1; try a lower --lr" in text
    trial.rows["plain"].record.losses[:] = [1.0, math.inf, 1.0, 1.0, math.nan]
    assert "not a finite number since step 5;" in "\n".join(report.notes(make_report([trial])))
    trial.rows["plain"].record.losses[:] = [1.0, math.inf, 1.0]  # a step that the scaler skipped
    assert "diverged" not in "\n".join(report.notes(make_report([trial])))
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


def test_a_table_that_a_narrow_window_cuts_shows_it() -> None:
    text = page.as_html(make_report([make_trial()]))
    assert '<p class="hint">A table wider than this window scrolls sideways.</p>' in text
    assert re.search(r"max-width: 720px.*\.hint \{ display: block", text, re.DOTALL)
    assert re.search(r"\.scroll \{ overflow-x: auto; [^}]*no-repeat local[^}]*no-repeat scroll", text)


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
    assert row["cache"] is None
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json"]


def test_json_tells_what_the_cache_did() -> None:
    content = json.loads(report.as_json(make_report([make_cached_trial()])))
    rows = content["trials"][0]["rows"]
    assert list(rows) == [each["name"] for each in content["rows"]] == list(FROM_SCRATCH)
    assert rows["fxfreeze+cache"]["cache"] == dataclasses.asdict(make_cache())
    assert rows["fxfreeze+cache"]["record"]["served"] == rows["fxfreeze+cache"]["record"]["depths"]
    assert {cache for name, row in rows.items() if (cache := row["cache"]) and name != "fxfreeze+cache"} == set()


def test_page_shows_what_the_cache_did() -> None:
    result = make_report([make_cached_trial(2)])
    html = page.as_html(result)
    parsed = Page(html)
    assert parsed.open == []
    assert len(parsed.references) == 5
    assert "Where the cache's samples came from" in parsed.text
    assert "Each epoch of fxfreeze+cache, seed 2." in parsed.text
    assert "<li>depth 1 is &lt;stored&gt;</li><li>depth 2 is not stored: too little is left</li>" in html
    assert "plain-short and plain-short+cache are the rivals that count" in parsed.text
    without = Page(page.as_html(make_report([make_trial()]))).text
    assert "Where the cache's" not in without
    assert "plain-short is the rival that counts" in without
    assert (
        "rival"
        not in next(iter(page.figures(make_report([Trial(0, {"plain": make_row("plain", seconds=1.0)}, True)]))))[1]
    )


def test_a_cache_of_no_epoch_has_no_picture() -> None:
    trial = make_cached_trial()
    trial.rows["fxfreeze+cache"].cache = CacheRecord([], [])
    assert "Where the cache's samples" not in page.as_html(make_report([trial]))


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


@pytest.mark.parametrize(
    "kept",
    [
        *(["plain"], ["fxfreeze"], ["plain", "freezeout"], ["freezeout", "plain-short"], ["fxfreeze+cache"]),
        *(["plain", "fxfreeze+cache", "plain-short+cache"], ["plain", "fxfreeze", "fxfreeze+cache"]),
    ],
)
def test_any_rows_make_a_page(kept: list[str], tmp_path: Path) -> None:
    trial = make_cached_trial()
    trial.rows = {name: row for name, row in trial.rows.items() if name in kept}
    trial.identical = None
    assert page.write(make_report([trial]), tmp_path).exists()


def test_a_run_of_one_step_makes_a_page(tmp_path: Path) -> None:
    trial = make_trial(finished=False)
    trial.rows, trial.identical = {"fxfreeze": make_row("fxfreeze", seconds=1.0, steps=1)}, None
    assert page.write(make_report([trial]), tmp_path).exists()
