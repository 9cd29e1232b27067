"""The pictures hold the figures that they are drawn from."""

import itertools

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from rows import make_cache, make_cached_trial, make_report, make_row, make_traffic, make_trial

from fxfreeze import pictures, report
from fxfreeze.recipes import FINETUNE, FROM_SCRATCH, INT8, SHORTS


def test_accuracy_picture_ends_where_rows_end() -> None:
    trial = make_trial()
    trial.rows["plain-short"].raw_seconds *= 1.25  # ran at 0.8 of the speed of the others
    for evaluation in trial.rows["plain-short"].record.evaluations:
        evaluation.seconds *= 1.25
    curves, ends = pictures.accuracy_against_time([trial]).axes
    lines = {line.get_label(): line for line in curves.lines}
    assert lines["fxfreeze"].get_xdata()[-1] == lines["plain-short"].get_xdata()[-1] == 8
    assert lines["plain"].get_xdata()[-1] == 20
    points = {to_hex(line.get_color()): (line.get_xdata()[0], line.get_ydata()[0]) for line in ends.lines}
    assert points[pictures.COLOURS["plain"].lower()] == (20, 0.95)
    assert ends.get_xlim()[1] > 20


def test_staircase_shows_each_step_of_each_row() -> None:
    rows = [row for name, row in make_trial().rows.items() if name != "plain-short"]
    times, depths = pictures.staircase(rows).axes
    assert {line.get_label(): len(line.get_ydata()) for line in times.lines} == {
        "plain": 100,
        "freezeout": 200,
        "fxfreeze": 200,
    }
    assert times.lines[2].get_ydata()[5] == pytest.approx(40)
    assert [line.get_label() for line in depths.lines] == ["freezeout", "fxfreeze"]
    assert list(depths.lines[0].get_ydata()) == rows[1].record.depths


def test_learning_rates_have_a_line_for_each_unit() -> None:
    row = make_trial().rows["fxfreeze"]
    axes = pictures.learning_rates(row).axes[0]
    assert len(axes.lines) == 3
    assert list(axes.lines[0].get_ydata()) == [rates[0] for _, rates in row.rates]


def test_savings_compare_the_prediction_with_the_measurement() -> None:
    bars = {label: value for label, value, _ in report.savings(make_report([make_trial()]))}
    assert bars["FLOPs predicted, no cache"] == 0.4
    assert bars["FLOPs predicted, with a cache"] == 0.6
    assert bars["FLOPs counted, no cache"] == pytest.approx(1 - 0.4 / 2)  # 0.4 of plain's FLOPs over twice its steps
    assert bars["time measured, fxfreeze"] == pytest.approx(1 - 0.04 / 0.2)
    assert bars["time measured, freezeout"] == pytest.approx(1 - 0.05 / 0.2)
    drawn = pictures.savings([("a", -0.1, "#000000"), ("b", 0.5, "#000000")]).axes[0]
    assert [patch.get_width() for patch in drawn.patches] == [-0.1, 0.5]  # type: ignore[attr-defined]
    assert drawn.get_xlim()[0] < -0.1


