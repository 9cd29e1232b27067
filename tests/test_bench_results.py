"""Files of results: what the suites write, what README reads, and which rows are refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import budget, tables
from bench.results import EARLIER, FACTS, LEFT_OUT, check, check_facts, lacking
from bench.roofline import Work
from bench.rows import Subject, facts

SUITES = {
    "bench_overlap",
    "bench_prefix",
    "bench_technique",
    "bench_iteration",
    "bench_training",
    "bench_freeze",
    "bench_gather",
    "bench_epoch",
    "bench_break_even",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What all suites write, run small in a process of their own."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    functions = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:xdist", *functions, f"--benchmark-json={file}"]
    environment = {**os.environ, "BENCH_SMALL": "1", "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "BENCH_SECONDS", "BENCH_DEVICE", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=tables.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(file.read_text())


def test_every_suite_writes_rows_as_they_should_be(written: Any) -> None:
    check(written)
    assert {bench["name"].partition("[")[0] for bench in written["benchmarks"]} == SUITES
    assert lacking(written) == set()


def test_rows_have_their_own_figures(written: Any) -> None:
    by_name = {bench["name"]: bench for bench in written["benchmarks"]}
    plain, cached = (by_name[f"bench_iteration[resnet-8-0.75-{way}]"] for way in ("plain", "fxfreeze + cache"))
    assert len(plain["stats"]["data"]) == plain["stats"]["rounds"] == 2
    assert cached["extra_info"]["flops"] < plain["extra_info"]["flops"]
    assert 0 < cached["extra_info"]["saved_bytes"] < plain["extra_info"]["saved_bytes"]
    assert cached["extra_info"]["peak_bytes"] < plain["extra_info"]["peak_bytes"]
    assert cached["extra_info"]["roofline"] > 0
    assert 0 < cached["extra_info"]["relative_error"] < 1e-5
    assert by_name["bench_freeze[resnet-8-0.5]"]["extra_info"]["roofline"] is None


def test_techniques_save_what_they_say(written: Any) -> None:
    by = {b["params"]["technique"]: b["extra_info"] for b in written["benchmarks"] if "technique" in b["params"]}
    assert by["no tape"]["saved_bytes"] < by["eager"]["saved_bytes"]  # the frozen half keeps nothing
    assert by["no tape"]["flops"] < by["eager"]["flops"] == by["plain"]["flops"]
    assert by["cache"]["flops"] < by["no tape"]["flops"]


@pytest.mark.parametrize("name", ["techniques", "iterations", "cache"])
def test_tables_are_made_of_what_is_written(written: Any, name: str) -> None:
    table = tables.TABLES[name].build(written)
    assert table is not None
    assert len([line for line in table.splitlines() if line.startswith("| ")]) >= 3


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_committed_files_hold_every_fact_or_are_known_to_be_older(path: Path) -> None:
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or "benchmarks" not in results:
        assert path.name not in {table.file for table in tables.TABLES.values()} - {"kernels.json"}
    elif lacking(results):
        assert path.name == EARLIER
        assert lacking(results) <= LEFT_OUT
    else:
        check(results)


def without(results: Any, *keys: Any) -> Any:
    changed = copy.deepcopy(results)
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return changed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("benchmarks",), "no list of benchmarks"),
        (("environment",), "environment is None; expected a dictionary"),
        (("environment", "date"), "environment has no 'date'"),
        (("benchmarks", 0, "extra_info", "roofline"), "extra_info has no 'roofline'"),
        (("benchmarks", 0, "stats", "iqr"), "stats has no 'iqr'"),
    ],
)
def test_a_file_that_leaves_something_out_is_refused(written: Any, keys: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(without(written, *keys))


def test_files_of_no_rows_and_facts_of_another_kind_are_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="it has no rows"):
        check(written | {"benchmarks": []})
    known = written["benchmarks"][0]["extra_info"]
    check_facts(known)
    with pytest.raises(ValueError, match=r"'flops' is '7'; expected int or NoneType"):
        check_facts(known | {"flops": "7"})
    with pytest.raises(ValueError, match=r"'threads' is True; expected int"):
        check_facts(known | {"threads": True})


def subject(error: float, work: Work | None = None) -> Subject:
    return Subject(torch.float32, (4, 3), error, 1e-4, work, torch.device("cpu"))


TIMES = {"a": [2.0, 4.0, 8.0], "b": [1.0, 1.0, 1.0]}


def test_a_row_states_all_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import rows
    from bench.roofline import Ceilings

    monkeypatch.setattr(rows, "ceilings", lambda device, dtype: Ceilings(10.0, 1000.0))
    found = facts(subject(1e-6, Work(flops=2000, bytes=10)), TIMES, "a", "b")
    check_facts(found)
    assert found.keys() == FACTS.keys()
    assert (found["ratio"], found["baseline"], found["shape"], found["dtype"]) == (4.0, "b", [4, 3], "float32")
    assert (found["flops"], found["bytes"], found["roofline"]) == (2000, 10, 0.5)  # two seconds of the median's four


@pytest.mark.parametrize("error", [1.1e-4, float("inf"), float("nan")])
def test_a_wrong_row_fails(error: float) -> None:
    with pytest.raises(AssertionError, match="a is wrong: relative error"):
        facts(subject(error), TIMES, "a", "b")


def test_nothing_begins_after_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 10.0)
    monkeypatch.setattr(budget, "spent", lambda: 9.0)
    budget.begin()
    monkeypatch.setattr(budget, "spent", lambda: 11.0)
    with pytest.raises(pytest.skip.Exception, match=r"has taken 11 s, and BENCH_SECONDS=10"):
        budget.begin()
