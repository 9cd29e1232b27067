"""What is shown while runs train."""

import io
import re

import pytest
from rich.console import Console
from tiny import after, make_run

from fxfreeze.progress import Bars, Lines, Silence, counted, display, figures


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


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_count_is_shown_as_suits_the_console(terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    now = [100.0]
    monkeypatch.setattr("fxfreeze.progress.time.monotonic", lambda: now[0])
    with counted(console, "iterations", shown=shown) as show:
        for done in range(1, 11):
            now[0] += 2
            show(done, 10)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    if not shown:
        assert text == ""
    elif terminal:
        assert re.search(r"10/10.* iterations", text)
    else:
        assert text.splitlines() == [
            "3/10 iterations  ETA 14 s",
            "6/10 iterations  ETA 8 s",
            "9/10 iterations  ETA 2 s",
        ]
