"""README's tables: from the committed results, nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import tables
from bench.picture import LOOK, picture
from bench.tables_cache import cache
from bench.tables_iterations import curves, iterations, techniques
from bench.tables_kernels import kernels
from bench.tables_prefixes import prefixes

BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"


@pytest.mark.parametrize("name", tables.TABLES)
def test_readme_shows_the_committed_results(name: str) -> None:
    text = (tables.ROOT / "README.md").read_text()
    assert tables.renewed(text, name, tables.shown(name)) == text, "python -m bench.tables writes it anew"


def test_only_what_lies_between_the_markers_changes() -> None:
    once = tables.renewed(f"before\n\n{BEGIN}\nan old table\n{END}\n\nafter \\1\n", "kernels", "a \\1 new one")
    assert once == f"before\n\n{BEGIN}\na \\1 new one\n{END}\n\nafter \\1\n"
    assert tables.renewed(once, "kernels", "a \\1 new one") == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_one_place_for_it_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mark one with"):
        tables.renewed(text, "kernels", "")


def test_each_shape_class_has_a_row_and_each_architecture_a_column() -> None:
    records = tables.read("kernels.json")
    head, rule, *rows = [line for line in kernels(records).splitlines() if line.startswith("|")]
    assert [cell.split()[0] for cell in head.strip("| ").split(" | ")[3:]] == ["sm_80", "sm_86", "sm_90", "sm_100"]
    assert len(rows) == len({(r["kernel"], r["outputs"]) for r in records if r["choice"] and r["dtype"] == "bf16"})
    assert {line.count("|") for line in (head, rule, *rows)} == {8}


ENVIRONMENT = {"device": "a chip", "threads": "2", "torch": "2.13", "date": "2026-11-28 10:00 UTC"}


def row(function: str, median: float, params: dict[str, Any], **info: Any) -> dict[str, Any]:
    facts = {"shape": [32, 3, 64, 64], "dtype": "float32", "ratio": 1.0, "relative_error": 0.0}
    return {
        "name": f"{function}[{'-'.join(map(str, params.values()))}]",
        "params": {"name": "net", **params},
        "stats": {"median": median, "iqr": median / 10, "rounds": 7},
        "extra_info": facts | info,
    }


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"benchmarks": list(rows), "environment": ENVIRONMENT}


def cells(table: str | None) -> list[list[str]]:
    """Of each row of a table."""
    assert table is not None
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def prefix(contender: str, median: float, share: float = 1.0, **info: Any) -> dict[str, Any]:
    info = {"build_seconds": 2.0, "chosen": contender} | info
    return row("bench_prefix", median, {"share": share, "contender": contender}, **info)


def test_a_prefix_row_by_hand() -> None:
    """Figures in their columns; what was not measured leaves its cell empty; other benchmarks are no rows."""
    given = results(
        prefix("eager", 0.08),
        prefix("eager, again", 0.1),
        prefix("auto", 0.04, chosen="library", ratio=0.8),
        prefix("eager", 9.0, share=0.5),
        row("bench_training", 9.0, {"contender": "eager"}),
    )
    table = prefixes(given)
    assert cells(table)[1:] == [["net, 64 px, float32", "80.0 (2.0)", *[""] * 7, "40.0 library (2.0)", "0.80"]]
    assert "1.25 to 1.25" in str(table)
    assert "Geometric mean of the ratios: 0.80." in str(table)
    assert "a chip, 2 threads, torch 2.13, 2026-11-28" in str(table)


def test_prefixes_without_auto_are_no_table() -> None:
    assert prefixes(results(prefix("eager", 0.08), prefix("eager, again", 0.1))) is None


def technique(name: str, median: float, **info: Any) -> dict[str, Any]:
    info = {"peak_bytes": 3 << 20, "saved_bytes": 2 << 20} | info
    return row("bench_technique", median, {"technique": name}, **info)


def test_techniques_by_hand() -> None:
    given = results(
        technique("eager", 0.2),
        technique("eager, again", 0.2, ratio=1.04),
        technique("cache", 0.05, ratio=0.25, peak_bytes=1 << 20, saved_bytes=0, relative_error=3.2e-7),
    )
    head, *rows = cells(techniques(given))
    assert head[1:] == ["net, 64 px, batch 32: ms", "ratio", "peak / kept, MiB", "error"]
    by = {what.partition(":")[0]: figures for what, *figures in rows}
    assert by["eager"] == ["200.0", "1.00", "3 / 2", "0e+00"]
    assert by["cache"] == ["50.0", "0.25", "1 / 0", "3e-07"]
    assert by["fold"] == [""] * 4
    assert "n = 7, the interquartile range at most 10% of the median" in str(techniques(given))
    assert "1.04 to 1.04" in str(techniques(given))
    assert techniques(results()) is None


def iteration(contender: str, share: float, median: float, **info: Any) -> dict[str, Any]:
    return row("bench_iteration", median, {"share": share, "contender": contender}, **info)


def test_iterations_by_hand() -> None:
    """A row for each depth; rows of files that hold no memory are left out."""
    memory = {"peak_bytes": 5 << 20}
    given = results(
        iteration("plain", 0.5, 0.2, **memory),
        iteration("fxfreeze", 0.5, 0.1, **memory),
        iteration("by hand, again", 0.5, 0.1, ratio=0.97, **memory),
        iteration("plain", 0.25, 0.3, **memory),
        iteration("plain", 0.75, 9.0),
    )
    head, *rows = cells(iterations(given))
    assert [(line[1], line[head.index("plain")], line[head.index("fxfreeze")]) for line in rows] == [
        ("25%", "300.0 (5)", ""),
        ("50%", "200.0 (5)", "100.0 (5)"),
    ]
    assert "0.97 to 0.97" in str(iterations(given))
    assert iterations(results(iteration("plain", 0.75, 9.0))) is None
    assert curves(given) == {
        "net": {"plain": [(0.5, 1.0), (0.25, 1.0)], "fxfreeze": [(0.5, 0.5)], "by hand, again": [(0.5, 0.5)]}
    }
    assert "docs/iterations.png" in str(iterations(given))


def test_one_depth_alone_is_no_picture() -> None:
    memory = {"peak_bytes": 5 << 20}
    one = [iteration("plain", 0.5, 0.2, **memory), iteration("fxfreeze", 0.5, 0.1, **memory)]
    assert curves(results(*one)) == {}
    assert "docs/iterations.png" not in str(iterations(results(*one)))
    assert curves(results(*one, iteration("plain", 0.25, 0.2, **memory))).keys() == {"net"}


@pytest.mark.parametrize("networks", [1, 2])
def test_the_picture_has_room_for_its_legend(networks: int) -> None:
    every = {way: [(0.25, 0.9), (0.5, 0.8)] for way in LOOK}
    drawn = picture({f"net {i}": every for i in range(networks)})
    drawn.draw_without_rendering()
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == list(LOOK)
    inside, whole = legend.get_window_extent(), drawn.bbox
    assert whole.x0 <= inside.x0 < inside.x1 <= whole.x1
    assert whole.y0 <= inside.y0 < inside.y1 <= drawn.axes[0].get_window_extent().y0


def test_the_cache_by_hand() -> None:
    info = {"row_bytes": 2048, "bytes": None, "write_seconds": 0.0, "epochs_to_win_back": 0.0}
    epochs = {
        "cached, from RAM": 1.02,
        "cached, from disk": 1.03,
        "frozen half computed": 1.23,
        "live half alone, tensors in memory, again": 1.01,
    }
    given = results(
        row("bench_break_even", 0.032, {"depth": 9, "what": "compute"}, **info),
        row("bench_break_even", 32e-6, {"depth": 9, "what": "read"}, **info),
        *(row("bench_epoch", 1.0, {"contender": name}, ratio=ratio) for name, ratio in epochs.items()),
    )
    table = cache(given)
    assert cells(table)[1:] == [["9 of 10", "2 KiB", "1000 us", "1 us", "under 1 us", "at once"]]
    assert "takes 1.02 times\n(from RAM) and 1.03 times (from disk)" in str(table)
    assert cache(results(given["benchmarks"][0])) is None


def test_a_table_that_has_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, or must be there."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setitem(tables.TABLES, "optional", tables.Table("a.json", lambda r: r["shown"], "not yet"))
    monkeypatch.setitem(tables.TABLES, "needed", tables.Table("a.json", lambda r: r["shown"]))
    assert tables.shown("optional") == "not yet"
    with pytest.raises(ValueError, match=r"no rows for the table 'needed' in a.json"):
        tables.shown("needed")
    (tmp_path / "a.json").write_text(json.dumps({"shown": None}))
    assert tables.shown("optional") == "not yet"
    (tmp_path / "a.json").write_text(json.dumps({"shown": "figures"}))
    assert tables.shown("optional") == "figures\n[All figures](bench/results/a.json)."


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README of two tables, one of them measured."""
    (tmp_path / "README.md").write_text("<!-- a -->\n<!-- /a -->\n<!-- b -->\n<!-- /b -->\n")
    (tmp_path / "second.json").write_text(json.dumps({"shown": "figures", "benchmarks": []}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    both = {
        "a": tables.Table("second.json", lambda results: results["shown"]),
        "b": tables.Table("first.json", lambda results: results["shown"], "not yet"),
    }
    monkeypatch.setattr(tables, "TABLES", both)
    return tmp_path


def test_what_is_written_from_which_file_is_told(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main([]) == 0
    told = f"a: from second.json\nb: nothing measured yet\nWritten to {house / 'README.md'}\n"
    assert capsys.readouterr().out == told
    assert "figures\n[All figures](bench/results/second.json)" in (house / "README.md").read_text()
    assert "not yet" in (house / "README.md").read_text()


def test_the_picture_is_told_where_there_is_one(
    house: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "CURVES", "second.json")
    monkeypatch.setattr(tables, "PICTURE", house / "iterations.png")
    monkeypatch.setattr(tables, "curves", lambda results: {"net": {"plain": [(0.0, 1.0), (0.5, 0.8)]}})
    assert tables.main([]) == 0
    assert "\niterations.png: from second.json\n" in capsys.readouterr().out
    assert (house / "iterations.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--out", 2), ("cpu.json", 2)])
def test_help_and_what_is_unknown_write_nothing(
    argument: str, status: int, house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (house / "README.md").read_text()
    with pytest.raises(SystemExit) as left:
        tables.main([argument])
    assert left.value.code == status
    assert (house / "README.md").read_text() == before
    printed = capsys.readouterr()
    assert ("README's tables and picture" in printed.out) == (status == 0)
    assert ("unrecognized arguments" in printed.err) == (status == 2)
