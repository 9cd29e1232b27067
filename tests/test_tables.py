"""README's tables: from the committed results, nothing else."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("tables", Path(__file__).parents[1] / "bench" / "tables.py")
assert _SPEC is not None
assert _SPEC.loader is not None
tables = importlib.util.module_from_spec(_SPEC)  # bench is no package of an installation, and not on every path
_SPEC.loader.exec_module(tables)
BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"


def committed(name: str) -> Any:
    file, _ = tables.TABLES[name]
    return json.loads((tables.RESULTS / file).read_text())


@pytest.mark.parametrize("name", tables.TABLES)
def test_readme_shows_the_committed_results(name: str) -> None:
    text = (tables.ROOT / "README.md").read_text()
    _, table = tables.TABLES[name]
    assert tables.renewed(text, name, table(committed(name))) == text, "python -m bench.tables writes it anew"


def test_only_what_lies_between_the_markers_changes() -> None:
    once = tables.renewed(f"before\n\n{BEGIN}\nan old table\n{END}\n\nafter \\1\n", "kernels", "a \\1 new one")
    assert once == f"before\n\n{BEGIN}\na \\1 new one\n{END}\n\nafter \\1\n"
    assert tables.renewed(once, "kernels", "a \\1 new one") == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_one_place_for_it_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mark one with"):
        tables.renewed(text, "kernels", "")


def test_each_shape_class_has_a_row_and_each_architecture_a_column() -> None:
    records = committed("kernels")
    head, rule, *rows = [line for line in tables.kernels(records).splitlines() if line.startswith("|")]
    assert [cell.split()[0] for cell in head.strip("| ").split(" | ")[3:]] == ["sm_80", "sm_86", "sm_90", "sm_100"]
    assert len(rows) == len({(r["kernel"], r["outputs"]) for r in records if r["choice"] and r["dtype"] == "bf16"})
    assert {line.count("|") for line in (head, rule, *rows)} == {8}


def bench(contender: str, median: float, **info: Any) -> dict[str, Any]:
    shape, dtype = [32, 3, 64, 64], "float32"
    return {
        "name": f"bench_prefix[net-{contender}]",
        "params": {"name": "net", "share": 1.0, "contender": contender},
        "stats": {"median": median},
        "extra_info": {"shape": shape, "dtype": dtype, "build_seconds": 2.0, "chosen": contender, "ratio": 1.0, **info},
    }


def test_a_prefix_row_by_hand() -> None:
    """Figures in their columns; what was not measured leaves its cell empty; other benchmarks are no rows."""
    results = {
        "benchmarks": [
            bench("eager", 0.08),
            bench("eager, again", 0.1),
            bench("auto", 0.04, chosen="library", ratio=0.8),
            bench("eager", 9.0) | {"params": {"name": "net", "share": 0.5, "contender": "eager"}},
            bench("eager", 9.0) | {"name": "bench_training[eager]"},
        ]
    }
    _, _, row, _, *legend = tables.prefixes(results).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["net, 64 px, float32", "80.0 (2.0)", *[""] * 7, "40.0 library (2.0)", "0.80"]
    assert "1.25 to 1.25" in " ".join(legend)
    assert "Geometric mean of the ratios: 0.80." in " ".join(legend)
