"""`fxfreeze kernels`: what the kernels' machine code is like, and which of their tiles are fastest here."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from fxfreeze.commands import refusing, wide_console
from fxfreeze.imports import ChoiceError, optional
from fxfreeze.kernels.architectures import ARCHITECTURES
from fxfreeze.sizes import bytes_text

if TYPE_CHECKING:
    from fxfreeze.kernels.configs import Config

__all__ = ["ARCHS", "add_actions", "as_lines", "run", "run_report", "run_tune"]

ARCHS = tuple(f"sm_{number}" for number in ARCHITECTURES)
FAULTY = 1  # the exit status where a tile is not what it should be
_REMEDY = "the kernels need it: pip install triton"
_COLUMNS = ("arch", "kernel", "outputs", "tile", "dtype", "registers", "shared", "tensor core", "loads", "FLOPs/byte")
_NUMBERS = ("outputs", "registers", "shared", "loads", "FLOPs/byte")

Record = dict[str, Any]


def add_actions(verb: argparse.ArgumentParser, add: Callable[[Any, str, str], argparse.ArgumentParser]) -> None:
    """Gives the verb its actions and their options; ``add``: an action, by its name and what it is about."""
    actions = verb.add_subparsers(dest="action", required=True, metavar="report|tune")
    report = add(actions, "report", "compile every kernel, with no GPU needed, and read the machine code")
    archs = f"one of {', '.join(ARCHS)}; may be repeated (default: all)"
    report.add_argument("--arch", action="append", choices=ARCHS, metavar="ARCH", help=archs)
    report.add_argument("--json", action="store_true", help="a list of objects on standard output, and nothing else")
    tune = add(actions, "tune", "measure the tiles on this machine's GPU, and save the fastest in the user's cache")
    tune.add_argument("--device", metavar="NAME", help="cuda, cuda:1, ... (default: cuda)")


def run(verb: str, arch: Sequence[str] = ARCHS, json: bool = False, device: str = "cuda") -> int:
    """Runs an action with the options that were given; the exit status."""
    return run_report(arch, json) if verb == "kernels report" else run_tune(device)


def run_report(archs: Sequence[str], as_json: bool) -> int:
    """Compiles every tile of the architectures and prints a table, or JSON and nothing else; the exit status."""
    _need_triton()
    from fxfreeze.kernels import configs
    from fxfreeze.kernels.report import report

    aside = Console(stderr=True)
    with aside.status("Compiling") as status:
        records = report(
            [int(arch.removeprefix("sm_")) for arch in archs],
            lambda done, of: status.update(f"Compiled {done} of {of}"),
        )
    if as_json:
        sys.stdout.write(as_lines(records))
    else:
        console = wide_console()
        console.print(_table(records))
        for line in (*_faults(records), *map(str, configs.EXCEPTIONS)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return FAULTY if any(record["faults"] for record in records) else 0


def run_tune(device: str) -> int:
    """Measures the tiles on a GPU and saves the fastest for this user; the exit status."""
    _need_triton()
    if not torch.cuda.is_available():
        raise ChoiceError("there is no CUDA device to measure on; run it on the machine that trains")
    from fxfreeze.kernels import measured
    from fxfreeze.kernels.tune import tune

    console = wide_console()
    with refusing("the measurements can't be saved"):
        tiles = tune(torch.device(device), lambda key, times: _say_times(console, key, times))
        path = measured.save(torch.cuda.get_device_name(device), tiles)
    console.print(f"Saved: {path}", highlight=False, soft_wrap=True)
    return 0


def as_lines(records: Sequence[Record]) -> str:
    """A JSON list, an object a line."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def _need_triton() -> None:
    optional("triton", _REMEDY, ChoiceError)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ChoiceError("TRITON_INTERPRET=1 is set, under which triton interprets and compiles nothing; unset it")


def _table(records: Sequence[Record]) -> Table:
    """fp16 and bf16 share a row: their machine code hardly differs."""
    table = Table(header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for _, group in groupby(sorted(records, key=_row), key=_row):
        alike = list(group)
        first = alike[0]
        table.add_row(
            first["arch"],
            first["kernel"],
            str(first["outputs"] or "any"),
            first["config"],
            ", ".join(record["dtype"] for record in alike),
            str(max(record["registers"] for record in alike)),
            bytes_text(max(record["shared"] for record in alike)),
            (first["tensor_core"] or "-") + (" serialised" if any(record["serialised"] for record in alike) else ""),
            f"{min(record['load_bits'] for record in alike)} bits",
            f"{first['intensity']:.0f} of {first['ridge']:.0f}",
        )
    return table


def _row(record: Record) -> tuple[object, ...]:
    arch, outputs = int(record["arch"].removeprefix("sm_")), record["outputs"] or sys.maxsize
    bits = "16" if record["dtype"] in ("fp16", "bf16") else record["dtype"]
    return arch, record["kernel"], bits, outputs, record["config"]


def _faults(records: Sequence[Record]) -> list[str]:
    return [
        f"{record['arch']} {record['kernel']} {record['config']} {record['dtype']}: {'; '.join(record['faults'])}"
        for record in records
        if record["faults"]
    ]


def _say_times(console: Console, key: str, times: Mapping["Config", float]) -> None:
    tiles = ", ".join(f"{tile}: {milliseconds:.3f} ms" for tile, milliseconds in times.items())
    console.print(f"{key}: {tiles}", highlight=False, soft_wrap=True)
