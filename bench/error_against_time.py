"""The picture: test error against time saved, a panel a network; plain's frontier, the candidates, the paper's claim."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from bench.candidates import FORMS, parted
from bench.end_to_end_report import claim
from bench.time_to_accuracy import Seed, Standing, standings
from fxfreeze.pictures import COLOURS, GRID, INK, MARKERS, styled

CLAIM = "#D4A017"
PLAIN = COLOURS["plain"]


def picture(networks: Mapping[str, Sequence[Seed]]) -> Figure:
    columns = min(2, len(networks))
    rows = -(-len(networks) // columns)
    figure, panels = styled(4.2 * rows + 0.6, rows=rows, columns=columns, ratios=(1,) * max(rows, columns))
    for axes, (network, seeds) in zip(panels, networks.items(), strict=False):
        _panel(axes, network, seeds)
    for spare in panels[len(networks) :]:
        spare.set_visible(False)
    figure.legend(handles=_legend(networks), loc="outside lower center", frameon=False, ncols=3, fontsize=9)
    return figure


def _panel(axes: Axes, network: str, seeds: Sequence[Seed]) -> None:
    found = standings(seeds)
    plains = sorted((each for each in found if not parted(each.name)[1]), key=lambda each: each.share.mean)
    axes.axvline(0, color=GRID, linewidth=1.2)
    axes.plot([_saved(each) for each in plains], [_error(each) for each in plains], color=PLAIN, marker="s", ms=5)
    for seed in seeds:
        for each in plains:
            saved = 1 - seed[each.name].seconds / seed["plain"].seconds
            axes.plot(saved, 1 - seed[each.name].test, ls="", marker="s", color=PLAIN, ms=3, alpha=0.3)
    for each in found:
        form, schedule = parted(each.name)
        if schedule:
            _point(axes, each, form)
    _name_schedules(axes, found)
    if (said := claim(network)) is not None:
        plain = next(each for each in found if each.name == "plain")
        axes.plot(
            said.saved, said.error * _error(plain), ls="", marker="*", ms=15, color=CLAIM, mec=INK, mew=0.7, zorder=5
        )
    axes.set_title(f"{network}  ({len(seeds)} seed{'s' * (len(seeds) > 1)})", loc="left")
    axes.set_xlabel("time saved, of plain training's")
    axes.set_ylabel("test error", color=INK)
    axes.margins(0.08)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _point(axes: Axes, each: Standing, form: str) -> None:
    axes.errorbar(
        _saved(each),
        _error(each),
        xerr=each.share.spread,
        yerr=each.test.spread,
        color=COLOURS[form],
        marker=MARKERS[form],
        ms=7,
        elinewidth=0.9,
        alpha=0.9,
    )


def _name_schedules(axes: Axes, found: Sequence[Standing]) -> None:
    """At the point of each schedule that saves most, since its forms train alike and stand in a row."""
    furthest: dict[str, Standing] = {}
    for each in found:
        schedule = parted(each.name)[1]
        if schedule and (schedule not in furthest or each.share.mean < furthest[schedule].share.mean):
            furthest[schedule] = each
    for schedule, each in furthest.items():
        axes.annotate(
            schedule, (_saved(each), _error(each)), xytext=(6, 5), textcoords="offset points", fontsize=8, color=INK
        )


def _legend(networks: Mapping[str, Sequence[Seed]]) -> list[Line2D]:
    names = {parted(name)[0] for seeds in networks.values() for name in seeds[0]}
    handles = [Line2D([], [], color=PLAIN, marker="s", ms=5, label="plain training, and cut short")]
    handles += [
        Line2D([], [], ls="", color=COLOURS[form], marker=MARKERS[form], ms=7, label=form)
        for form in FORMS
        if form in names
    ]
    if any(claim(network) for network in networks):
        star = Line2D([], [], ls="", color=CLAIM, marker="*", ms=13, mec=INK, mew=0.7)
        star.set_label("claimed by arXiv 1706.04983 (at most)")
        handles.append(star)
    return handles


def _saved(each: Standing) -> float:
    return 1 - each.share.mean


def _error(each: Standing) -> float:
    return 1 - each.test.mean
