"""The demo can fail: every judge tells a mesh that is right from one that is not."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from mesh.lab import demo_checks
from mesh.lab.demo_checks import Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mesh.lab.demo_checks import Verdict

CLIENT = "192.168.50.100"

WEB = ("web-1", "web-2", "web-3")


def answers(count: int, replica: str = "web-1", client: str = CLIENT) -> list[Seen]:
    """Connections answered by a replica, one every 10 ms from time 0 on."""
    return [Seen("n1", i / 100, 0.001, replica, client) for i in range(count)]


def failures(count: int, kind: str, seconds: float = 0.001, began: float = 0.0) -> list[Seen]:
    return [Seen("n1", began, seconds, failure=kind) for _ in range(count)]


def each(count: int, *replicas: str) -> list[Seen]:
    return [one for replica in replicas for one in answers(count, replica)]


spread = partial(demo_checks.spread, replicas=WEB)
own_address = partial(demo_checks.own_address, addresses=(CLIENT,))
settled = partial(demo_checks.settled, at=1.0, limit=0.5)
taken_over = partial(demo_checks.taken_over, replicas=("web-1", "web-3"))
back = partial(demo_checks.back, at=1.0, replica="web-1", limit=0.5)

RIGHT = {
    "all replicas answer": (spread, each(20, *WEB)),
    "chance is not exactly fair": (spread, [*answers(40), *each(10, "web-2", "web-3")]),
    "the client's own address": (own_address, answers(60)),
    "refused at once": (demo_checks.refused, failures(20, "refused")),
    "dropped": (demo_checks.unanswered, failures(4, "timeout", 1.0)),
    "refused is closed, too": (demo_checks.unanswered, failures(4, "refused")),
    "nothing failed": (demo_checks.unbroken, answers(200)),
    "nothing failed though something was disturbed": (settled, answers(200)),
    "what was under way failed": (settled, [*answers(200), *failures(3, "reset", 0.1, 0.95)]),
    "what began just after it failed": (settled, [*answers(200), *failures(3, "reset", 2, 1.4)]),
    "the others took over": (taken_over, each(5, "web-1", "web-3")),
    "it came back": (back, [*answers(200, "web-2"), Seen("n1", 1.4, 0.1, "web-1", CLIENT)]),
}

WRONG = {
    "a replica gets nothing": (spread, each(30, "web-1", "web-2")),
    "a replica gets next to nothing": (spread, [*each(29, "web-1", "web-2"), *answers(2, "web-3")]),
    "a connection failed": (spread, [*each(20, *WEB), *failures(1, "timeout")]),
    "a stranger answers": (spread, each(15, *WEB, "db-1")),
    "nobody answers": (spread, failures(60, "refused")),
    "nobody was asked": (spread, []),
    "the node's address instead": (own_address, answers(60, client="10.0.0.3")),
    "the node's address once": (own_address, [*answers(59), *answers(1, client="10.0.0.3")]),
    "no address because of no answer": (own_address, failures(60, "timeout")),
    "no address because nobody asked": (own_address, []),
    "refused once in 20": (demo_checks.refused, [*failures(19, "timeout"), *answers(1)]),
    "answered instead of refused": (demo_checks.refused, answers(20)),
    "refused late": (demo_checks.refused, failures(20, "refused", 1.01)),
    "a time-out instead of a refusal": (demo_checks.refused, failures(20, "timeout", 2.0)),
    "no refusal because nobody asked": (demo_checks.refused, []),
    "open once": (demo_checks.unanswered, [*failures(3, "timeout"), *answers(1)]),
    "closed to nobody": (demo_checks.unanswered, []),
    "one of many failed": (demo_checks.unbroken, [*answers(200), *failures(1, "reset")]),
    "too few to tell": (demo_checks.unbroken, answers(10)),
    "too few to tell after a disturbance": (settled, answers(200)[::10]),
    "fails too long": (settled, [*answers(200), *failures(1, "timeout", 2, 1.6)]),
    "failed before": (settled, [*answers(200), *failures(1, "timeout", 0.1, 0.5)]),
    "fails to the end": (settled, [*answers(120), *failures(1, "timeout", 2, 1.2)]),
    "one did not take over": (taken_over, answers(10)),
    "the dead answered": (taken_over, each(5, *WEB)),
    "nobody took over": (taken_over, []),
    "it never came back": (back, answers(200, "web-2")),
    "it came back late": (back, [Seen("n1", 1.6, 0.1, "web-1", CLIENT)]),
    "it answered only before": (back, [Seen("n1", 0.9, 0.01, "web-1", CLIENT)]),
}


@pytest.mark.parametrize(("judge", "seen"), RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(
    judge: Callable[[Sequence[Seen]], Verdict], seen: Sequence[Seen]
) -> None:
    verdict = judge(seen)

    assert verdict.ok, verdict.detail
    assert "expected" not in verdict.detail


@pytest.mark.parametrize(("judge", "seen"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_fails_and_says_why(
    judge: Callable[[Sequence[Seen]], Verdict], seen: Sequence[Seen]
) -> None:
    verdict = judge(seen)

    assert not verdict.ok
    assert "expected" in verdict.detail
    assert "saw" in verdict.detail
