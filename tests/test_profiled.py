"""What is made of measured figures: the prediction by hand, the explanation, the table, the picture, the JSON."""

import io
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle, StepPatch
from profiles import FLOPS, UNITS, make_profile
from rich.console import Console

from fxfreeze.depth_picture import PARTS, by_depth
from fxfreeze.disagreement import _causes
from fxfreeze.iterations import Parts, flops_of, midmean, predict
from fxfreeze.profiled import Profile

# Of FLOPS 10 + 20 + 30: forward 60 and backward 120 at depth 0, so 6 seconds of forward and 12 of backward are as predicted.
UNFROZEN = Parts(data=2.0, prefix=0.0, suffix=6.0, backward=12.0, optimizer=1.0)
AS_PREDICTED = predict(UNFROZEN, FLOPS, 1)


# ---- the prediction


def test_flops_of_an_iteration_by_hand() -> None:
    assert [flops_of(FLOPS, depth) for depth in (0, 1, 2)] == [60 + 2 * 60, 60 + 2 * 50, 60 + 2 * 30]


def test_the_prediction_by_hand() -> None:
    share = 160 / 180  # of the FLOPs, once the first unit has no backward
    expected = Parts(data=2 * share, prefix=1.0, suffix=5.0, backward=10.0, optimizer=share)
    assert predict(UNFROZEN, FLOPS, 1).__dict__ == pytest.approx(expected.__dict__)


@pytest.mark.parametrize("backward", [4.0, 12.0, 30.0])
def test_the_prediction_is_depth_0s_time_by_its_share_of_the_flops(backward: float) -> None:
    """Whatever the backward takes there."""
    measured = replace(UNFROZEN, backward=backward)
    for depth in range(3):
        expected = measured.total * flops_of(FLOPS, depth) / flops_of(FLOPS, 0)
        assert predict(measured, FLOPS, depth).total == pytest.approx(expected)


def test_midmean_is_of_the_middle_half_and_adds_up() -> None:
    taken = [Parts(0, total / 4, total / 4, total / 2, 0) for total in (4, 1000, 0, 8)]
    middle = midmean(taken)
    assert middle == Parts(0, 1.5, 1.5, 3, 0)  # of 4 and 8
    assert middle.total == 6
    assert midmean(taken[:1]) == taken[0]
    assert midmean(taken[:3]).total == pytest.approx(1004 / 3)  # of three, a quarter is none


# ---- the explanation


@pytest.mark.parametrize(
    ("unfrozen", "frozen", "cause"),
    [
        (UNFROZEN, replace(AS_PREDICTED, data=9.0), "fetching a batch takes 9.0 s, of which no FLOPs are counted"),
        (UNFROZEN, replace(AS_PREDICTED, optimizer=9.0), "the optimizer's step takes 9.0 s, of which no FLOPs"),
        (  # forward and backward take as long: each unit's share of both is that of its FLOPs
            Parts(0, 0, 9, 9, 0),
            Parts(0, 1.5, 7.5, 7.5, 0),
            "at depth 0 the backward takes 1.00x the forward, and the prediction counts 2x, so that leaving it out for the "
            "frozen units saves less",
        ),
        (  # no difference between frozen and live in the first unit, but it takes half of the forward
            UNFROZEN,
            Parts(AS_PREDICTED.data, 3.0, 3.0, 12.0, AS_PREDICTED.optimizer),
            "at depth 0 the forward of the units that are frozen here ran at 0.0 GFLOP/s",
        ),
        (  # the first unit took 1 second while it lived, and takes 8 now
            UNFROZEN,
            replace(AS_PREDICTED, prefix=8.0),
            "freezing changed the forward of the frozen units from 1.0 s to 8.0 s (backend library, no tape)",
        ),
        (
            UNFROZEN,
            replace(AS_PREDICTED, backward=20.0),
            "the units that are live here, forward and backward, run at 0.0 GFLOP/s",
        ),
    ],
)
def test_the_largest_cause_is_named_with_its_figures(unfrozen: Parts, frozen: Parts, cause: str) -> None:
    text = make_profile(unfrozen, frozen).explanation()
    assert text.startswith("The largest disagreement: ")
    assert "at depth 1 (frozen up to stem). Its largest cause, +" in text
    assert cause in text


def test_rates_and_shares_of_a_cause_by_hand() -> None:
    """Figures of a cause are those of its part, in the units that they are said to be in."""
    billion = [each * 10**9 for each in FLOPS]
    slow = Parts(AS_PREDICTED.data, 3.0, 3.0, 12.0, AS_PREDICTED.optimizer)
    unfrozen, deep = make_profile(UNFROZEN, slow).iterations
    causes = [*_causes(unfrozen, deep, billion)]
    assert [cause.seconds for cause in causes] == pytest.approx([0, 0, 0, 2.0, 0, 0])
    assert "ran at 3.3 GFLOP/s, that of the whole network at 10.0 GFLOP/s" in causes[3].evidence  # 10 in 3 s, 60 in 6 s
    assert "run at 10.0 GFLOP/s, the whole network at depth 0 at 10.0 GFLOP/s" in causes[5].evidence


def test_a_unit_whose_time_is_lost_in_noise_has_no_rate() -> None:
    unfrozen, deep = make_profile(UNFROZEN, replace(AS_PREDICTED, suffix=6.5)).iterations
    assert any("a rate too high to measure" in cause.evidence for cause in _causes(unfrozen, deep, FLOPS))


