"""End to end: is freezing worth its time on CIFAR-10? Error against time saved, by network, schedule and form.

python -m bench.train --data cifar10.npz --seeds 3 --out end-to-end.json

Trains, for each network and seed, plain, plain for fewer steps, and every schedule as published FreezeOut, as fxfreeze and
with the cache; tells which schedule is best for its time against plain training cut to as much, tries that one on fresh
seeds, and writes the figures, and a picture beside them. With the same --out it goes on where it was stopped.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.candidates import FORMS, Candidate
from bench.end_to_end import Design, Search, shrunk, work
from bench.end_to_end_kept import Deadline, Kept
from bench.end_to_end_report import NOTE, notes, table
from bench.error_against_time import picture
from fxfreeze import machine
from fxfreeze.cli import MISUSE, Parser
from fxfreeze.commands import INTERRUPTED, refusing, wide_console
from fxfreeze.imports import ChoiceError
from fxfreeze.inputs import TraceRefusal
from fxfreeze.option_types import number, whole
from fxfreeze.progress import display, stop_on_interrupt
from fxfreeze.recipes import Settings
from fxfreeze.task import Task, find_device, prepare
from fxfreeze.train import PRECISIONS

ON_CPU: dict[str, Any] = {
    "networks": "densenet-bc-8-16,resnet-8",
    "samples": "4000,1000,2000",
    "epochs": 4,
    "batch_size": 32,
    "precision": "fp32",
}
ON_GPU: dict[str, Any] = {
    "networks": "densenet-bc-12-100,wrn-40-4,bench.resnet18:build,vgg-16-bn",
    "samples": "",
    "epochs": 30,
    "batch_size": 128,
    "precision": "bf16",
}
SCHEDULES = "cubic:0.8:scaled,cubic:0.5:scaled,linear:0.5:scaled,cubic:0.3:x2"
SHARES = "0.4,0.55,0.7,0.85"
BUDGET = ("minutes", "progress", "seeds", "out")  # what may change when runs are taken up again


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for what can't be done, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ChoiceError, TraceRefusal) as error:
        print(f"bench.train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISUSE


def _run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    for name, value in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    searches = _searches(options)
    kept = Kept(options.out, _about(options, device), machine.environment(device))
    kept.load(searches)
    for search in searches.values():
        search.check()
    aside = Console(stderr=True)
    kept.save(searches)  # finds out now whether it can be written
    with stop_on_interrupt(aside) as interrupted:
        _work(searches, kept, Deadline(options.minutes, interrupted), aside, progress=options.progress)
    _report(searches, options.out, whole=not interrupted())
    return INTERRUPTED if interrupted() else 0


def _searches(options: argparse.Namespace) -> dict[str, Search]:
    candidates = [Candidate.parse(text) for text in options.schedules.split(",")]
    forms, shares = options.forms.split(","), _numbers("--shares", options.shares)
    if unknown := [form for form in forms if form not in FORMS]:
        raise ChoiceError(f"--forms has {unknown[0]!r}; expected some of {','.join(FORMS)}")
    if not all(0 < share < 1 for share in shares):
        raise ChoiceError(f"--shares is {options.shares}; expected numbers between 0 and 1, of plain's steps")
    design = Design(candidates, forms, sorted(shares), options.seeds)
    settings = Settings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        precision=options.precision,
        seed=options.seed,
    )
    names = options.networks.split(",")
    task = _task(names[0], options)
    return {name: Search(replace(task, model=name), settings, design) for name in names}


def _task(network: str, options: argparse.Namespace) -> Task:
    """CIFAR-10 from torchvision's root, or any set from a .npz, whole on the device."""
    place = Path(options.data).expanduser()
    named = (
        {"data_name": "cifar10", "root": str(place)} if place.is_dir() else {"data_name": f"npz:{place}", "root": None}
    )
    task = prepare(network, download=False, device=options.device, **named)
    whole = [len(split.labels) for split in (task.train, task.val, task.test)]
    return shrunk(
        task, [int(count) for count in _numbers("--samples", options.samples, 3)] if options.samples else whole
    )


