"""What the figures say: better, tied or lost, and how far that carries."""

import pytest
from rows import make_cache, make_cached_trial, make_row, make_traffic, make_trial

from fxfreeze.cached import CacheRecord
from fxfreeze.compare import Trial
from fxfreeze.verdict import average, caution, summarise, verdict


def test_verdict_gives_both_costs() -> None:
    assert verdict([make_trial()]).startswith(
        "fxfreeze took 0.80x the time of the same schedule without surgery and 0.40x that of plain training."
    )


@pytest.mark.parametrize(
    ("ours", "short", "words"),
    [
        (
            900,
            940,
            "Freezing lost in this one run: simply training for fewer steps was better, 94.0% test accuracy against 90.0%",
        ),
        (
            940,
            900,
            "Freezing won in this one run: 94.0% test accuracy against 90.0% for simply training for fewer steps",
        ),
        (
            900,
            903,
            "Freezing gained nothing in this one run: simply training for fewer steps tied, 90.3% test accuracy against 90.0%",
        ),
    ],
)
def test_verdict_of_one_seed(ours: int, short: int, words: str) -> None:
    trials = [make_trial(ours=ours, short=short)]
    assert words in verdict(trials)
    assert caution(trials).startswith("One seed: ")
    assert "--seeds 5" in caution(trials)


def test_one_seed_is_judged_by_the_samples_on_which_the_two_differ() -> None:
    """They differ on 40 samples, all for one side: 1.96 sqrt(40) / 1000 = 1.24 points. On 4: 0.39, no more than the gap."""
    assert "gaps up to 1.2 points" in caution([make_trial(ours=900, short=940)])
    assert "won" in verdict([make_trial(ours=904, short=900)])
    assert "tied" in verdict([make_trial(ours=903, short=900)])


def test_seeds_are_judged_by_their_spread() -> None:
    """Gaps of 10, 20 and 60: mean 30, standard deviation 26.5, half width 4.30 * 26.5 / sqrt(3) = 65.7 of 1000 samples."""
    trials = [make_trial(seed, ours=900 + gap, short=900) for seed, gap in enumerate((10, 20, 60))]
    assert "gained nothing here" in verdict(trials)
    assert caution(trials).startswith("3 seeds: mean gaps up to 6.6 points")
    assert "± 2.6%" in verdict(trials)
    alike = [make_trial(seed, ours=900 + gap, short=900) for seed, gap in enumerate((29, 30, 31))]
    assert "won here" in verdict(alike)
    assert "lost here" in verdict(
        [make_trial(seed, ours=900, short=900 + gap) for seed, gap in enumerate((29, 30, 31))]
    )


def test_two_seeds_are_too_few() -> None:
    trials = [make_trial(0, ours=900, short=890), make_trial(1, ours=880, short=890)]
    assert caution(trials).startswith("2 seeds can't tell luck from gain")


def test_seeds_of_equal_gap_are_still_judged_by_the_test_set() -> None:
    """Two seeds with a gap of one sample each: no spread at all, and no evidence either."""
    assert "tied" in verdict([make_trial(seed, ours=901, short=900) for seed in range(2)])


def test_verdict_says_when_freezing_cost_more_than_plain() -> None:
    text = verdict([make_trial(ours=900, short=940, plain=5.0)])
    assert "plain training for as long was better" in text
    assert "fewer steps" not in text
    assert "1.60x that of plain" in text


def test_nothing_is_concluded_from_a_comparison_that_was_stopped() -> None:
    stopped = make_trial(1, finished=False)
    assert "nothing is concluded" in verdict([stopped])
    assert caution([stopped]) == ""
    assert verdict([make_trial(0), stopped]).endswith("of 2 seeds, the 1 that came to it are counted.")
    assert caution([make_trial(0), stopped]) == caution([make_trial(0)])


@pytest.mark.parametrize(
    ("identical", "told"),
    [([0.32], False), ([1.4], False), ([1.2], True), ([0.81, None], True), ([0.5, 2.0], True), ([1.5, 1.3], False)],
)
def test_nothing_is_concluded_on_a_machine_that_was_too_busy(identical: list[float | None], told: bool) -> None:
    """The same code, timed twice, must take about as long."""
    trials = [make_trial(seed) for seed in range(len(identical))]
    for trial, value in zip(trials, identical, strict=True):
        trial.identical = value
    if told:
        assert verdict(trials).startswith("fxfreeze took 0.80")
    else:
        assert verdict(trials).startswith("Nothing is concluded: plain's steps took ")
        assert "fxfreeze" not in verdict(trials)


