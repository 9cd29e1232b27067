"""The picture: test error against time saved, a panel a network; plain's frontier, the candidates, the paper's claim."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from bench.candidates import FORMS, parted
from bench.end_to_end_report import claim, comparable
from bench.time_to_accuracy import Seed, Standing, frontier, standings
from fxfreeze.canvas import INK, styled_figure
from fxfreeze.pictures import COLOURS, MARKERS

CLAIM = "#E8B923"
PLAIN = COLOURS["plain"]
MOST_COLUMNS = 2


def picture(networks: Mapping[str, Sequence[Seed]]) -> Figure:
    """networks: the whole seeds of each, one at least."""
    columns = min(MOST_COLUMNS, len(networks))
    rows = -(-len(networks) // columns)
    figure, panels = styled_figure(4.4 * rows + 0.8, rows=rows, columns=columns)
    numbers = _numbers(networks)
    for axes, (network, seeds) in zip(panels, networks.items(), strict=False):
        _panel(axes, network, seeds, numbers)
    for spare in panels[len(networks) :]:
        spare.set_visible(False)
    figure.legend(handles=_legend(networks, numbers), loc="outside lower center", frameon=False, ncols=4, fontsize=9)
    return figure


def _panel(axes: Axes, network: str, seeds: Sequence[Seed], numbers: Mapping[str, int]) -> None:
    found = standings(seeds)
    _draw_frontier(axes, seeds)
    for each in found:
        form, schedule = parted(each.name)
        if schedule:
            _draw_candidate(axes, each, form, numbers[schedule])
    if (said := claim(network)) is not None and comparable(seeds):
        plain = next(each for each in found if each.name == "plain")
        error = said.error * (1 - plain.test.mean)
        axes.plot(said.saved, error, ls="", marker="*", ms=17, color=CLAIM, mec=INK, mew=0.8, zorder=2.5)
    axes.set_title(f"{network}  ({len(seeds)} seed{'s' * (len(seeds) > 1)})", loc="left")
    axes.set_title("better: down and right", loc="right", fontsize=8, color=INK)
    axes.set_xlabel("time saved (share of plain training's)")
    axes.set_ylabel("test error", color=INK)
    axes.margins(0.08)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))


def _draw_frontier(axes: Axes, seeds: Sequence[Seed]) -> None:
    """Plain's lengths by their steps, each seed faint, the mean in front."""
    lines = [[(1 - share, 1 - accuracy) for share, accuracy in frontier(seed, "test")] for seed in seeds]
    for line in lines:
        axes.plot(*zip(*line, strict=True), color=PLAIN, linewidth=0.7, alpha=0.3)
    saved = [saved for saved, _ in lines[0]]
    errors = [sum(line[i][1] for line in lines) / len(lines) for i in range(len(saved))]
    axes.plot(saved, errors, color=PLAIN, linewidth=1.8, marker="s", ms=5, zorder=2.2)


def _draw_candidate(axes: Axes, each: Standing, form: str, number: int) -> None:
    at = (1 - each.share.mean, 1 - each.test.mean)
    spread = {"xerr": each.share.spread, "yerr": each.test.spread}
    axes.errorbar(*at, **spread, color=COLOURS[form], elinewidth=1, alpha=0.35, zorder=2.1)
    axes.plot(*at, ls="", marker=MARKERS[form], ms=13, color=COLOURS[form], mec="white", mew=0.8, zorder=3)
    axes.annotate(
        str(number), at, ha="center", va="center_baseline", fontsize=7, color="white", weight="bold", zorder=3.1
    )


def _numbers(networks: Mapping[str, Sequence[Seed]]) -> dict[str, int]:
    """Schedules have names too long for a point."""
    schedules = dict.fromkeys(parted(name)[1] for seeds in networks.values() for name in seeds[0])
    return {schedule: number for number, schedule in enumerate((each for each in schedules if each), 1)}


def _legend(networks: Mapping[str, Sequence[Seed]], numbers: Mapping[str, int]) -> list[Line2D]:
    names = {parted(name)[0] for seeds in networks.values() for name in seeds[0]}
    handles = [Line2D([], [], color=PLAIN, marker="s", ms=5, label="plain, and cut short")]
    handles += [
        Line2D([], [], ls="", color=COLOURS[form], marker=MARKERS[form], ms=8, label=form)
        for form in FORMS
        if form in names
    ]
    if any(len(seeds) > 1 for seeds in networks.values()):
        handles.append(Line2D([], [], color=PLAIN, linewidth=0.7, alpha=0.5, label="one seed of plain"))
        handles.append(Line2D([], [], ls="", color=INK, alpha=0.5, marker="+", ms=12, label="spread over seeds"))
    if any(claim(network) and comparable(seeds) for network, seeds in networks.items()):
        label = "claimed by arXiv 1706.04983"
        handles.append(Line2D([], [], ls="", color=CLAIM, marker="*", ms=13, mec=INK, mew=0.8, label=label))
    handles += [
        Line2D([], [], ls="", marker=f"${number}$", color=INK, ms=6, label=schedule)
        for schedule, number in numbers.items()
    ]
    return handles
