"""README's tables and picture, from the committed results and nothing else.

fxfreeze kernels report --json > bench/results/kernels.json
make bench
make bench-gpu
python -m bench.tables

Says which table it wrote from which file, and which has nothing to show yet.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.picture import picture
from bench.tables_cache import cache
from bench.tables_iterations import curves, iterations, techniques
from bench.tables_kernels import kernels
from bench.tables_prefixes import prefixes
from fxfreeze.cli import Parser

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "iterations.png"
CURVES = "cpu.json"  # what the picture is drawn from


class Table(NamedTuple):
    """file: what it is made of; build: None from a file without rows for it; missing: what stands there until it has."""

    file: str
    build: Callable[[Any], str | None]
    missing: str = ""


ON_CPU = "Not measured yet: `make bench` does it."
ON_GPU = "No GPU has been measured yet: `make bench-gpu` does it."
TABLES: dict[str, Table] = {
    "kernels": Table("kernels.json", kernels),
    "prefixes": Table("cpu.json", prefixes),
    "techniques": Table("cpu.json", techniques, ON_CPU),
    "iterations": Table("cpu.json", iterations, ON_CPU),
    "cache": Table("cpu.json", cache, ON_CPU),
    "techniques on a GPU": Table("cuda.json", techniques, ON_GPU),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes each table into README.md, in place of the one between its markers, and draws the picture if there is one."""
    parser = Parser(prog="bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name in TABLES:
        text = renewed(text, name, shown(name))
        print(f"{name}: {'nothing measured yet' if built(name) is None else f'from {TABLES[name].file}'}")
    readme.write_text(text)
    if (RESULTS / CURVES).exists() and (drawn := curves(read(CURVES))):
        picture(drawn).savefig(PICTURE, dpi=120)
        print(f"{PICTURE.name}: from {CURVES}")
    print(f"Written to {readme}")
    return 0


def read(file: str) -> Any:
    return json.loads((RESULTS / file).read_text())


def built(name: str) -> str | None:
    """The table of that name; None without its file, or if that holds no rows for it."""
    file, build, _ = TABLES[name]
    return build(read(file)) if (RESULTS / file).exists() else None


def shown(name: str) -> str:
    """What README says in the place of that name. ValueError for a table that must be there and has no rows."""
    file, _, missing = TABLES[name]
    if (text := built(name)) is not None:
        return f"{text}\n[All figures](bench/results/{file})."
    if not missing:
        raise ValueError(f"no rows for the table {name!r} in {file} under {RESULTS}: measure them first")
    return missing


def renewed(text: str, name: str, table: str) -> str:
    """The text with the table between the markers of that name; ValueError without them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md has no place for the table, or several; mark one with {begin} and {end}")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


if __name__ == "__main__":
    sys.exit(main())
