"""Tables and figures as README shows them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Bench = Mapping[str, Any]  # a row of pytest-benchmark's JSON
Results = Mapping[str, Any]  # all of it


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table's lines."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def rows_of(results: Results, function: str) -> list[Bench]:
    """The rows of one benchmark function."""
    return [bench for bench in results["benchmarks"] if bench["name"].startswith(f"{function}[")]


def median(bench: Bench) -> float:
    """Seconds."""
    return float(bench["stats"]["median"])


def milliseconds(bench: Bench) -> str:
    return f"{median(bench) * 1e3:.1f}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


def spread(benches: Sequence[Bench]) -> str:
    """How many rounds, and how far apart, in words: of all rows together."""
    rounds = sorted({bench["stats"]["rounds"] for bench in benches})
    widest = max(bench["stats"]["iqr"] / bench["stats"]["median"] for bench in benches)
    return f"n = {' or '.join(map(str, rounds))}, the interquartile range at most {widest:.0%} of the median"


def machine(results: Results) -> str:
    """Where and when, as far as the file says."""
    given = results.get("environment")
    if given is None:
        return f"{results['machine_info']['cpu']['brand_raw']}, {results['datetime'][:10]}"
    return f"{given['device']}, {given['threads']} threads, torch {given['torch']}, {given['date'][:10]}"
