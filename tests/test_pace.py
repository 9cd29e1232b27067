"""The pace of the machine, round by round, and times corrected by it."""

import pytest

from fxfreeze.pace import Pace, end_of_round


def test_rounds_end_where_turns_do() -> None:
    assert [end_of_round(3, 20, done) for done in range(4)] == [0, 7, 13, 20]


def test_a_steady_machine_corrects_nothing() -> None:
    pace = Pace(4, 8, [2.0] * 8)
    assert pace.usual == 2.0
    assert pace.by_round == [1.0] * 4
    assert pace.disturbed == 0
    assert pace.corrected(12, [1.0] * 12) == 12


def test_what_was_slow_for_all_counts_at_the_usual_pace() -> None:
    pace = Pace(4, 8, [2.0] * 6 + [8.0] * 2)
    assert pace.by_round == [1, 1, 1, 4]
    assert pace.disturbed == 1
    assert pace.corrected(12, [1.0] * 9 + [4.0] * 3) == pytest.approx(12)


def test_one_slow_step_does_not_make_a_round_slow() -> None:
    pace = Pace(2, 10, [1.0] * 4 + [50.0] + [1.0] * 5)
    assert pace.by_round == [1, 1]
    assert pace.corrected(10, [1.0] * 4 + [50.0] + [1.0] * 5) == 59


def test_a_run_that_was_stopped_lacks_rounds() -> None:
    """What ran beyond them counts at the last pace known."""
    pace = Pace(4, 8, [2.0, 2.0, 2.0, 2.0, 4.0], usual=2.0)
    assert pace.by_round == [1, 1, 2, 2]
    assert pace.corrected(4, [1.0] * 4) == 1 + 1 + 0.5 + 0.5
    assert pace.corrected(4, [1.0]) == 1


def test_the_usual_pace_may_be_that_of_an_earlier_run() -> None:
    assert Pace(2, 2, [3.0, 3.0], usual=2.0).by_round == [1.5, 1.5]
