"""A measured profile: its table, its picture, its JSON, and what it says of the prediction."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fxfreeze.disagreement import explain
from fxfreeze.iterations import Iteration, Parts

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Profile"]


@dataclass(frozen=True)
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

    def explanation(self) -> str:
        """Where measured and predicted time disagree most, and the largest cause, with the figures that say so."""
        return explain(self.iterations, self.units, self.unit_flops, self.rounds)

    def table(self) -> "Table":
        """The profile as a rich table, one row a depth, in milliseconds."""
        from rich.table import Table

        title = f"milliseconds of an iteration: {self.conditions()}"
        table = Table(title=title, caption=self.explanation(), caption_justify="left")
        table.add_column("frozen", justify="right")
        table.add_column("up to")
        heads = (
            "data",
            "prefix",
            "suffix forward",
            "backward",
            "optimizer",
            "iteration",
            "quartiles",
            "predicted",
            "off",
        )
        for head in heads:
            table.add_column(head, justify="right")
        for each in self.iterations:
            parts, total, predicted = each.measured, each.measured.total, each.predicted.total
            table.add_row(
                str(each.depth),
                self.units[each.depth - 1] if each.depth else "",
                _milliseconds(parts.data) if self.fetched else "given",
                _milliseconds(parts.prefix) if each.depth else "",
                *map(_milliseconds, (parts.suffix, parts.backward, parts.optimizer, total)),
                "-".join(map(_milliseconds, each.quartiles)),
                _milliseconds(predicted),
                f"{total / predicted - 1:+.0%}",
            )
        return table

    def conditions(self) -> str:
        """What was measured, where, and how often."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"batch {self.batch}, {self.device}, {threads}, mean of the middle half of {self.rounds} rounds"

    def plot(self, path: str | Path) -> None:
        """Draw the staircase, measured parts stacked and the prediction as a line, to an image file (format by suffix)."""
        from fxfreeze.depth_picture import by_depth

        by_depth(self.iterations, self.units, self.conditions()).savefig(path, dpi=120)

    def json(self) -> str:
        """All of it, as JSON; times in seconds."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """What ``json`` wrote."""
        fields = json.loads(text)
        iterations = tuple(
            Iteration(
                depth=each["depth"],
                backend=each["backend"],
                measured=Parts(**each["measured"]),
                quartiles=(each["quartiles"][0], each["quartiles"][1]),
                predicted=Parts(**each["predicted"]),
            )
            for each in fields.pop("iterations")
        )
        units, unit_flops = tuple(fields.pop("units")), tuple(fields.pop("unit_flops"))
        return cls(iterations=iterations, units=units, unit_flops=unit_flops, **fields)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds < 0.01 else f"{seconds * 1e3:,.1f}"
