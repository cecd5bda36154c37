"""The prober with a server that may be told how to be, and what it tells of it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from mesh.health import probe
from mesh.health.judge import Pace, Verdict
from mesh.health.prober import Prober
from mesh.health.target import Exec, Http, Tcp
from mesh.model.health import statuses
from tests.support.tasks import saying, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mesh.health.target import Target

pytestmark = pytest.mark.netns

PACE: Final = Pace(interval=0.1, timeout=5, rise=2, fall=3, start_period=0)
HEALTHY, UNHEALTHY = Verdict.HEALTHY, Verdict.UNHEALTHY
LIMIT: Final = 30.0

Told = list[tuple[object, Verdict, str]]


class Replica:
    """Answers with a status that may be changed; counts how often."""

    def __init__(self) -> None:
        self.status = 200
        self.asked = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        answer = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % self.status
        await saying(answer)(reader, writer)

    def target(self, path: str = "/") -> Http:
        passing = statuses("200")
        return Http("127.0.0.1", self.port, path, "a", passing, tls=False, verify=True)


@asynccontextmanager
async def replica() -> AsyncIterator[Replica]:
    made = Replica()
    async with served(made.serve) as made.port:
        yield made


@asynccontextmanager
async def prober() -> AsyncIterator[tuple[Prober, Told]]:
    told: Told = []
    made = Prober(lambda *each: told.append(each), lambda: 0.5)
    try:
        yield made, told
    finally:
        await made.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def more(one: Replica, probes: int = 8) -> None:
    """Wait until it was probed that many times more."""
    goal = one.asked + probes
    await until(lambda: one.asked >= goal)


async def test_verdicts_are_told_when_they_change_and_only_then() -> None:
    async with replica() as web, prober() as (probing, told):
        probing.watch("web", web.target(), PACE)
        await more(web)
        web.status = 500
        await more(web)
        web.status = 200
        await more(web)

    assert told == [("web", HEALTHY, ""), ("web", UNHEALTHY, "HTTP 500"), ("web", HEALTHY, "")]


async def test_a_task_is_probed_from_the_start_until_it_is_ready() -> None:
    slow = PACE._replace(interval=3600)
    async with prober() as (probing, told), replica() as web:
        web.status = 503
        probing.watch("web", web.target(), slow)
        await until(lambda: ("web", UNHEALTHY, "HTTP 503") in told)
        web.status = 200
        await until(lambda: told[-1] == ("web", HEALTHY, ""))
        asked = web.asked
        await asyncio.sleep(0.3)

    assert web.asked == asked


async def test_a_starting_task_tells_why_it_is_not_ready() -> None:
    async with prober() as (probing, told), replica() as web:
        web.status = 503
        probing.watch("web", web.target(), PACE._replace(start_period=3600))
        await more(web)

    assert told == [("web", Verdict.STARTING, "HTTP 503")]


async def test_another_reason_is_not_told_at_once() -> None:
    async with prober() as (probing, told), replica() as web:
        for web.status in (500, 501, 502):
            probing.watch("web", web.target(), PACE)
            await more(web)

    assert told == [("web", Verdict.STARTING, "HTTP 500"), ("web", UNHEALTHY, "HTTP 500")]


async def test_another_check_keeps_the_verdict_until_it_has_its_own() -> None:
    async with prober() as (probing, told), replica() as web, replica() as other:
        other.status = 404
        probing.watch("web", web.target(), PACE)
        await until(lambda: told == [("web", HEALTHY, "")])
        probing.watch("web", other.target("/new"), PACE)
        await more(other, 2)
        still = list(told)
        await more(other, 4)
        asked = web.asked
        other.status = 200
        await until(lambda: len(told) == 3)

    assert still == [("web", HEALTHY, "")]
    assert told[1:] == [("web", UNHEALTHY, "HTTP 404"), ("web", HEALTHY, "")]
    assert web.asked == asked


async def test_a_task_of_the_same_name_at_another_address_begins_anew() -> None:
    async with prober() as (probing, told), replica() as web:
        probing.watch("web", web.target(), PACE)
        await until(lambda: told == [("web", HEALTHY, "")])
        probing.watch("web", web.target()._replace(address="127.0.0.2"), PACE)
        await until(lambda: len(told) == 3)

    assert [verdict for _, verdict, _ in told[1:]] == [Verdict.STARTING, UNHEALTHY]


async def test_an_adopted_verdict_holds_until_probes_speak_against_it() -> None:
    async with prober() as (probing, told), replica() as web:
        probing.adopt("web", web.target(), PACE, HEALTHY, settled=False)
        await more(web)
        quiet = list(told)
        web.status = 500
        await until(lambda: bool(told))

    assert quiet == []
    assert told == [("web", UNHEALTHY, "HTTP 500")]


async def test_a_forgotten_task_is_neither_probed_nor_told_of() -> None:
    async with prober() as (probing, told), replica() as web:
        probing.watch("web", web.target(), PACE)
        await more(web)
        web.status = 500
        await more(web, 1)
        probing.forget("web")
        asked = web.asked
        await asyncio.sleep(0.5)

    assert web.asked == asked
    assert told == [("web", HEALTHY, "")]


async def test_tasks_that_hang_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(LIMIT)

    async with prober() as (probing, told), replica() as web, served(hang) as port:
        for number in range(200):
            hanging = web.target()._replace(port=port)
            probing.watch(number, hanging, PACE._replace(timeout=LIMIT))
        probing.watch("web", web.target(), PACE)
        await until(lambda: bool(told))
        await more(web)

    assert told == [("web", HEALTHY, "")]


async def test_a_probe_that_breaks_is_made_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = 3

    async def run(target: Target, timeout: float, executor: object) -> str:
        nonlocal broken
        broken -= 1
        if broken == 0:
            raise RuntimeError("unthought of")
        if broken == 1:
            raise probe.Unsure
        return ""

    monkeypatch.setattr(probe, "run", run)
    async with prober() as (probing, told):
        probing.watch("web", Tcp("127.0.0.1", 9), PACE)
        await until(lambda: broken < -3)

    assert told == [("web", HEALTHY, "")]
    assert "unthought of" in caplog.text


async def test_commands_end_with_the_prober() -> None:
    async with prober() as (probing, _):
        for number in range(20):
            command = Exec("127.0.0.1", "/proc/self/ns/net", ("sleep", "1000"), ())
            probing.watch(number, command, PACE._replace(timeout=1000))
        await asyncio.sleep(0.2)
