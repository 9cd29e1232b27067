"""What a file of results holds: pytest-benchmark's JSON, with the same facts in every row, and the environment.

``check_facts`` sees each row before it is kept, ``check`` a whole file, ``lacking`` one that is older than a fact.
"""

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

Kinds = tuple[type, ...]

NUMBER: Kinds = (int, float)
ENVIRONMENT: dict[str, Kinds] = dict.fromkeys(
    ("device", "threads", "torch", "fxfreeze", "python", "system", "date"), (str,)
)
STATS: dict[str, Kinds] = {"median": NUMBER, "iqr": NUMBER, "rounds": (int,), "data": (list,)}
FACTS: dict[str, Kinds] = {
    "device": (str,),
    "torch": (str,),
    "triton": (str, NoneType),
    "threads": (int,),
    "dtype": (str,),
    "shape": (list,),
    "bytes": (int, NoneType),
    "flops": (int, NoneType),
    "roofline": (*NUMBER, NoneType),
    "relative_error": NUMBER,
    "baseline": (str,),
    "ratio": NUMBER,
}

# A file measured before every row said all of this, and what it leaves out. One that is measured anew leaves out nothing.
EARLIER = "backends-cpu.json"
LEFT_OUT = {"environment", *FACTS} - {"torch", "threads", "baseline", "ratio"}


def check(results: Any) -> None:
    """ValueError with every place where ``results`` are not what a file of results holds."""
    if wrong := list(_wrong(results)):
        raise ValueError("not a file of results:\n" + "\n".join(wrong))


def check_facts(facts: Mapping[str, Any]) -> None:
    """ValueError with every fact that a row must state and ``facts`` do not."""
    if wrong := list(_differences("the row", facts, FACTS)):
        raise ValueError("\n".join(wrong))


def lacking(results: Mapping[str, Any]) -> set[str]:
    """Which of the environment and of the rows' facts a file leaves out, in any row."""
    left_out = set() if "environment" in results else {"environment"}
    return left_out.union(*(FACTS.keys() - bench["extra_info"].keys() for bench in results["benchmarks"]))


def _wrong(results: Any) -> Iterator[str]:
    if not isinstance(results, dict) or not isinstance(results.get("benchmarks"), list):
        yield "it has no list of benchmarks: pytest-benchmark's --benchmark-json writes one"
        return
    yield from _differences("environment", results.get("environment"), ENVIRONMENT)
    if not results["benchmarks"]:
        yield "it has no rows: every benchmark was skipped or failed"
    for bench in results["benchmarks"]:
        name = str(bench.get("fullname"))
        yield from _differences(f"{name}: extra_info", bench.get("extra_info"), FACTS)
        yield from _differences(f"{name}: stats", bench.get("stats"), STATS)


def _differences(where: str, given: Any, expected: Mapping[str, Kinds]) -> Iterator[str]:
    if not isinstance(given, dict):
        yield f"{where} is {given!r}; expected a dictionary"
        return
    for key, kinds in expected.items():
        if key not in given:
            yield f"{where} has no {key!r}"
        elif not isinstance(given[key], kinds) or isinstance(given[key], bool):
            names = " or ".join(kind.__name__ for kind in kinds)
            yield f"{where}: {key!r} is {given[key]!r}; expected {names}"
