"""A measured profile: its table, its picture, its JSON, and what it says of the prediction."""

import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fxfreeze.disagreement import explain
from fxfreeze.iterations import Iteration, Parts
from fxfreeze.sizes import change_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Profile"]

_PRINTED = 140  # letters of a line, where no terminal says


@dataclass(frozen=True, repr=False)
class Profile:
    """What an iteration takes at each of some depths, in seconds, beside what FLOPs predict.

    iterations: by depth, the first at 0; units: their names, the head last; unit_flops: of a forward of the batch, by
    unit; batch: samples; fetched: whether batches came from a loader, so that the data's time means something; rounds:
    in each of which every depth took its turn; device, threads, torch: what ran it.
    """

    iterations: tuple[Iteration, ...]
    units: tuple[str, ...]
    unit_flops: tuple[int, ...]
    batch: int
    fetched: bool
    rounds: int
    device: str
    threads: int
    torch: str

    def __repr__(self) -> str:
        return f"<Profile at depths {', '.join(str(each.depth) for each in self.iterations)}: {self.conditions()}>"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=_PRINTED, record=True)
        console.print(self.table())
        return console.export_text().rstrip()

    def explanation(self) -> str:
        """Where measured and predicted time disagree most, and the largest cause, with the figures that say so."""
        return explain(self.iterations, self.units, self.unit_flops, self.rounds)

    def table(self) -> "Table":
        """The profile as a rich table, one row a depth, in milliseconds; where it is narrow, names of units are folded."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=f"milliseconds of an iteration: {self.conditions()}",
            caption=self.explanation(),
            caption_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            padding=0,
        )
        table.add_column("depth", justify="right", no_wrap=True)
        table.add_column("up to", overflow="fold")
        for head in (*(part.name for part in fields(Parts)), "total", "±", "predicted", "off"):
            table.add_column(head, justify="right", no_wrap=True)
        for each in self.iterations:
            table.add_row(str(each.depth), self.units[each.depth - 1] if each.depth else "", *self._cells(each))
        return table

    def _cells(self, each: Iteration) -> list[str]:
        parts, total, predicted = each.measured, each.measured.total, each.predicted.total
        low, high = each.quartiles
        return [
            _milliseconds(parts.data) if self.fetched else "given",
            _milliseconds(parts.prefix) if each.depth else "",
            *map(_milliseconds, (parts.suffix, parts.backward, parts.optimizer, total, (high - low) / 2, predicted)),
            change_text(total / predicted - 1),
        ]

    def conditions(self) -> str:
        """What was measured, where, and how often."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        data = "" if self.fetched else " (given, not fetched)"
        if self.rounds < 4:
            often = f"mean of {self.rounds} rounds" if self.rounds > 1 else "one round"
        else:
            often = f"mean of the middle half of {self.rounds} rounds, ± half the distance of its ends"
        return f"batch {self.batch}{data}, {self.device}, {threads}, {often}"

    def plot(self, path: str | Path, *, subject: str = "") -> None:
        """Draw the staircase, measured parts stacked and the prediction as a line, to a .png, .svg or .pdf.

        subject: what was trained, for the title. Raises ChoiceError, a ValueError, for a file that ends in anything else.
        """
        from fxfreeze.depth_picture import by_depth, check_picture

        check_picture(path)
        by_depth(self.iterations, self.units, self.conditions(), subject).savefig(path, dpi=120)

    def json(self) -> str:
        """All of it, as JSON; times in seconds."""
        return json.dumps(asdict(self), indent=1)


def _milliseconds(seconds: float) -> str:
    figure = seconds * 1e3
    return f"{figure:.2f}" if figure < 10 else f"{figure:.1f}" if figure < 1000 else f"{figure:,.0f}"
