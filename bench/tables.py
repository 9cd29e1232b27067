"""README's tables, from the committed results and nothing else.

fxfreeze kernels report --json > bench/results/kernels.json
make bench BENCH='bench/bench_prefix.py bench/bench_training.py' JSON=bench/results/backends-cpu.json
python -m bench.tables
"""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DTYPE = "bf16"
KERNELS_LEGEND = """A tile's pixels x output channels x input channels (of a kernel without a sum, x channels), its warps, the
registers of a thread, the shared memory of a block. FLOPs / byte: of DRAM, each tensor read or written once."""
PREFIXES_LEGEND = """Milliseconds, medians; in brackets the seconds of building, with the first call; `auto` names what it
chose, and built all of the others. The ratio is of `auto` to the fastest of the four that a user could write by hand, round by
round; of eager to the same code again: {noise}. Geometric mean of the ratios: {mean}."""
BY_HAND = ("eager", "fx fuse", "Inductor", "OpenVINO")
OURS = ("plain", "library", "inductor", "openvino", "auto")

Record = dict[str, Any]


def main() -> None:
    """Writes each table into README.md, in place of the one between its markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, (file, table) in TABLES.items():
        text = renewed(text, name, table(json.loads((RESULTS / file).read_text())))
    readme.write_text(text)


def renewed(text: str, name: str, table: str) -> str:
    """The text with the table between the markers of that name; ValueError without them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md has no place for the table, or several; mark one with {begin} and {end}")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table's lines."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


# ---- kernels


def kernels(records: Sequence[Record]) -> str:
    """A row for each kernel and shape class, a column for each architecture, and what the cells mean."""
    shown = [record for record in records if record["choice"] and record["dtype"] == DTYPE]
    archs = list(dict.fromkeys(record["arch"] for record in shown))
    classes: dict[tuple[str, int | None], dict[str, Record]] = {}
    for record in shown:
        classes.setdefault((record["kernel"], record["outputs"]), {})[record["arch"]] = record
    heads = ["kernel", "outputs", "FLOPs / byte", *(_head(arch, shown) for arch in archs)]
    rows = [
        [f"`{kernel}`", f"up to {most}" if most else "any", f"{by_arch[archs[0]]['intensity']:.3g}"]
        + [_cell(by_arch[arch]) for arch in archs]
        for (kernel, most), by_arch in classes.items()
    ]
    return "\n".join([markdown(heads, rows), "", KERNELS_LEGEND])


def _head(arch: str, records: Sequence[Record]) -> str:
    cores = {record["tensor_core"] for record in records if record["arch"] == arch} - {None}
    return f"{arch} ({', '.join(sorted(cores))})"


def _cell(record: Record) -> str:
    tile, warps, *_ = record["config"].split(", ")
    return f"{tile} w{warps.split()[0]}, {record['registers']}, {record['shared'] / 1024:.0f} KiB"


# ---- whole prefixes


def prefixes(results: Record) -> str:
    """A row for each network and dtype at full depth: by hand, by backend, and how ``auto`` compares."""
    rows: dict[str, dict[str, Record]] = {}
    for bench in results["benchmarks"]:
        if bench["name"].startswith("bench_prefix") and bench["params"]["share"] == 1.0:
            _, _, size, _ = bench["extra_info"]["shape"]
            network = f"{bench['params']['name']}, {size} px, {bench['extra_info']['dtype']}"
            rows.setdefault(network, {})[bench["params"]["contender"]] = bench
    heads = ["network", *BY_HAND, *(f"`{name}`" for name in OURS), "ratio"]
    cells = [
        [network, *(_time(by.get(name)) for name in (*BY_HAND, *OURS)), f"{by['auto']['extra_info']['ratio']:.2f}"]
        for network, by in rows.items()
    ]
    ratios = [by["auto"]["extra_info"]["ratio"] for by in rows.values()]
    noise = [_median(by["eager, again"]) / _median(by["eager"]) for by in rows.values()]
    span = f"{min(noise):.2f} to {max(noise):.2f}"
    legend = PREFIXES_LEGEND.format(noise=span, mean=f"{statistics.geometric_mean(ratios):.2f}")
    return "\n".join([markdown(heads, cells), "", legend])


def _median(bench: Record) -> float:
    return float(bench["stats"]["median"])


def _time(bench: Record | None) -> str:
    if bench is None:
        return ""
    chosen = bench["extra_info"]["chosen"]
    by = f" {chosen}" if bench["params"]["contender"] == "auto" else ""
    return f"{_median(bench) * 1e3:.1f}{by} ({bench['extra_info']['build_seconds']:.1f})"


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kernels": ("kernels.json", kernels),
    "prefixes": ("backends-cpu.json", prefixes),
}

if __name__ == "__main__":
    main()
