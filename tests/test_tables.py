"""README's table of kernels: from the committed report, nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("tables", Path(__file__).parents[1] / "bench" / "tables.py")
assert _SPEC is not None
assert _SPEC.loader is not None
tables = importlib.util.module_from_spec(_SPEC)  # bench is no package of an installation, and not on every path
_SPEC.loader.exec_module(tables)
BEGIN, END = tables.BEGIN, tables.END


def test_readme_shows_the_committed_report() -> None:
    text = (tables.ROOT / "README.md").read_text()
    assert tables.renewed(text, json.loads(tables.REPORT.read_text())) == text, "python -m bench.tables writes it anew"


def test_only_what_lies_between_the_markers_changes() -> None:
    records = json.loads(tables.REPORT.read_text())
    once = tables.renewed(f"before\n\n{BEGIN}\nan old table\n{END}\n\nafter \\1\n", records)
    assert once == f"before\n\n{BEGIN}\n{tables.table(records)}\n{END}\n\nafter \\1\n"
    assert tables.renewed(once, records) == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_one_place_for_it_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mark one with"):
        tables.renewed(text, [])


def test_each_shape_class_has_a_row_and_each_architecture_a_column() -> None:
    records = json.loads(tables.REPORT.read_text())
    head, rule, *rows = [line for line in tables.table(records).splitlines() if line.startswith("|")]
    assert [cell.split()[0] for cell in head.strip("| ").split(" | ")[3:]] == ["sm_80", "sm_86", "sm_90", "sm_100"]
    assert len(rows) == len({(r["kernel"], r["outputs"]) for r in records if r["choice"] and r["dtype"] == "bf16"})
    assert {line.count("|") for line in (head, rule, *rows)} == {8}