def heights(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Of each kind of bar, in order: its bottom and its height."""
    found: dict[str, list[tuple[float, float]]] = {}
    for container in axes.containers:
        bars = [bar for bar in container if isinstance(bar, Rectangle)]
        found[str(container.get_label())] = [(bar.get_y(), bar.get_height()) for bar in bars]
    return found


def test_origins_stack_the_samples_of_each_epoch() -> None:
    axes = pictures.origins(make_cache().epochs).axes[0]
    assert heights(axes) == {
        "computed": [(0, 1000), (0, 100), (0, 0), (0, 0)],
        "from disk": [(1000, 0), (100, 900), (0, 0), (0, 0)],
        "from RAM": [(1000, 0), (1000, 0), (0, 1000), (0, 1000)],
    }
    assert [(text.get_text(), text.xy) for text in axes.texts] == [  # type: ignore[attr-defined]
        ("1.8*", (2, 1000)),
        ("8.0", (3, 1000)),
        ("8.0", (4, 1000)),
    ]


def test_origins_of_one_computed_epoch() -> None:
    axes = pictures.origins([make_traffic(forward=7)]).axes[0]
    assert heights(axes) == {"computed": [(0, 7)]}
    assert not axes.texts
    assert axes.get_title("left") == "Samples by origin"


def test_figures_of_reading_keep_to_a_unit_and_apart() -> None:
    axes = pictures.origins([make_traffic(disk=1, seconds=0.02)] * 3).axes[0]
    assert axes.get_title("left") == "Samples by origin; MB/s of reading"
    assert [text.get_text() for text in axes.texts] == ["50.0"] * 3
    axes = pictures.origins([make_traffic(disk=1, seconds=0.02 / speed) for speed in (1.0, 0.004, 1e-6)]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["50.0", "0.2", "<0.01"]
    axes = pictures.origins([make_traffic(disk=1, seconds=20.0)]).axes[0]
    assert axes.get_title("left") == "Samples by origin; kB/s of reading"
    assert [text.get_text() for text in axes.texts] == ["50.0"]
    figure = pictures.origins([make_traffic(disk=1000, seconds=0.08, cold=True)] * 90)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_title("left") == "Samples by origin; GB/s of reading"
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 10
    assert not any(left.overlaps(right) for left, right in itertools.pairwise(boxes))


def test_no_legend_covers_its_title() -> None:
    every = [make_traffic(forward=10, disk=10, ram=10, device=10, seconds=0.1)]
    rows = [row for name, row in make_cached_trial().rows.items() if name not in SHORTS]
    rows.append(make_row("by-hand", seconds=5.0))  # as many as --finetune has
    for figure in (pictures.origins(every), pictures.staircase(rows)):
        figure.draw_without_rendering()
        axes = figure.axes[0]
        legend = axes.get_legend()
        assert legend is not None
        assert not legend.get_window_extent().overlaps(axes._left_title.get_window_extent())  # type: ignore[attr-defined]
        assert legend.get_window_extent().x0 > 0


def test_the_legend_of_all_rows_covers_no_curve() -> None:
    trial = make_cached_trial()
    trial.rows["by-hand"] = make_row("by-hand", seconds=5.0)
    figure = pictures.accuracy_against_time([trial, make_cached_trial(1)])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(trial.rows)
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert legend.get_window_extent().x0 >= 0
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_each_row_has_a_colour_and_a_marker_of_its_own() -> None:
    names = {*FROM_SCRATCH, *FINETUNE, INT8}
    assert set(pictures.COLOURS) == set(pictures.MARKERS) == names
    assert len(set(pictures.MARKERS.values())) == len(names)
    for one, other in itertools.combinations(pictures.COLOURS.values(), 2):
        assert sum((a - b) ** 2 for a, b in zip(to_rgb(one), to_rgb(other), strict=True)) > 0.3**2


def test_staircase_and_savings_show_the_cached_row() -> None:
    trial = make_cached_trial()
    _, depths = pictures.staircase([row for name, row in trial.rows.items() if name not in SHORTS]).axes
    assert [line.get_label() for line in depths.lines] == ["freezeout", "fxfreeze", "fxfreeze+cache"]
    assert len({line.get_linestyle() for line in depths.lines}) == 3
    bars = {label: value for label, value, _ in report.savings(make_report([trial]))}
    assert list(bars) == [
        "FLOPs predicted, no cache",
        "FLOPs counted, no cache",
        "time measured, freezeout",
        "time measured, fxfreeze",
        "FLOPs predicted, with a cache",
        "FLOPs counted, with a cache",
        "time measured, fxfreeze+cache",
    ]
    assert bars["time measured, fxfreeze+cache"] == pytest.approx(1 - 0.02 / 0.2)
    assert bars["FLOPs counted, with a cache"] == pytest.approx(
        1 - 0.2 / 2
    )  # 0.2 of plain's FLOPs over twice its steps


def test_figures_beside_the_bars_of_a_loss_stay_in_the_picture() -> None:
    figure = pictures.savings([("a", -0.5, "#000000"), ("b", 0.9, "#000000")])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for text in axes.texts:
        box, around = text.get_window_extent(), axes.get_window_extent()
        assert around.x0 <= box.x0 < box.x1 <= around.x1


def test_running_median_leaves_no_spike() -> None:
    values = [1.0] * 50 + [100.0] + [2.0] * 50
    smooth = pictures.running_median(values)
    assert max(smooth) == 2
    assert smooth[0] == 1
    assert len(smooth) == 101
