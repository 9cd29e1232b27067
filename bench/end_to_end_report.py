"""What the end-to-end runs say: a table a network, the sentences beside it, and what the paper claims."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from bench.candidates import parted
from bench.time_to_accuracy import Seed, Standing, leader, standings
from fxfreeze.verdict import average

COLUMNS = (
    "run",
    "time / plain",
    "FLOPs / plain",
    "saved",
    "validation",
    "against plain-short",
    "plain needs",
    "test error",
)
NONE = "-"
NOTE = (
    "Time is training alone, freeze events and the filling of caches included, corrected for the machine's pace. Against "
    "plain-short: points of validation accuracy over plain cut to the same time, with the 95% interval over seeds. Plain "
    "needs: the share of its time in which plain is as accurate. No images are augmented."
)
COMPARABLE = 0.15  # of plain's own test error: past it, training was too short to stand beside what is published


class Claim(NamedTuple):
    """What Brock, Lim, Ritchie and Weston (2017, arXiv 1706.04983) report: up to so much time saved, at so many times
    plain's error."""

    saved: float
    error: float
    words: str


CLAIMS = {
    "densenet": Claim(0.20, 1.03, "up to 20% of the time for 3% relative error"),
    "wrn": Claim(0.20, 1.0, "20% of the time at no loss (ResNets)"),
    "resnet": Claim(0.20, 1.0, "20% of the time at no loss"),
    "vgg": Claim(0.0, 1.0, "nothing gained"),
}


def claim(network: str) -> Claim | None:
    """The paper's for a network of this family."""
    return next((claim for family, claim in CLAIMS.items() if family in network.lower()), None)


def comparable(seeds: Sequence[Seed]) -> bool:
    """Whether plain was trained well enough for the paper's relative errors to mean anything."""
    return 1 - average([seed["plain"].test for seed in seeds]).mean <= COMPARABLE


def table(network: str, seeds: Sequence[Seed]) -> Table:
    found = standings(seeds)
    first = leader(found)
    shown = Table(
        title=f"{network}, {len(seeds)} seed{'s' * (len(seeds) > 1)}", title_justify="left", header_style="bold"
    )
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "run" else "right", no_wrap=column == "run")
    for each in found:
        shown.add_row(*cells(each), style="bold" if each is first else None)
    return shown


def cells(standing: Standing) -> list[str]:
    margin, candidate = NONE, bool(parted(standing.name)[1])
    if standing.margin is not None:
        width = "" if standing.half_width is None else f" ± {100 * standing.half_width:.1f}"
        margin = f"{100 * standing.margin.mean:+.1f}{width}"
    needed = f"{standing.needed:.2f}" if standing.needed is not None else "more than 1"
    return [
        standing.name,
        standing.share.show(".2f"),
        f"{standing.flops.mean:.2f}",
        f"{1 - standing.share.mean:+.0%}",
        standing.validation.show(".1%"),
        margin,
        needed if candidate else NONE,
        f"{1 - standing.test.mean:.1%}",
    ]


def notes(network: str, seeds: Sequence[Seed]) -> list[str]:
    """The paper's claim, what equal code took, and what went wrong."""
    lines = []
    if (said := claim(network)) is not None:
        lines.append(f"The paper (arXiv 1706.04983) claims for this family: {said.words}.")
        if not comparable(seeds):
            error = 1 - average([seed["plain"].test for seed in seeds]).mean
            lines.append(
                f"Its star is not drawn: plain's own error here is {error:.0%}, past {COMPARABLE:.0%}, so that the claim is of "
                f"much longer trainings than these."
            )
    shares = [
        (each.seconds / each.steps) / (seed["plain"].seconds / seed["plain"].steps)
        for seed in seeds
        for name, each in seed.items()
        if name != "plain" and not parted(name)[1]
    ]
    if shares:
        noise = f"{average(shares).show('.3f')}, {min(shares):.3f} to {max(shares):.3f}"
        lines.append(
            f"A step of the shorter plain runs took {noise} times one of plain, the same code: that is the noise."
        )
    diverged = sorted({name for seed in seeds for name, each in seed.items() if each.diverged})
    if diverged:
        lines.append(f"Diverged for some seed, so try a lower --lr: {', '.join(diverged)}.")
    return lines
