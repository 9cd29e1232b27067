"""The command line: `fxfreeze compare`, `train`, `plan`, `profile`, `cache` and `kernels`."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

from fxfreeze import cache_commands, checkpoint, commands, data, kernel_commands, profile_commands, zoo
from fxfreeze.imports import ChoiceError
from fxfreeze.inputs import TraceRefusal
from fxfreeze.option_types import number, whole, wholes, writable
from fxfreeze.profiling import MOST_DEPTHS, ROUNDS
from fxfreeze.recipes import FINETUNE, FROM_SCRATCH, Settings
from fxfreeze.task import prepare
from fxfreeze.train import PRECISIONS

DEFAULTS: dict[str, Any] = {
    "model": "densenet-bc-8-16",
    "data": "mnist5k",
    "data_root": None,
    "download": False,
    "device": "auto",
    "threads": None,
    "seeds": 1,
    "rows": None,
    "row": "fxfreeze",
    "block": 20,
    "finetune": False,
    "out": None,
    "progress": True,
    "save": None,
    "resume": None,
    "show_graph": False,
    "depth": None,
    "backend": "library",
    "depths": None,
    "rounds": ROUNDS,
    "json": None,
    "plot": None,
    "trace": None,
    **dataclasses.asdict(Settings()),
}
MISUSE = 2


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSE, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for a training that diverged or a cache with something wrong, 2 for what can't
    be done, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given = vars(_parser().parse_args(arguments))
    verb = " ".join(given.pop(word) for word in ("verb", "action") if word in given)
    sys.path.insert(0, "")  # --model mynet:build finds the user's own file, as python -m would
    try:
        if verb.startswith("cache "):
            return cache_commands.run(verb, **given)
        if verb.startswith("kernels "):
            return kernel_commands.run(verb, **given)
        return _run(verb, given, shlex.join(["fxfreeze", *arguments]))
    except (ChoiceError, TraceRefusal) as error:
        what = "the network can't be frozen: " if isinstance(error, TraceRefusal) else ""
        print(f"fxfreeze {verb}: error: {what}{' '.join(str(error).split())}", file=sys.stderr)
        return MISUSE
    except KeyboardInterrupt:  # before there was anything to end in good order
        print(f"fxfreeze {verb}: stopped", file=sys.stderr)
        return commands.INTERRUPTED


def _run(verb: str, given: dict[str, Any], command: str) -> int:
    state, about = checkpoint.load(given["resume"]) if "resume" in given else (None, {})
    _agree(given, about)
    options = argparse.Namespace(**{**DEFAULTS, **about, **given})
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    task = prepare(
        options.model,
        options.data,
        root=options.data_root,
        download=options.download,
        device=options.device,
        shapes=verb == "plan",
    )
    out = options.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    if verb == "plan" and options.show_graph:
        return commands.run_graph(task, settings, depth=options.depth, backend=options.backend)
    if verb == "plan":
        return commands.run_plan(task, settings, out=out)
    if verb == "profile":
        chosen = {name: getattr(options, name) for name in ("depths", "rounds", "json", "plot", "trace", "progress")}
        return profile_commands.run(task, settings, **chosen)
    if verb == "train":
        return commands.run_train(
            task,
            settings,
            row=options.row,
            block=options.block,
            save=options.save,
            state=state,
            progress=options.progress,
        )
    return commands.run_compare(
        task,
        settings,
        rows=options.rows,
        seeds=options.seeds,
        block=options.block,
        finetune=options.finetune,
        out=out,
        command=command,
        progress=options.progress,
    )


def _agree(given: dict[str, Any], about: dict[str, Any]) -> None:
    """A run goes on as what it was begun as."""
    for key, value in about.items():
        if given.get(key, value) != value:
            option = f"--{key.replace('_', '-')}"
            raise ChoiceError(
                f"{option} {given[key]}: the checkpoint's run has {value}; leave the option out, or start anew"
            )


def _parser() -> Parser:
    parser = Parser(
        prog="fxfreeze", description="Progressive freezing by graph surgery for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fxfreeze {version('fxfreeze')}")
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="compare|train|plan|profile|cache|kernels", parser_class=Parser
    )
    compare = _verb(verbs, "compare", "train by several recipes, interleaved, and report which was worth its time")
    train = _verb(verbs, "train", "train once, with --save and --resume")
    plan = _verb(verbs, "plan", "what a schedule would save on a network, without training")
    for verb in (compare, train, plan):
        _add_task(verb)
        _add_schedule(verb)
    _add_training(compare, (*PRECISIONS, "int8"))
    _add_training(train, (*PRECISIONS,))
    _add_compare(compare)
    _add_train(train)
    plan.add_argument("--out", type=Path, metavar="DIR", help="where the picture goes (default: runs/DATE-TIME)")
    plan.add_argument(
        "--show-graph", action="store_true", help="print the frozen part before and after the passes instead"
    )
    plan.add_argument(
        "--depth", type=int, metavar="N", help="units frozen for --show-graph (default: all but the last)"
    )
    backends = ("plain", "library", "triton")
    plan.add_argument("--backend", choices=backends, help="whose passes --show-graph runs (default: library)")
    _add_profile(_verb(verbs, "profile", "what an iteration takes by depth, measured and predicted"))
    about = "activations on disk: list them, check them, remove them"
    cache_commands.add_actions(_verb(verbs, "cache", about), _verb)
    about = "the fused kernels: their machine code, and which tiles are fastest here"
    kernel_commands.add_actions(_verb(verbs, "kernels", about), _verb)
    return parser


def _verb(verbs: Any, name: str, about: str) -> argparse.ArgumentParser:
    # Options that were not given are absent: a resumed run must tell them from those that equal a default.
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=about, description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    return verb


def _add_task(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("what is trained on what")
    group.add_argument("--model", metavar="NAME", help=_with_default("model", f"one of {', '.join(zoo.FORMS)}"))
    group.add_argument("--data", metavar="NAME", help=_with_default("data", f"one of {', '.join(data.FORMS)}"))
    group.add_argument(
        "--data-root", metavar="DIR", help="where the files of cifar10 and cifar100 are; plan needs none"
    )
    group.add_argument("--download", action="store_true", help="fetch them if they are missing")
    group.add_argument("--device", metavar="NAME", help=_with_default("device", "cpu, cuda, cuda:1, ..."))
    group.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads (default: torch's)")


def _add_schedule(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("how long, and when units freeze")
    group.add_argument("--epochs", type=whole(1), metavar="N", help=_with_default("epochs", "of plain training"))
    group.add_argument("--batch-size", type=whole(1), metavar="N", help=_with_default("batch_size", "samples a step"))
    group.add_argument(
        "--how", choices=("linear", "squared", "cubic"), help=_with_default("how", "spacing of the freezes")
    )
    first = "share of the steps before the first freeze, ahead of --how's power"
    group.add_argument("--t0", type=number(0, 1), metavar="T", help=_with_default("t0", first))
    group.add_argument("--scale-lr", action="store_true", help="raise the rates of units that freeze early")
    group.add_argument(
        "--steps-scale",
        type=number(0),
        metavar="X",
        help=_with_default("steps_scale", "steps under FreezeOut per step of plain training"),
    )
    group.add_argument("--seed", type=whole(0), metavar="N", help=_with_default("seed", "of weights and data order"))


def _add_training(verb: argparse.ArgumentParser, precisions: Sequence[str]) -> None:
    group = verb.add_argument_group("optimizer (SGD with Nesterov momentum)")
    group.add_argument("--lr", type=number(0), metavar="X", help=_with_default("lr", "learning rate at the start"))
    group.add_argument("--momentum", type=number(0, zero=True), metavar="X", help=_with_default("momentum", "of SGD"))
    group.add_argument("--weight-decay", type=number(0, zero=True), metavar="X", help=_with_default("weight_decay", ""))
    about = f"of autocast; fp32: none{'; int8: none, and one row more' if 'int8' in precisions else ''}"
    group.add_argument("--precision", choices=precisions, help=_with_default("precision", about))
    verb.add_argument(
        "--block", type=whole(1), metavar="N", help=_with_default("block", "steps of plain between turns")
    )
    verb.add_argument("--no-progress", dest="progress", action="store_false", help="show nothing while training")


def _add_compare(verb: argparse.ArgumentParser) -> None:
    rows = (
        f"recipes to train, comma-separated (default: {','.join(FROM_SCRATCH)}; with --finetune {','.join(FINETUNE)})"
    )
    verb.add_argument("--rows", type=lambda text: text.split(","), metavar="ROWS", help=rows)
    verb.add_argument(
        "--seeds", type=whole(1), metavar="K", help=_with_default("seeds", "repeat with --seed, --seed + 1, ...")
    )
    verb.add_argument(
        "--finetune", action="store_true", help="pretrain on half of the classes, then compare on the other half"
    )
    verb.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: runs/DATE-TIME)")


def _add_train(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--row", choices=FROM_SCRATCH[:3], help=_with_default("row", "by which recipe"))
    verb.add_argument(
        "--save", type=writable, metavar="PATH", help="checkpoint, at the end of epochs, the end and Ctrl-C"
    )
    verb.add_argument("--resume", type=Path, metavar="PATH", help="go on from a checkpoint, as what it was begun as")


def _add_profile(verb: argparse.ArgumentParser) -> None:
    _add_task(verb)
    group = verb.add_argument_group("what is measured")
    group.add_argument("--batch-size", type=whole(1), metavar="N", help=_with_default("batch_size", "samples a step"))
    group.add_argument("--seed", type=whole(0), metavar="N", help=_with_default("seed", "of weights and data order"))
    few = f"units frozen, comma-separated (default: all, or {MOST_DEPTHS} evenly spread); 0 is always measured"
    group.add_argument("--depths", type=wholes, metavar="N,N", help=few)
    group.add_argument("--rounds", type=whole(1), metavar="N", help=_with_default("rounds", "turns of each depth"))
    verb.add_argument("--json", type=writable, metavar="FILE", help="write the figures, in seconds")
    verb.add_argument("--plot", type=writable, metavar="FILE", help="draw the staircase (.png, .svg, .pdf)")
    about = "write a Chrome trace of an iteration at each depth, its ranges named by unit"
    verb.add_argument("--trace", type=writable, metavar="FILE", help=about)
    verb.add_argument("--no-progress", dest="progress", action="store_false", help="show nothing while measuring")


def _with_default(name: str, about: str) -> str:
    return f"{about} (default: {DEFAULTS[name]})".strip()