@pytest.mark.parametrize("seed", range(20))
def test_the_causes_add_up_to_the_disagreement(seed: int) -> None:
    draw = random.Random(seed)
    parts = [Parts(*(draw.uniform(0.1, 9) for _ in range(5))) for _ in range(3)]
    unfrozen, *deeper = make_profile(replace(parts[0], prefix=0.0), *parts[1:]).iterations
    for deep in deeper:
        off = deep.measured.total - deep.predicted.total
        assert sum(cause.seconds for cause in _causes(unfrozen, deep, FLOPS)) == pytest.approx(off)


def test_the_largest_disagreement_of_all_depths_either_way() -> None:
    faster = replace(predict(UNFROZEN, FLOPS, 2), backward=1.0)
    text = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=2.0), faster).explanation()
    assert "9.0 s measured, 14.0 s predicted (-36%), at depth 2 (frozen up to block)" in text
    assert "Its largest cause, -5.0 s of -5.0 s: the units that are live here" in text


def test_a_cause_that_others_make_up_for() -> None:
    text = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=8.0, backward=8.0)).explanation()
    assert "Its largest cause, +7.0 s, which others bring to +5.0 s: freezing changed the forward" in text


@pytest.mark.parametrize(("scatter", "certain"), [(0.1, True), (4.0, False)])
def test_scatter_is_told_from_a_disagreement(scatter: float, certain: bool) -> None:
    """One second off, of 16 rounds: quartiles 4 seconds apart leave an error of about one."""
    given = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=2.0), scatter=scatter)
    assert ("Its largest cause" in given.explanation()) == certain
    assert ("no more than the scatter of the rounds may make" in given.explanation()) != certain
    assert "Its largest cause" in replace(given, rounds=100_000).explanation()


def test_depth_0_alone_has_nothing_to_compare() -> None:
    assert "there is nothing to compare" in make_profile(UNFROZEN).explanation()


# ---- how it is shown


def printed(profile: Profile) -> list[list[str]]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(profile.table())
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


@pytest.mark.parametrize(("fetched", "data"), [(True, "2,000.0"), (False, "given")])
def test_the_table_has_the_parts_in_milliseconds(fetched: bool, data: str) -> None:
    frozen = Parts(2.0, 0.00123, 3.0, 4.0, 0.5)
    rows = printed(make_profile(UNFROZEN, frozen, scatter=1.0, fetched=fetched))
    assert rows[0] == [
        "0",
        "",
        data,
        "",
        "6,000.0",
        "12,000.0",
        "1,000.0",
        "21,000.0",
        "20,500.0-21,500.0",
        "21,000.0",
        "+0%",
    ]
    assert rows[1][:4] == ["1", "stem", data, "1.23"]
    assert rows[1][-2:] == ["18,666.7", "-49%"]  # 9.501 seconds of 21 * 160 / 180


def test_the_table_says_what_was_measured_and_explains() -> None:
    console = Console(width=400, record=True, file=io.StringIO())
    given = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=8.0))
    console.print(given.table())
    text = " ".join(console.export_text().split())
    assert "batch 4, a chip, 2 threads, mean of the middle half of 16 rounds" in text
    assert given.explanation() in text
    assert "a chip, 1 thread, mean" in replace(given, threads=1).conditions()


def bars(parts: Sequence[Parts]) -> dict[str, list[tuple[float, float]]]:
    axes = by_depth(make_profile(*parts).iterations, UNITS, "").axes[0]
    found = {}
    for container in axes.containers:
        rectangles = [bar for bar in container if isinstance(bar, Rectangle)]
        found[str(container.get_label())] = [(bar.get_y(), bar.get_height()) for bar in rectangles]
    return found


def test_the_staircase_stacks_the_parts_under_the_prediction() -> None:
    stacked = bars([UNFROZEN, Parts(2.0, 1.0, 3.0, 4.0, 0.5)])
    assert list(stacked) == [label for label, _ in PARTS.values()]
    assert stacked["data"] == [(0, 2000), (0, 2000)]
    assert stacked["frozen prefix"] == [(2000, 0), (2000, 1000)]
    assert stacked["live forward"] == [(2000, 6000), (3000, 3000)]
    assert stacked["optimizer"] == [(20000, 1000), (10000, 500)]
    axes = by_depth(make_profile(UNFROZEN, AS_PREDICTED).iterations, UNITS, "").axes[0]
    (line,) = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    assert list(line.get_data().values) == pytest.approx([21000, 21000 * 160 / 180])


def test_what_took_no_time_at_any_depth_is_not_in_the_legend() -> None:
    assert "data" not in bars([replace(UNFROZEN, data=0.0)])


def test_long_names_are_cut_and_nothing_overlaps() -> None:
    names = [f"features.denseblock{i}.denselayer{i}.conv1" for i in range(13)]
    iterations = make_profile(UNFROZEN, AS_PREDICTED).iterations
    many = [iterations[0], *(replace(iterations[1], depth=depth) for depth in range(1, 12))]
    figure = by_depth(many, names, "batch 4, Some Processor of 3.5 GHz, 16 cores, 16 threads, mean of 20 rounds")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[2] == f"2  ...{names[1][-18:]}"
    titles = axes._left_title, axes._right_title  # type: ignore[attr-defined]
    assert not titles[0].get_window_extent().overlaps(titles[1].get_window_extent())
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_plot_writes_the_picture(tmp_path: Path) -> None:
    make_profile(UNFROZEN, AS_PREDICTED).plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_json_and_back() -> None:
    given = make_profile(UNFROZEN, AS_PREDICTED, scatter=1.0)
    assert Profile.from_json(given.json()) == given
    assert given.json() == Profile.from_json(given.json()).json()
