"""What probes of other nodes come to: who can be reached, and who is left out."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.address import Family
from mesh.reach import echo, judge
from mesh.reach.judge import Pace, Reach, Standing

if TYPE_CHECKING:
    from collections.abc import Iterable

PACE: Final = Pace(interval=0.25, fall=4, rise=3)
UNKNOWN, REACHABLE, UNREACHABLE = Reach


def after(outcomes: Iterable[bool], start: Standing | None = None) -> list[Standing]:
    """The standings at each look, one an interval, of a node whose probes are answered or not;
    each answer is taken in at the look after its probe.
    """
    standing, found = start or judge.fresh(0), []
    begin = max(standing.since, standing.heard or 0.0)
    for number, came in enumerate(outcomes):
        now = begin + (number + 1) * PACE.interval
        standing = judge.probed(standing, PACE, now - PACE.interval)
        if came:
            standing = judge.answered(standing, PACE, now, 0.01)
        standing = judge.looked(standing, PACE, now)
        found.append(standing)
    return found


def reaches(outcomes: Iterable[bool], start: Standing | None = None) -> list[Reach]:
    return [standing.reach for standing in after(outcomes, start)]


WELL: Final = after([True] * 20)[-1]
GONE: Final = after([False] * 8, WELL)[-1]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([False] * 3, [REACHABLE] * 3),
        ([False] * 5, [REACHABLE] * 3 + [UNREACHABLE] * 2),
        ([False] * 3 + [True] + [False] * 3, [REACHABLE] * 7),
        ([False] * 4 + [True] * 4, [REACHABLE] * 3 + [UNREACHABLE] * 3 + [REACHABLE] * 2),
        (
            [False] * 4 + [True, True, False] + [True] * 3,
            [REACHABLE] * 3 + [UNREACHABLE] * 6 + [REACHABLE],
        ),
    ],
)
def test_so_many_in_a_row_change_what_is_held(outcomes: list[bool], expected: list[Reach]) -> None:
    assert reaches(outcomes, WELL) == expected


def test_a_node_that_vanishes_is_lost_in_about_a_second() -> None:
    lost = next(s for s in after([False] * 20, WELL) if s.reach is UNREACHABLE)

    assert WELL.heard is not None
    assert 0.9 <= lost.since - WELL.heard <= 1.3


def test_a_node_that_never_answered_is_unknown_and_known_at_its_first_answer() -> None:
    assert reaches([False] * 400 + [True, False]) == [UNKNOWN] * 400 + [REACHABLE] * 2


def test_the_clock_stands_still_while_the_prober_sleeps() -> None:
    """Else an answer would be overdue that could not be read."""
    assert judge.heeded(0.2, PACE) == pytest.approx(0.2)
    assert judge.heeded(30, PACE) == pytest.approx(0.375)


def test_a_slow_node_is_given_more_time() -> None:
    slow = WELL._replace(trip=0.9, jitter=0.1)

    lost = next(s for s in after([False] * 40, slow) if s.reach is UNREACHABLE)

    assert lost.since - (slow.heard or 0) == pytest.approx(2.25)  # 3 intervals, 1.3 s and a look


def test_each_loss_doubles_what_it_takes_to_come_back() -> None:
    standing, needed = WELL, []

    for _ in range(9):
        standing = after([False] * 8, standing)[-1]
        needed.append(judge.needed(standing, PACE, standing.since))
        standing = after([True] * 400, standing)[-1]._replace(lost=standing.lost)

    assert needed[:3] == [3, 6, 12]
    assert max(needed) <= 3 * 64
    assert judge.needed(standing, PACE, standing.since + 301) == 3


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_no_node_changes_sides_on_fewer_probes_and_never_often(
    runs: list[tuple[bool, int]],
) -> None:
    outcomes = [came for came, count in runs for _ in range(count)]
    found = after(outcomes, WELL)

    for index, (before, now) in enumerate(pairwise([WELL, *found]), 1):
        if now.reach is UNREACHABLE and before.reach is REACHABLE:
            assert not any(outcomes[max(0, index - PACE.fall) : index])
        if now.reach is REACHABLE and before.reach is UNREACHABLE:
            assert outcomes[index - PACE.rise : index] == [True] * PACE.rise
    losses = [
        s.since
        for a, s in pairwise([WELL, *found])
        if (s.reach, a.reach) == (UNREACHABLE, REACHABLE)
    ]
    for first in losses:
        assert sum(first <= each < first + 120 for each in losses) <= 9


# ---- WireGuard's word


@pytest.mark.parametrize(
    ("standing", "later", "age", "expected"),
    [
        (GONE, 30, None, UNREACHABLE),
        (GONE, 30, 100, UNREACHABLE),  # from before it was lost
        (GONE, 30, 10, UNKNOWN),  # the tunnel is well: somebody keeps echoes away
        (GONE, 30, 1, UNREACHABLE),  # an echo may be on its way
        (judge.fresh(0), 10, None, UNKNOWN),
        (judge.fresh(0), 21, None, UNREACHABLE),
        (judge.fresh(0), 21, 150, UNKNOWN),
        (judge.fresh(0), 21, 300, UNREACHABLE),
        (WELL, 500, None, REACHABLE),
    ],
)
def test_handshakes_acquit_and_lacking_sessions_convict(
    standing: Standing, later: float, age: float | None, expected: Reach
) -> None:
    assert judge.shaken(standing, standing.since + later, age).reach is expected


def test_an_unsteady_link_is_not_acquitted_by_its_handshakes() -> None:
    now = GONE.since + 30
    answered = judge.answered(GONE, PACE, now - 8, 0.01)

    assert judge.shaken(answered, now, 9).reach is UNREACHABLE
    assert judge.shaken(answered, now, 7).reach is UNKNOWN


# ---- who is left out


def at(reach: Reach, heard: float | None) -> Standing:
    return Standing(reach, 0.0, heard)


OUT: Final = at(UNREACHABLE, 8.0)
SILENT: Final = at(REACHABLE, 9.1)
FINE: Final = at(REACHABLE, 9.9)
MUTE: Final = at(UNKNOWN, None)


@pytest.mark.parametrize(
    ("standings", "live", "before", "expected"),
    [
        ({"b": OUT, "c": FINE}, "bc", "", "b"),
        ({"b": OUT, "c": FINE, "d": OUT}, "bcd", "", "bd"),
        ({"b": OUT, "c": OUT}, "bc", "", ""),  # this node is cut off
        ({"b": OUT, "c": SILENT}, "bc", "", ""),  # c goes the same way
        ({"b": OUT, "c": OUT}, "bc", "b", "b"),  # pools stay as they are
        ({"b": OUT, "c": MUTE}, "bc", "", "b"),  # c could not tell anyway
        ({"b": OUT}, "b", "", "b"),
        ({"b": OUT, "c": OUT}, "b", "", "b"),  # nobody expects anything of c
        ({"b": FINE, "c": FINE}, "bc", "b", ""),
        ({"c": FINE}, "bc", "b", ""),  # b is no peer any more
    ],
)
def test_nodes_are_left_out_on_the_word_of_a_witness(
    standings: dict[str, Standing], live: str, before: str, expected: str
) -> None:
    found = judge.left_out(frozenset(before), standings, frozenset(live), PACE, 10.0)

    assert found == frozenset(expected)


@given(
    st.dictionaries(st.sampled_from("bcdef"), st.sampled_from([OUT, SILENT, FINE, MUTE])),
    st.frozensets(st.sampled_from("bcdef")),
    st.frozensets(st.sampled_from("bcdef")),
)
def test_only_the_unreachable_are_left_out_and_never_all_of_several_at_once(
    standings: dict[str, Standing], live: frozenset[str], before: frozenset[str]
) -> None:
    found = judge.left_out(before, standings, live, PACE, 10.0)

    lost = {name for name, each in standings.items() if each.reach is UNREACHABLE}
    assert found <= lost
    assert found >= before & lost
    if len(lost & live) > 1 and lost == standings.keys():
        assert not (found - before) & live


# ---- families


def test_families_take_turns_and_one_that_stays_silent_is_rarely_tried() -> None:
    both = [judge.way((0, 0), turn) for turn in range(160)]
    one = [judge.way((0, 8), turn) for turn in range(160)]
    none = [judge.way((9, 9), turn) for turn in range(4)]

    assert 60 <= both.count(0) <= 100
    assert one.count(1) == 10
    assert none == [0, 1, 0, 1]


@pytest.mark.parametrize("family", Family)
def test_an_echo_says_whom_it_is_from_and_when_it_was_sent(family: Family) -> None:
    secret, header = b"12345678", b"\x45" + bytes(19) if family is Family.V4 else b""
    sent = echo.request(family, secret, 4094, 10**18)
    back = header + bytes([echo.REPLY[family]]) + sent[1:]

    assert len(sent) == 24
    assert echo.reply(family, back, secret) == (4094, 10**18)
    assert echo.reply(family, back, b"87654321") is None
    assert echo.reply(family, header + sent, secret) is None
    assert echo.reply(family, back[:-1], secret) is None
    assert echo.reply(family, b"", secret) is None
