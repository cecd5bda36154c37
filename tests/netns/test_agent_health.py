"""The agent's part in health: whom it has probed, what it writes to etcd, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from mesh.agent.config import AgentConfig
from mesh.agent.health import HealthChecks
from mesh.agent.state import State
from mesh.health import memory
from mesh.model.report import Health
from mesh.store.lease import LeaseHolder
from mesh.store.memory import MemoryStore
from tests.support import records
from tests.support.namespaces import run
from tests.support.records import KEYS, Record
from tests.support.tasks import unaccepted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from mesh.engine.desired import Touched

pytestmark = pytest.mark.netns

ADDRESS: Final = "10.0.1.2"
EXEC: Final = {"type": "exec", "command": ["true"]}
LIMIT: Final = 30.0


@pytest.fixture(autouse=True)
def address() -> Iterator[None]:
    """What the replica's address leads to."""
    run("ip", "addr", "add", f"{ADDRESS}/32", "dev", "lo")
    yield
    run("ip", "addr", "del", f"{ADDRESS}/32", "dev", "lo")


class Node:
    """A node's checks, with the store it writes to."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.touched: list[Touched] = []
        self.state = State(KEYS, "n1")
        self.state.apply(records.snapshot(records.cluster()))
        settings = AgentConfig(node="n1", state_dir=str(directory), **config)
        self.checks = HealthChecks(self.state, settings, self.touched.append)
        self.store = MemoryStore()
        self.lease = LeaseHolder(self.store, 30)
        self._revision = 1

    def put(self, *each: dict[str, Record]) -> None:
        """Have the agent hear of records, and act."""
        for record in each:
            for key, value in record.items():
                self._revision += 1
                touched = self.state.apply(records.put(key, value, self._revision))
                self.checks.look(touched.services)

    def delete(self, key: str) -> None:
        self._revision += 1
        self.checks.look(self.state.apply(records.delete(key, self._revision)).services)

    async def told(self, task: str) -> Any:
        found = await self.store.get(KEYS.health("n1", task))
        assert found is None or found.lease
        return None if found is None else json.loads(found.value)

    async def until_told(self, task: str, condition: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(LIMIT):
            while not condition(told := await self.told(task)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return told


@asynccontextmanager
async def node(directory: Path, **config: Any) -> AsyncIterator[Node]:
    made = Node(directory, **config)
    try:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(made.lease.run())
            await made.checks.begin(made.lease, tasks)
            yield made
            running.cancel()
            raise _Over
    except* _Over:
        pass
    finally:
        await made.checks.close()


class _Over(Exception):
    pass


def replica(port: int, name: str = "a", service: str = "web") -> dict[str, Record]:
    """A task of this node, and its service with a check."""
    check = {"type": "tcp", "port": port, "interval": "100ms"}
    found = records.service(service, health=check)
    return found | records.task(service, name, 1, 2)


async def test_a_verdict_is_written_and_goes_with_its_task(tmp_path: Path) -> None:
    async with unaccepted(ADDRESS) as port, node(tmp_path) as own:
        own.put(replica(port), replica(9, service="api"), records.task("web", "b", 2, 2))
        (api, web) = await own.until_told(
            "a", lambda told: bool(told) and [one["healthy"] for one in told] == [False, True]
        )
        own.delete(KEYS.task("api", "a"))
        await own.until_told("a", lambda told: [one["service"] for one in told] == ["web"])
        own.delete(KEYS.task("web", "a"))
        await own.until_told("a", lambda told: told is None)
        others = await own.told("b")

    assert (web["service"], web["reason"], web["address"]) == ("web", "", ADDRESS)
    assert (api["service"], api["reason"]) == ("api", "connection refused")
    assert others is None
    assert {"web"} in [touched.services for touched in own.touched]


async def test_a_check_that_is_switched_off_leaves_nothing(tmp_path: Path) -> None:
    async with unaccepted(ADDRESS) as port, node(tmp_path) as own:
        own.put(replica(port))
        await own.until_told("a", bool)
        own.put(records.service("web"))
        await own.until_told("a", lambda told: told is None)
        left = list(own.checks.found())

    assert left == []


async def test_commands_are_not_executed_where_nobody_allowed_it(tmp_path: Path) -> None:
    done = tmp_path / "done"
    check = EXEC | {"command": ["touch", str(done)]}
    web = records.service("web", health=check)
    task = records.task("web", "a", 1, 2, netns="/proc/self/ns/net".replace("self", "1"))

    async with node(tmp_path) as own:
        own.put(web, task)
        (told,) = await own.until_told("a", bool)
        view = own.state.service_view("web")
    async with node(tmp_path, exec_checks=True) as allowed:
        allowed.put(web, task)
        await allowed.until_told("a", lambda told: bool(told) and told[0]["healthy"])

    assert (told["healthy"], told["starting"]) == (False, False)
    assert "exec_checks" in told["reason"]
    assert view is not None
    assert view.healthy == frozenset()
    assert done.exists()


async def test_the_next_agent_goes_on_from_what_this_one_found(tmp_path: Path) -> None:
    async with unaccepted(ADDRESS) as port:
        async with node(tmp_path) as first:
            first.put(replica(port))
            before = await first.until_told("a", lambda told: bool(told) and told[0]["healthy"])
            async with asyncio.timeout(LIMIT):
                while not memory.load(tmp_path):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        async with node(tmp_path) as second:
            second.state.apply(records.snapshot(records.cluster() | replica(port)))
            unknown = second.state.service_view("web")
            await second.checks.adopt()
            known = second.state.service_view("web")
            after = await second.until_told("a", bool)

    assert unknown is not None
    assert unknown.healthy == frozenset()
    assert known is not None
    assert known.healthy == {"a"}
    assert after == before


@pytest.mark.parametrize("text", ["", "{", '{"boot": "another", "tasks": []}'])
def test_a_file_of_another_boot_or_of_nobody_counts_for_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / memory.FILE_NAME).write_text(text)

    assert memory.load(tmp_path) == {}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    health = Health(service="web", healthy=True, address="10.0.1.5", since="2025-05-01T10:00:00Z")

    memory.save(tmp_path / "new", [("a", health)])

    assert memory.load(tmp_path / "new") == {("web", "a"): health}
    memory.forget(tmp_path / "new")
    assert memory.load(tmp_path / "new") == {}
