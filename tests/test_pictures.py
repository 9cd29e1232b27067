"""The pictures hold the figures that they are drawn from."""

import pytest
from matplotlib.colors import to_hex
from rows import make_report, make_trial

from fxfreeze import pictures, report


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
    assert bars["predicted, no cache"] == 0.4
    assert bars["predicted, with a cache"] == 0.6
    assert bars["FLOPs counted"] == pytest.approx(1 - 0.4 / 2)  # 0.4 of plain's FLOPs over twice its steps
    assert bars["time measured, fxfreeze"] == pytest.approx(1 - 0.04 / 0.2)
    assert bars["time measured, freezeout"] == pytest.approx(1 - 0.05 / 0.2)
    drawn = pictures.savings([("a", -0.1, "#000000"), ("b", 0.5, "#000000")]).axes[0]
    assert [patch.get_width() for patch in drawn.patches] == [-0.1, 0.5]  # type: ignore[attr-defined]
    assert drawn.get_xlim()[0] < -0.1


def test_running_median_leaves_no_spike() -> None:
    values = [1.0] * 50 + [100.0] + [2.0] * 50
    smooth = pictures.running_median(values)
    assert max(smooth) == 2
    assert smooth[0] == 1
    assert len(smooth) == 101
