"""Programs of a node are told of its host ports: by files, and by a command."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh.agent import writeback
from mesh.agent.config import AgentConfig
from tests.support.hostports import Node, port
from tests.support.stores import eventually, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mesh.agent.writeback import Writeback


class World:
    """A node's host ports, and where they are told."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "ports"
        self.log = root / "log"
        self.script = root / "hook"
        self.node = Node()
        self.told = 0
        self.config = AgentConfig(node="n1", state_dir=str(root / "state"))

    def hook(self, *lines: str) -> None:
        """Write the command anew."""
        fresh = self.script.with_suffix(".new")
        fresh.write_text("\n".join(("#!/bin/sh", *lines, "")))
        fresh.chmod(0o700)
        os.replace(fresh, self.script)

    def made(self, **config: Any) -> Writeback:
        (outlet,) = writeback.outlets(msgspec.structs.replace(self.config, **config))
        return writeback.Writeback(outlet, self.node.ports, self.tell)

    def tell(self) -> None:
        self.told += 1

    def publish(self, *tasks: str) -> None:
        self.node.publish("a", port(80), port(81, host_ip="192.0.2.1"), tasks=tasks)
        self.node.settle()

    def end(self, task: str) -> None:
        self.node.end("a", task)
        self.node.settle()

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def holds(condition: Callable[[], bool]) -> None:
    async def asked() -> bool:
        return condition()

    await eventually(asked)


TELLING = 'echo "$ACTION $TASK $NODE $(cat)" >> {log}'


async def test_a_task_has_a_file_for_as_long_as_it_publishes(world: World) -> None:
    made = world.made(published_dir=str(world.directory))
    async with running(made.run()):
        world.publish("a-1")
        made.wake()
        await holds(lambda: world.directory.exists() and world.files() == ["a-1.json"])
        record = json.loads((world.directory / "a-1.json").read_text())
        world.end("a-1")
        made.wake()
        await holds(lambda: world.files() == [])

    of_task = {"podName": "a-1", "podIP": "10.0.1.5", "service": "a"}
    first, second = ({"containerPort": n, "protocol": "tcp"} for n in (80, 81))
    assert record == [
        {"hostPort": 32000, **first, **of_task},
        {"hostPort": 32001, **second, "hostIP": "192.0.2.1", **of_task},
    ]


async def test_files_of_an_agent_before_are_taken_over_and_others_left_alone(
    world: World,
) -> None:
    world.directory.mkdir()
    world.publish("gone")
    (mapping,) = (world.node.ports.published("gone")[:1],)
    old = msgspec.json.encode(mapping)
    world.end("gone")
    (world.directory / "gone.json").write_bytes(old)
    (world.directory / "half.json.new").write_bytes(old)
    (world.directory / "package.json").write_text("{}")
    (world.directory / "notes").write_text("mine")

    made = world.made(published_dir=str(world.directory))
    async with running(made.run()):
        made.wake()
        await holds(lambda: world.files() == ["notes", "package.json"])


async def test_a_directory_that_cannot_be_written_is_told_and_written_later(world: World) -> None:
    world.directory.write_text("in the way")
    made = world.made(published_dir=str(world.directory))
    world.publish("a-1")
    async with running(made.run()):
        made.wake()
        await holds(lambda: any("File exists" in p.message for p in made.problems()))
        world.directory.unlink()
        await holds(lambda: world.directory.is_dir() and world.files() == ["a-1.json"])
        await holds(lambda: not list(made.problems()))

    assert world.told >= 2


async def test_a_command_hears_of_each_change_once(world: World) -> None:
    world.hook(TELLING.format(log=world.log))
    made = world.made(published_hook=(str(world.script),))
    async with running(made.run()):
        world.publish("a-1")
        made.wake()
        await holds(lambda: len(world.lines()) == 1)
        made.wake()
        world.publish("a-2")
        made.wake()
        await holds(lambda: len(world.lines()) == 2)

    again = world.made(published_hook=(str(world.script),))
    world.end("a-1")
    async with running(again.run()):
        again.wake()
        await holds(lambda: len(world.lines()) == 3)

    action, task, node, record = world.lines()[0].split(" ", 3)
    assert (action, task, node) == ("published", "a-1", "n1")
    assert [one["podName"] for one in json.loads(record)] == ["a-1", "a-1"]
    assert world.lines()[1].startswith("published a-2 n1 ")
    assert world.lines()[2] == "removed a-1 n1 []"


async def test_a_command_that_fails_is_told_and_tried_again(world: World) -> None:
    world.hook("echo no disk >&2", "exit 3")
    made = world.made(published_hook=(str(world.script), "an argument"))
    world.publish("a-1", "a-2")
    async with running(made.run()):
        made.wake()
        await holds(lambda: any("and 1 more" in p.about for p in made.problems()))
        (problem,) = made.problems()
        world.hook(TELLING.format(log=world.log))
        await holds(lambda: len(world.lines()) == 2)
        await holds(lambda: not list(made.problems()))

    assert problem.about == "published_hook of task a-1 and 1 more"
    assert "no disk" in problem.message


async def test_a_command_that_hangs_is_stopped_with_all_that_it_started(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writeback, "_HOOK_SECONDS", 0.3)
    pids = world.directory
    world.hook(f'[ "$TASK" = a-1 ] && {{ sleep 1000 & echo $! >> {pids}; wait; }}', "exit 0")
    made = world.made(published_hook=(str(world.script),))
    world.publish("a-1", "a-2")
    async with running(made.run()):
        made.wake()
        await holds(lambda: any("no end after" in p.message for p in made.problems()))
        notes = world.script.parent / "state" / "published-hook"
        await holds((notes / "a-2.json").exists)

    await holds(lambda: not any(map(_runs, pids.read_text().split())))


def _runs(pid: str) -> bool:
    """Whether a process runs, and is not dead and unburied."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_command_that_is_not_there_is_told(world: World) -> None:
    made = world.made(published_hook=("/nowhere/hook",))
    world.publish("a-1")
    async with running(made.run()):
        made.wake()
        await holds(lambda: any("no such program" in p.message for p in made.problems()))


async def test_all_is_withdrawn_when_the_mesh_is_taken_off_a_host(world: World) -> None:
    world.hook(TELLING.format(log=world.log))
    both = {"published_dir": str(world.directory), "published_hook": (str(world.script),)}
    config = msgspec.structs.replace(world.config, **both)
    world.publish("a-1")
    for outlet in writeback.outlets(config):
        made = writeback.Writeback(outlet, world.node.ports, world.tell)
        async with running(made.run()):
            made.wake()
            await holds(partial(_tells, outlet, "a-1"))

    await writeback.withdraw(config)

    assert world.files() == []
    assert world.lines()[-1] == "removed a-1 n1 []"


def _tells(outlet: writeback.Outlet, task: str) -> bool:
    return list(outlet.told()) == [task]


@pytest.mark.parametrize(
    "wrong", [{"published_dir": "ports"}, {"published_hook": ("hook", "argument")}]
)
def test_paths_are_absolute(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not an absolute path"):
        AgentConfig(node="n1", **wrong)
