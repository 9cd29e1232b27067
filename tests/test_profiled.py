"""What is made of measured figures: the prediction by hand, the explanation, the table, the picture, the JSON."""

import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle, StepPatch
from profiles import FLOPS, UNITS, make_profile
from rich.console import Console

from fxfreeze.depth_picture import COLOURS, by_depth
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
    assert f"at depth 1 (frozen up to stem). Most of it: {cause}" in text


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
    assert re.search(r"Most of it: the units that are live here, .* \(-5\.0 s\)\.$", text)


def test_a_cause_that_others_make_up_for() -> None:
    text = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=8.0, backward=8.0)).explanation()
    assert "Most of it: freezing changed the forward" in text
    assert text.endswith("(+7.0 s); other causes add -2.0 s.")


def test_a_cause_of_less_than_half_is_not_most_of_it() -> None:
    """Of three causes that are as large, each is a third."""
    worse = {name: getattr(AS_PREDICTED, name) + 1 for name in ("data", "prefix", "optimizer")}
    text = make_profile(UNFROZEN, replace(AS_PREDICTED, **worse)).explanation()
    assert "Its largest cause: fetching a batch" in text
    assert text.endswith("(+1.0 s); other causes add +2.0 s.")


@pytest.mark.parametrize(
    ("rounds", "said"), [(1, "; one round is too few"), (4, "; 4 rounds are too few"), (5, "Most of it")]
)
def test_few_rounds_tell_no_cause(rounds: int, said: str) -> None:
    text = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=8.0), rounds=rounds).explanation()
    assert "measured, 18.7 s predicted (+38%), at depth 1" in text
    assert said in text
    assert ("Most of it" in text) == (rounds >= 5)


@pytest.mark.parametrize(("scatter", "quiet"), [(8.0, True), (10.0, False)])
def test_a_disturbed_machine_is_told_in_place_of_a_cause(scatter: float, quiet: bool) -> None:
    """Of 21 seconds, quartiles 8 apart are 17 and 25; 10 apart, 16 and 26, which is more than 1.5 times."""
    text = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=30.0), scatter=scatter, rounds=1000).explanation()
    assert ("Most of it" in text) == quiet
    disturbed = (
        "The machine was disturbed: at depth 0 a quarter of the iterations took 26.0 s or more, and a quarter 16.0 s"
    )
    assert (disturbed in text) != quiet


@pytest.mark.parametrize(("scatter", "certain"), [(0.1, True), (4.0, False)])
def test_scatter_is_told_from_a_disagreement(scatter: float, certain: bool) -> None:
    """One second off, of 16 rounds: quartiles 4 seconds apart leave an error of about one."""
    given = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=2.0), scatter=scatter)
    assert ("Most of it" in given.explanation()) == certain
    assert ("is within the noise (± 2.7 s): try more rounds." in given.explanation()) != certain
    assert "Most of it" in replace(given, rounds=100_000).explanation()


def test_depth_0_alone_has_nothing_to_compare() -> None:
    assert "there is nothing to compare" in make_profile(UNFROZEN).explanation()


# ---- how it is shown


def printed(profile: Profile, width: int = 200) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(profile.table())
    return console.export_text().splitlines()


def rows(profile: Profile) -> list[list[str]]:
    return [line.split() for line in printed(profile) if re.match(r" +\d", line)]


def test_the_table_has_the_parts_in_milliseconds() -> None:
    frozen = Parts(0.2, 0.00123, 3.0, 0.04, 0.5)
    first, second = rows(make_profile(UNFROZEN, frozen, scatter=1.0))
    assert first == ["0", "2,000", "6,000", "12,000", "1,000", "21,000", "500.0", "21,000", "0%"]
    assert second[:7] == ["1", "stem", "200.0", "1.23", "3,000", "40.0", "500.0"]
    assert second[-2:] == ["18,667", "-80%"]  # 3.741 seconds of 21 * 160 / 180


def test_a_given_batch_has_no_time_of_fetching() -> None:
    given = make_profile(UNFROZEN, AS_PREDICTED, fetched=False)
    assert [row[1 + (row[0] != "0")] for row in rows(given)] == ["given", "given"]
    assert "batch 4 (given, not fetched), a chip" in given.conditions()


def test_a_table_of_80_columns_keeps_every_figure() -> None:
    """Names are folded, and nothing else: the figures of each row are those of a wide table."""
    given = make_profile(
        *(Parts(999.9e-3, depth and 99.9e-3, 999.9e-3, 999.9e-3, 99.9e-3) for depth in range(3)), scatter=19e-3
    )
    given = replace(given, units=("features.denseblock1.denselayer1", "features.denseblock2", "head"))
    narrow, wide = printed(given, 80), printed(given)
    assert max(map(len, narrow)) <= 80
    assert "…" not in "".join(narrow)
    heads = ["depth", "up", "to", "data", "prefix", "suffix", "backward", "optimizer", "total", "±", "predicted", "off"]
    assert heads in [line.split() for line in narrow]
    figures = [[line.split()[-8:] for line in lines if line.rstrip().endswith("%")] for lines in (narrow, wide)]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 3


