"""`fxfreeze kernels`: what it prints, what it refuses, and that the committed figures are those of the tables."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fxfreeze.cli import main
from fxfreeze.kernel_commands import ARCHS

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "kernels.json"
TYPES: dict[str, type | tuple[type, ...]] = {
    "kernel": str,
    "config": str,
    "arch": str,
    "dtype": str,
    "outputs": (int, type(None)),
    "choice": bool,
    "registers": int,
    "spills": int,
    "shared": int,
    "tensor_core": (str, type(None)),
    "serialised": bool,
    "load_bits": int,
    "asynchronous": bool,
    "faults": list,
    "flops_per_output": (int, float),
    "dram_bytes_per_output": (int, float),
    "l2_bytes_per_output": (int, float),
    "intensity": float,
    "ridge": float,
    "of_peak": float,
    "triton": str,
}

needs_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under TRITON_INTERPRET=1 triton compiles nothing"
)


def run(*arguments: str) -> int:
    """The exit status, by whichever way the command leaves."""
    try:
        return main(["kernels", *arguments])
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else -1


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets every compilation come out as one machine code, with what the test changes about it."""
    pytest.importorskip("triton")
    from fxfreeze.kernels import report
    from fxfreeze.kernels.aot import Variant
    from fxfreeze.kernels.architectures import ARCHITECTURES
    from fxfreeze.kernels.criteria import MATRIX_PRODUCTS
    from fxfreeze.kernels.machine_code import MachineCode

    def use(spills: int = 0) -> None:
        def look(variant: Variant) -> MachineCode:
            product = variant.kernel in MATRIX_PRODUCTS and variant.dtype != "fp32"
            core = ARCHITECTURES[variant.arch].tensor_core if product else None
            return MachineCode(100, 2048, spills, core, False, 128, 128, True)

        def at_once(wanted: Sequence[Variant], progress: Callable[[int, int], None]) -> dict[Variant, MachineCode]:
            progress(len(wanted), len(wanted))
            return {variant: look(variant) for variant in wanted}

        monkeypatch.setattr(report, "_look_at_all", at_once)

    return use


def check(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record.keys() == TYPES.keys()
        for field, kind in TYPES.items():
            assert isinstance(record[field], kind), (field, record[field])
        assert record["intensity"] == pytest.approx(
            record["flops_per_output"] / record["dram_bytes_per_output"], rel=0.02
        )
        assert 0 < record["of_peak"] <= 1
        assert record["l2_bytes_per_output"] > 0


# ---- report


@needs_triton
def test_json_is_all_that_goes_to_standard_output(
    read: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    read()
    assert run("report", "--arch", "sm_90", "--json") == 0
    out, err = capsys.readouterr()
    records = json.loads(out)
    check(records)
    assert err == ""
    assert {record["arch"] for record in records} == {"sm_90"}
    assert {record["dtype"] for record in records} == {"fp16", "bf16", "fp32", "tf32"}
    kernels = {"conv1x1", "linear", "conv3x3", "rolling3x3", "depthwise", "pointwise", "layernorm"}
    assert {record["kernel"] for record in records} == kernels
    assert len({(r["kernel"], r["config"], r["dtype"]) for r in records}) == len(records)
    assert len(out.splitlines()) == len(records) + 2


@needs_triton
def test_all_architectures_unless_some_are_named(read: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    read()
    assert run("report", "--json") == 0
    assert {record["arch"] for record in json.loads(capsys.readouterr().out)} == set(ARCHS)
    assert run("report", "--json", "--arch", "sm_80", "--arch", "sm_86") == 0
    assert {record["arch"] for record in json.loads(capsys.readouterr().out)} == {"sm_80", "sm_86"}


@needs_triton
def test_the_table_tells_the_same(read: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    read()
    assert run("report", "--arch", "sm_90") == 0
    lines = capsys.readouterr().out.splitlines()
    [row] = [line for line in lines if "conv3x3" in line and "128x128x64" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:5] == ["sm_90", "conv3x3", "any", "128x128x64, 8 warps, 3 stages", "fp16, bf16"]
    assert cells[5:9] == ["100", "2.0 kB", "HGMMA", "128 bits"]
    assert all(len(line) <= 140 for line in lines if line.startswith("│"))


@needs_triton
def test_faults_are_listed_and_set_the_status(read: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    read(spills=8)
    assert run("report", "--arch", "sm_90") == 1
    assert "sm_90 linear 128x128x64, 8 warps, 3 stages bf16: spills 8 bytes" in capsys.readouterr().out


@needs_triton
def test_exceptions_are_listed(
    read: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfreeze.kernels import configs

    read()
    exception = configs.CompilerException("0.1", 90, "conv1x1", 16, 64, configs.Config(64, 64, 32), "it serialises")
    monkeypatch.setattr(configs, "EXCEPTIONS", (exception,))
    assert run("report", "--arch", "sm_80") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(exception)


@needs_triton
@pytest.mark.slow
def test_compilations_run_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of them, through all that the stand-in above leaves out."""
    pytest.importorskip("triton")
    from fxfreeze.kernels import report

    shipped = report.shipped
    monkeypatch.setattr(report, "shipped", lambda arch: shipped(arch)[-1:])
    assert run("report", "--arch", "sm_90", "--json") == 0
    [record] = json.loads(capsys.readouterr().out)
    check([record])
    assert (record["kernel"], record["faults"], record["spills"]) == ("layernorm", [], 0)


# ---- what is refused, in one line


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    return line


def test_an_unknown_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "--arch", "sm_70") == 2
    line = refusal(capsys)
    assert "sm_70" in line
    assert all(arch in line for arch in ARCHS)


@pytest.mark.parametrize("action", ["report", "tune"])
def test_without_triton(action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert run(action) == 2
    assert refusal(capsys).endswith("the kernels need it: pip install triton")


@pytest.mark.parametrize("action", ["report", "tune"])
def test_under_the_interpreter(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(action) == 2
    assert "unset it" in refusal(capsys)


@needs_triton
def test_tune_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("tune") == 2
    assert "no CUDA device" in refusal(capsys)


# ---- the committed figures


def test_the_committed_report_is_of_the_tables_and_without_faults() -> None:
    pytest.importorskip("triton")
    from fxfreeze.kernels import configs

    records = json.loads(COMMITTED.read_text())
    check(records)
    assert [record for record in records if record["faults"] or record["spills"] or record["serialised"]] == []
    tiles: set[tuple[str, str, str, str]] = set()
    for (kernel, bits), by_arch in configs.TABLES.items():
        for arch in by_arch:
            for dtype in {16: ("fp16", "bf16"), 32: ("fp32", "tf32")}[bits]:
                rows = configs.candidates(kernel, arch, dtype, triton=records[0]["triton"])
                tiles |= {(f"sm_{arch}", kernel, dtype, str(tile)) for row in rows.values() for tile in row}
    reported = {(r["arch"], r["kernel"], r["dtype"], r["config"]) for r in records}
    products = {kernel for _, kernel, dtype, _ in reported if dtype == "tf32"}
    assert reported == {tile for tile in tiles if tile[2] != "tf32" or tile[1] in products}