def test_verdict_of_other_rows() -> None:
    trial = make_trial()
    del trial.rows["plain-short"]
    assert verdict([trial]).count(".") == verdict([trial]).count("0.80") + 1 + 1
    assert "Freezing" not in verdict([trial])
    alone = Trial(0, {"plain": trial.rows["plain"]}, True)
    assert "nothing to conclude" in verdict([alone])


def test_verdict_of_finetuning_names_the_hand_made_rival() -> None:
    trial = make_trial()
    trial.rows["by-hand"] = make_row("by-hand", seconds=4.0)
    assert "2.00x the time of the same backbone frozen by hand and 0.40x that of plain" in verdict([trial])


# ---- with the cache


def test_verdict_of_the_cached_row_gives_all_costs() -> None:
    assert verdict([make_cached_trial()]).startswith(
        "fxfreeze+cache took 0.50x the time of fxfreeze without the cache, 0.40x that of the same schedule without surgery "
        "and 0.20x that of plain training. Freezing gained nothing in this one run: "
    )


def test_a_cache_that_served_nothing_gained_nothing() -> None:
    trial = make_cached_trial()
    trial.rows["fxfreeze+cache"].cache = CacheRecord([], [make_traffic(forward=1000), make_traffic(forward=1000)])
    assert verdict([trial]).startswith("fxfreeze+cache took 0.40x the time of the same schedule without surgery and")
    trial.rows["fxfreeze+cache"].cache = make_cache()
    assert verdict([trial]).startswith("fxfreeze+cache took 0.50x the time of fxfreeze without the cache")


def test_verdict_is_about_the_cached_pair_where_it_ran() -> None:
    """fxfreeze beats its own rival, and fxfreeze+cache, as good, is beaten by that which has half the time."""
    trials = [make_cached_trial(seed, ours=900, short=800, cached_short=940) for seed in range(3)]
    assert "Freezing lost here: simply training for fewer steps was better, 94.0 ± 0.0% test accuracy" in verdict(
        trials
    )
    trials[1].rows.pop("plain-short+cache")  # then the pair that all seeds have is that without it
    assert "Freezing won here: 90.0 ± 0.0% test accuracy against 80.0 ± 0.0%" in verdict(trials)
    assert verdict(trials).startswith("fxfreeze took 0.80 ± 0.00x the time of the same schedule")


def test_caution_is_about_the_pair_of_the_verdict() -> None:
    """They differ on 40 samples: 1.24 points; fxfreeze and its rival on 100: 1.96 points."""
    trial = make_cached_trial(ours=900, short=800, cached_short=940)
    assert "gaps up to 1.2 points" in caution([trial])
    trial.rows.pop("plain-short+cache")
    assert "gaps up to 2.0 points" in caution([trial])


def test_verdict_of_rows_without_freezeout_or_without_fxfreeze() -> None:
    trial = make_cached_trial()
    del trial.rows["freezeout"]
    assert verdict([trial]).startswith(
        "fxfreeze+cache took 0.50x the time of fxfreeze without the cache and 0.20x that of plain training. Freezing "
    )
    del trial.rows["fxfreeze"], trial.rows["plain-short"]
    assert verdict([trial]).startswith("fxfreeze+cache took 0.20x the time of plain training. Freezing ")
    alone = Trial(0, {"fxfreeze+cache": trial.rows["fxfreeze+cache"]}, True)
    assert "nothing to conclude: fxfreeze+cache and plain-short+cache are the pair" in verdict([alone])
    assert caution([alone]) == ""


def test_verdict_of_finetuning_with_the_cache() -> None:
    trial = make_cached_trial()
    trial.rows["by-hand"] = make_row("by-hand", seconds=5.0)
    assert verdict([trial]).startswith(
        "fxfreeze+cache took 0.50x the time of fxfreeze without the cache, 0.80x that of the same backbone frozen by hand "
        "and 0.20x that of plain training."
    )


def test_verdict_says_when_the_cached_row_cost_more_than_plain() -> None:
    assert "plain training for as long tied" in verdict([make_cached_trial(plain=2.0)])


def test_average_and_spread() -> None:
    assert average([1.0]).show(".1f") == "1.0"
    assert average([1.0, 3.0]).show(".2f") == "2.00 ± 1.41"
    assert average([0.9, 0.92]).show(".1%") == "91.0 ± 1.4%"


def test_unfinished_trials_are_left_out_of_the_table_where_others_finished() -> None:
    short = make_trial(1, ours=100, finished=False)
    rows = {summary.name: summary for summary in summarise([make_trial(0), short])}
    assert rows["fxfreeze"].test.mean == 0.9
    assert {summary.name: summary for summary in summarise([short])}["fxfreeze"].test.mean == 0.1
