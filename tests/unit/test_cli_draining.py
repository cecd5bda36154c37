"""`mesh task drain|activate|rm --drain` and `mesh node drain|activate` on an in-memory store."""

from __future__ import annotations

import asyncio
from typing import Final

import pytest

from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, add_web, judge, start_cluster, words

WEB_1: Final = KEYS.task("web", "web-1")
FAR: Final = 1_000_000


@pytest.fixture
def cli() -> CommandLine:
    made = CommandLine(MemoryStore())
    start_cluster(made)
    add_web(made)
    judge(made, 2, healthy=True)
    return made


def tell(cli: CommandLine, node: str, revision: int = FAR, **left: int) -> None:
    """A node reports what connections are left of tasks of web, given with underscores."""
    each = [
        {"service": "web", "task": name.replace("_", "-"), "count": count}
        for name, count in left.items()
    ]
    cli.apply(node, drained={"revision": revision, "left": each})


def settle(cli: CommandLine) -> None:
    for node in ("n1", "n2"):
        tell(cli, node)


def test_a_task_drains_and_takes_part_again(cli: CommandLine) -> None:
    settle(cli)

    assert "drained" in cli.ok("task", "drain", "web", "web-1")
    assert cli.get(WEB_1)["state"] == "draining"
    assert "draining" in " ".join(words(cli.ok("task", "ls", "web"))[1])
    assert cli.json("task", "ls", "web")[0]["eligible"] is False
    cli.ok("task", "activate", "web", "web-1")
    assert cli.get(WEB_1)["state"] == "running"
    assert cli.json("task", "ls", "web")[0]["eligible"] is True


def test_what_is_waited_for_is_told_by_name_and_number(cli: CommandLine) -> None:
    tell(cli, "n1", web_1=3, web_2=8)
    tell(cli, "n2", revision=1)

    result = cli.run("task", "drain", "web", "web-1", "--timeout", "0s")

    assert result.exit_code == 1
    assert "n2 to apply it; 3 connections to end (n1 3)" in result.stderr
    assert cli.get(WEB_1)["state"] == "draining"


def test_a_node_that_is_not_alive_is_not_waited_for(cli: CommandLine) -> None:
    settle(cli)
    cli.add_node("n3", 3, alive=False)

    cli.ok("task", "drain", "web", "web-1", "--timeout", "0s")


def test_nobody_has_to_wait(cli: CommandLine) -> None:
    assert cli.json("task", "drain", "web", "web-1", "--no-wait") == {"draining": ["web/web-1"]}
    assert cli.json("node", "drain", "n1", "--no-wait")["draining"] == ["n1"]


def test_a_task_is_removed_when_it_has_drained_and_not_before(cli: CommandLine) -> None:
    tell(cli, "n1", web_1=1)
    tell(cli, "n2")
    refused = cli.run("task", "rm", "web", "web-1", "--drain", "--timeout", "0s")
    kept = cli.get(WEB_1)
    settle(cli)
    cli.ok("task", "rm", "web", "web-1", "--drain")

    assert refused.exit_code == 1
    assert kept["state"] == "draining"
    assert cli.get(WEB_1) is None


def test_who_still_has_a_removed_task_in_service_is_told(cli: CommandLine) -> None:
    cli.apply("n1")
    cli.apply("n2")
    late = cli.run("task", "rm", "web", "web-1", "--wait", "--timeout", "0s")
    for node in ("n1", "n2"):
        cli.apply(node, revision=FAR)
    settled = cli.run("task", "rm", "web", "web-2", "--wait", "--timeout", "0s")

    assert late.exit_code == 1
    assert "n1, n2 to apply it" in late.stderr
    assert settled.exit_code == 0


def test_a_task_keeps_the_lease_that_it_is_held_by(cli: CommandLine) -> None:
    async def leased() -> int:
        lease = await cli.store.grant(60)
        item = await cli.store.get(WEB_1)
        assert item is not None
        await cli.store.put(WEB_1, item.value, lease)
        return lease

    lease = asyncio.run(leased())
    cli.ok("task", "drain", "web", "web-1", "--no-wait")
    found = asyncio.run(cli.store.get(WEB_1))

    assert found is not None
    assert found.lease == lease


def test_a_node_drains_and_who_is_left_without_a_task_is_told(cli: CommandLine) -> None:
    settle(cli)
    fine = cli.run("node", "drain", "n1")
    alone = cli.run("node", "drain", "n2")
    states = [row[6] for row in words(cli.ok("node", "ls"))[1:]]
    eligible = [one["eligible"] for one in cli.json("task", "ls", "web")]
    cli.ok("node", "activate", "n1")

    assert fine.exit_code == alone.exit_code == 0
    assert "web" not in fine.stderr
    assert "service web has no other task" in alone.stderr
    assert states == ["draining", "draining"]
    assert eligible == [False, False]
    assert cli.get(KEYS.maintenance("n1"))["state"] == "active"
    assert cli.json("task", "ls", "web")[0]["eligible"] is True


def test_a_node_that_drains_already_is_only_waited_for(cli: CommandLine) -> None:
    settle(cli)
    cli.ok("node", "drain", "n1")
    before = cli.get(KEYS.maintenance("n1"))
    cli.ok("node", "drain", "n1")

    assert cli.get(KEYS.maintenance("n1")) == before


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("task", "drain", "web", "web-9"), 3),
        (("task", "activate", "web", "web-9"), 3),
        (("node", "drain", "n9"), 3),
        (("node", "activate", "n9"), 3),
        (("task", "drain", "web", "web-1", "--timeout", "soon"), 2),
        (("task", "rm", "web", "web-1", "--timeout", "1s"), 2),
        (("service", "update", "web", "--drain", "soon"), 2),
    ],
)
def test_what_cannot_be_is_refused(cli: CommandLine, args: tuple[str, ...], code: int) -> None:
    assert cli.run(*args).exit_code == code


def test_a_service_says_how_long_its_connections_may_go_on(cli: CommandLine) -> None:
    cli.ok("service", "update", "web", "--drain", "2m", "--no-wait")

    assert cli.get(KEYS.service("web"))["drain"] == "2m"