@pytest.mark.parametrize(("off", "text"), [(-0.004, "0%"), (0.004, "0%"), (-0.006, "-1%"), (0.25, "+25%")])
def test_nothing_is_off_by_minus_nothing(off: float, text: str) -> None:
    frozen = replace(AS_PREDICTED, backward=AS_PREDICTED.backward + off * AS_PREDICTED.total)
    assert rows(make_profile(UNFROZEN, frozen))[1][-1] == text


def test_the_table_says_what_was_measured_and_explains() -> None:
    given = make_profile(UNFROZEN, replace(AS_PREDICTED, prefix=8.0))
    text = " ".join(" ".join(printed(given, 400)).split())
    assert "batch 4, a chip, 2 threads, mean of the middle half of 16 rounds, ± half the distance of its ends" in text
    assert given.explanation() in text
    assert "a chip, 1 thread, mean" in replace(given, threads=1).conditions()
    assert replace(given, rounds=3).conditions().endswith("mean of 3 rounds")
    assert replace(given, rounds=1).conditions().endswith("2 threads, one round")


def test_printed_it_is_its_table_and_short_in_a_debugger() -> None:
    given = make_profile(UNFROZEN, AS_PREDICTED)
    assert "predicted" in str(given)
    assert [line.split() for line in str(given).splitlines() if re.match(r" +\d", line)] == rows(given)
    assert repr(given) == f"<Profile at depths 0, 1: {given.conditions()}>"


def bars(parts: Sequence[Parts]) -> dict[str, list[tuple[float, float]]]:
    axes = by_depth(make_profile(*parts).iterations, UNITS, "").axes[0]
    found = {}
    for container in axes.containers:
        rectangles = [bar for bar in container if isinstance(bar, Rectangle)]
        found[str(container.get_label())] = [(bar.get_y(), bar.get_height()) for bar in rectangles]
    return found


def test_the_staircase_stacks_the_parts_under_the_prediction() -> None:
    stacked = bars([UNFROZEN, Parts(2.0, 1.0, 3.0, 4.0, 0.5)])
    assert list(stacked) == list(COLOURS)
    assert stacked["data"] == [(0, 2000), (0, 2000)]
    assert stacked["prefix"] == [(2000, 0), (2000, 1000)]
    assert stacked["suffix"] == [(2000, 6000), (3000, 3000)]
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
    figure = by_depth(
        many, names, "batch 4, Some Processor of 3.5 GHz, 16 cores, 16 threads, mean of 20 rounds", "densenet on digits"
    )
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[2] == f"2  ...{names[1][-18:]}"
    title, (conditions,) = axes._left_title, axes.texts  # type: ignore[attr-defined]
    assert title.get_text() == "Milliseconds of an iteration of densenet on digits"
    assert not title.get_window_extent().overlaps(conditions.get_window_extent())
    assert conditions.get_window_extent().x1 <= figure.bbox.x1
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= 0
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    named = [*COLOURS, "middle half of the rounds", "predicted from FLOPs"]
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(named)
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_the_middle_half_of_the_rounds_is_within_the_picture() -> None:
    given = make_profile(UNFROZEN, AS_PREDICTED, scatter=20.0)
    axes = by_depth(given.iterations, UNITS, "").axes[0]
    assert axes.get_ylim()[1] > 1e3 * given.iterations[0].quartiles[1]


@pytest.mark.parametrize("name", ["x.gif", "x.jpg", "png", "x"])
def test_a_picture_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} is no picture that is drawn here: end its name in \.png, \.svg or"):
        make_profile(UNFROZEN, AS_PREDICTED).plot(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_plot_writes_the_picture(tmp_path: Path) -> None:
    make_profile(UNFROZEN, AS_PREDICTED).plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_all_of_it() -> None:
    given = make_profile(UNFROZEN, AS_PREDICTED, scatter=1.0)
    written = json.loads(given.json())
    assert set(written) == {field.name for field in fields(Profile)}
    assert written["iterations"][1]["predicted"] == asdict(AS_PREDICTED)
    assert tuple(written["iterations"][1]["quartiles"]) == given.iterations[1].quartiles
    assert (tuple(written["units"]), tuple(written["unit_flops"])) == (UNITS, tuple(FLOPS))