def _numbers(option: str, text: str, count: int | None = None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or count not in (None, len(numbers)) or not all(0 < number < math.inf for number in numbers):
        raise ChoiceError(f"{option} is {text!r}; expected {count or 'some'} numbers above 0")
    return numbers


def _about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What runs must agree in to stand side by side."""
    given = {name: value for name, value in vars(options).items() if name not in BUDGET}
    return {**given, "data": Path(options.data).name, "device": machine.chip(device)}


def _work(searches: dict[str, Search], kept: Kept, stop: Deadline, console: Console, *, progress: bool) -> None:
    """Runs what is missing, one piece after another; begins none that the last one of its network says won't end in time."""
    took: dict[str, float] = {}
    for search, title, run in work(list(searches.values())):
        name = search.task.model
        if stop() or took.get(name, 0) > stop.left:
            console.print(f"Not begun for want of time: {name}, {title}.", highlight=False, soft_wrap=True)
            return
        console.print(f"{name}, {title}", highlight=False, soft_wrap=True)
        began = time.monotonic()
        with display(console, shown=progress) as watch:
            whole = run(watch, stop)
        took[name] = time.monotonic() - began
        if not whole:
            console.print(f"Stopped, and so not counted: {name}, {title}.", highlight=False, soft_wrap=True)
            return
        kept.save(searches)


def _report(searches: dict[str, Search], out: Path, *, whole: bool) -> None:
    """whole: nobody waits for the prompt, so what the columns mean is told too."""
    console = wide_console()
    done = {name: list(search.seeds.values()) for name, search in searches.items() if search.seeds}
    for name, search in searches.items():
        if name in done:
            console.print(table(name, done[name]))
        lines = notes(name, done[name]) if name in done else []
        for line in (*lines, f"{name}: {search.verdict()}", ""):
            console.print(line, highlight=False, soft_wrap=True)
    if whole:
        console.print(NOTE, highlight=False, soft_wrap=True)
    if done:
        path = out.with_suffix(".png")
        with refusing(f"the picture can't be written to {path}"):
            picture(done).savefig(path, dpi=150)
        console.print(f"Figures: {out}  Picture: {path}", highlight=False, soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(prog="bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, metavar="FILE.npz|ROOT", help="x_train, y_train, x_test, y_test; or torchvision's root"
    )
    parser.add_argument(
        "--networks", metavar="NAMES", help="with commas; default: the paper's on a GPU, small ones on a CPU"
    )
    parser.add_argument(
        "--schedules", default=SCHEDULES, metavar="LIST", help="HOW:T0[:scaled][:xSTEPS] (default: %(default)s)"
    )
    parser.add_argument("--forms", default=",".join(FORMS), metavar="LIST", help="(default: %(default)s)")
    parser.add_argument(
        "--shares", default=SHARES, metavar="LIST", help="lengths of shorter plain runs (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=whole(1), default=3, metavar="K", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first one (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=whole(1), metavar="N", help="of plain training (default: 30 on a GPU, 4 on a CPU)"
    )
    parser.add_argument("--batch-size", type=whole(1), metavar="N", help="(default: 128 on a GPU, 32 on a CPU)")
    parser.add_argument("--lr", type=number(0), default=0.1, metavar="RATE", help="(default: %(default)s)")
    parser.add_argument("--samples", metavar="TRAIN,VAL,TEST", help="default: all on a GPU, 4000,1000,2000 on a CPU")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: %(default)s)"
    )
    parser.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--minutes", type=number(0), metavar="M", help="stop in time; the same command goes on from there"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("end-to-end.json"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show nothing while training")
    return parser


if __name__ == "__main__":
    sys.exit(main())
