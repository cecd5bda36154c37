"""What probes come to: verdicts, and when to look again."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.health import judge
from mesh.health.judge import Pace, Standing, Verdict
from mesh.model.health import HealthCheck

if TYPE_CHECKING:
    from collections.abc import Iterable

PACE: Final = Pace(interval=5, timeout=2, rise=2, fall=3, start_period=0)
HEALTHY: Final = judge.adopted(Verdict.HEALTHY, 0, settled=True)


def judged(
    before: Standing, outcomes: Iterable[bool], pace: Pace = PACE, seconds: float = 1
) -> list[Verdict]:
    """The verdicts after each of some probes, one every so many seconds."""
    found = []
    for number, passed in enumerate(outcomes):
        before = judge.judge(before, pace, number * seconds, passed=passed)
        found.append(before.verdict)
    return found


def test_a_task_is_healthy_after_so_many_passes_in_a_row() -> None:
    assert judged(judge.fresh(0), [True, False, True, True, False])[1:] == [
        *[Verdict.STARTING] * 2,
        *[Verdict.HEALTHY] * 2,
    ]


def test_a_task_is_unhealthy_after_so_many_failures_in_a_row() -> None:
    found = judged(HEALTHY, [False, False, True, False, False, False, True, True])

    assert found == [Verdict.HEALTHY] * 5 + [Verdict.UNHEALTHY] * 2 + [Verdict.HEALTHY]


def test_failures_do_not_count_in_the_start_period() -> None:
    pace = PACE._replace(start_period=10)

    found = judged(judge.fresh(0), [False] * 14, pace)

    assert found.index(Verdict.UNHEALTHY) == 12


def test_a_task_that_passes_in_its_start_period_is_healthy_at_once() -> None:
    pace = PACE._replace(start_period=10)

    assert judged(judge.fresh(0), [False, True, True], pace)[-1] is Verdict.HEALTHY


@given(
    st.sampled_from(Verdict),
    st.lists(st.booleans(), max_size=60),
    st.builds(
        Pace,
        interval=st.just(5.0),
        timeout=st.just(2.0),
        rise=st.integers(1, 5),
        fall=st.integers(1, 5),
        start_period=st.sampled_from((0.0, 7.0)),
    ),
    st.booleans(),
)
def test_no_verdict_changes_on_fewer_probes_in_a_row(
    first: Verdict, outcomes: list[bool], pace: Pace, settled: bool
) -> None:
    verdicts = [first, *judged(judge.adopted(first, 0, settled=settled), outcomes, pace)]

    for index, (before, after) in enumerate(pairwise(verdicts), 1):
        assert before is after or after is not Verdict.STARTING
        needed = {Verdict.HEALTHY: pace.rise, Verdict.UNHEALTHY: pace.fall}.get(after, 0)
        last = outcomes[max(0, index - needed) : index]
        passed = after is Verdict.HEALTHY
        if before is not after:
            assert last == [passed] * needed
        elif needed and before is not Verdict.STARTING:
            against = pace.fall if passed else pace.rise
            assert outcomes[max(0, index - against) : index] != [not passed] * against


def test_a_fresh_task_is_looked_at_often_and_less_so_the_longer_it_takes() -> None:
    standing = judge.fresh(0)

    pauses = [judge.pause(standing, PACE, now, 0.5) for now in (0, 0.1, 2, 20, 1000)]

    assert pauses == pytest.approx([0.1, 0.1, 0.2, 2, 5])


def test_passes_are_gathered_quickly_however_long_a_task_took_to_start() -> None:
    failed = judge.judge(judge.fresh(0), PACE, 100, passed=False)
    passed = judge.judge(failed, PACE, 110, passed=True)

    assert judge.pause(failed, PACE, 100, 0) == 5
    assert judge.pause(passed, PACE, 110, 0) == pytest.approx(0.1)


def test_what_was_healthy_is_looked_at_once_an_interval_spread_by_the_dice() -> None:
    fallen = HEALTHY
    for now in range(3):
        fallen = judge.judge(fallen, PACE, now, passed=False)

    assert fallen.verdict is Verdict.UNHEALTHY
    for standing in (HEALTHY, fallen):
        assert judge.pause(standing, PACE, 7, 0) == pytest.approx(4.75)
        assert judge.pause(standing, PACE, 7, 1) == pytest.approx(5.25)


def test_what_an_earlier_agent_left_long_ago_is_looked_at_quickly_until_it_passes() -> None:
    left = judge.adopted(Verdict.HEALTHY, 0, settled=False)
    confirmed = judge.judge(left, PACE, 0, passed=True)

    assert judge.pause(left, PACE, 0, 0.5) == pytest.approx(0.1)
    assert judge.pause(confirmed, PACE, 0, 0.5) == pytest.approx(5)


def test_an_interval_shorter_than_the_quickest_pace_is_kept_to() -> None:
    pace = Pace.of(HealthCheck(interval="100ms", start_period="1m"))

    assert pace == Pace(0.1, 2, 2, 3, 60)
    assert judge.pause(judge.fresh(0), pace, 50, 0.5) == pytest.approx(0.1)
