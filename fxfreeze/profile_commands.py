"""``fxfreeze profile``: measures an iteration at each depth, prints the table, writes what was asked for."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from fxfreeze.batches import Batches
from fxfreeze.commands import refusing, wide_console
from fxfreeze.depth_picture import check_picture
from fxfreeze.profiling import profile
from fxfreeze.progress import counted
from fxfreeze.recipes import Settings, units_of
from fxfreeze.task import Task
from fxfreeze.train import logits_of

__all__ = ["run"]


def run(
    task: Task,
    settings: Settings,
    *,
    depths: Sequence[int] | None,
    rounds: int,
    json: Path | None,
    plot: Path | None,
    trace: Path | None,
    progress: bool,
) -> int:
    """Profiles the recipe's iterations on the task's own batches; the exit status."""
    if plot is not None:
        check_picture(plot, "--plot")
    net, batches = task.build(settings.seed), Batches(task.train, settings.batch_size, settings.seed)
    units_of(net, batches[0].images)
    sgd = functools.partial(
        torch.optim.SGD,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )
    with counted(Console(stderr=True), "iterations", shown=progress) as show:
        profiled = profile(
            net,
            batches[0],
            loader=map(batches.__getitem__, itertools.count()),
            loss=_loss,
            optimizer=sgd,
            depths=depths,
            rounds=rounds,
            trace=trace,
            progress=show,
        )
    console = wide_console()
    console.print(profiled.table())
    if json is not None:
        with refusing(f"--json {json} can't be written"):
            json.write_text(profiled.json() + "\n")
    if plot is not None:
        with refusing(f"--plot {plot} can't be written"):
            profiled.plot(plot, subject=f"{task.model} on {task.data}")
    for what, path in (("Figures", json), ("Picture", plot), ("Trace, for ui.perfetto.dev", trace)):
        if path is not None:
            console.print(f"{what}: {path}", highlight=False, soft_wrap=True)
    return 0


def _loss(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(outputs), labels)
