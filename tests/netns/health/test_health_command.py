"""Commands of checks: where they run, with what, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh.health import probe
from mesh.health.target import Exec
from tests.support.namespaces import Namespace
from tests.support.tasks import BRIEF, probed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.tasks import Run

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def task() -> Iterator[str]:
    space = Namespace("checked")
    yield "/run/netns/checked"
    space.close()


def executing(netns: str | None, *command: str) -> Exec:
    return Exec("10.0.1.5", netns, command, (("MESH_TASK", "web-1"),))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("true",), ""),
        (("sh", "-c", "echo almost; echo not ready >&2; exit 3"), "exit status 3: not ready"),
        (("sh", "-c", "kill -9 $$"), "signal 9"),
        (("sh", "-c", "head -c 10000000 /dev/zero"), ""),
        (("sh", "-c", "sleep 1000 & true"), ""),
    ],
)
def test_a_commands_end_decides(
    on_loop: Run, task: str, command: tuple[str, ...], reason: str
) -> None:
    assert on_loop(probed(executing(task, *command))) == reason


def test_a_command_that_is_not_there_is_named(on_loop: Run, task: str) -> None:
    assert "no-such" in on_loop(probed(executing(task, "no-such")))


def test_a_task_without_a_namespace_fails(on_loop: Run) -> None:
    assert "netns" in on_loop(probed(executing(None, "true")))
    assert "/run/netns/gone" in on_loop(probed(executing("/run/netns/gone", "true")))
    assert "cannot start" in on_loop(probed(executing("/dev/null", "true")))


def test_a_command_runs_in_the_tasks_network_with_a_clean_environment(
    on_loop: Run, task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "1")
    seen = tmp_path / "seen"
    script = f"readlink /proc/self/ns/net > {seen}; env >> {seen}; ls /proc/self/fd >> {seen}"

    assert on_loop(probed(executing(task, "sh", "-c", script))) == ""

    lines = seen.read_text().splitlines()
    assert lines[0] == f"net:[{Path(task).stat().st_ino}]"
    assert lines[0] != os.readlink("/proc/self/ns/net")
    assert "MESH_TASK=web-1" in lines
    assert not any(line.startswith("SECRET") for line in lines)
    assert lines[-4:] == ["0", "1", "2", "3"]


@contextmanager
def marked(tmp_path: Path) -> Iterator[Callable[[], bool]]:
    """Whether a process that works in a directory is still there."""

    def lives() -> bool:
        return any(_works_in(path, tmp_path) for path in Path("/proc").glob("[0-9]*"))

    yield lives


def _works_in(process: Path, directory: Path) -> bool:
    try:
        return os.readlink(process / "cwd") == str(directory)
    except OSError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def lasting(tmp_path: Path) -> tuple[str, ...]:
    """A command that goes on for ever, and so does its child."""
    return "sh", "-c", f"cd {tmp_path}; sleep 1000 & sleep 1000"


def test_a_command_is_killed_with_its_children_when_its_time_is_over(
    on_loop: Run, task: str, tmp_path: Path
) -> None:
    with marked(tmp_path) as lives:
        assert on_loop(probed(executing(task, *lasting(tmp_path)), BRIEF)) == "no end within 0.3 s"
        on_loop(until(lambda: not lives()))


def test_a_command_is_killed_when_nobody_waits_for_it_any_more(
    on_loop: Run, task: str, tmp_path: Path
) -> None:
    async def give_up(lives: Callable[[], bool]) -> None:
        with ThreadPoolExecutor(1) as executor:
            target = executing(task, *lasting(tmp_path))
            probing = asyncio.create_task(probe.run(target, 1000, executor))
            await until(lives)
            probing.cancel()
            await until(lambda: not lives())

    with marked(tmp_path) as lives:
        on_loop(give_up(lives))


def test_a_command_does_not_outlive_who_started_it(task: str, tmp_path: Path) -> None:
    program = f"""
import asyncio, concurrent.futures, sys
from mesh.health import probe
from mesh.health.target import Exec
target = Exec("", {task!r}, {lasting(tmp_path)!r}, ())
asyncio.run(probe.run(target, 1000, concurrent.futures.ThreadPoolExecutor(1)))
"""
    with marked(tmp_path) as lives, subprocess.Popen((sys.executable, "-c", program)) as starter:
        asyncio.run(until(lives))
        starter.kill()
        starter.wait()
        asyncio.run(until(lambda: len(_all_in(tmp_path)) < 3))
        for process in _all_in(tmp_path):  # the command's own child is not ours to end
            os.kill(process, 9)


def _all_in(directory: Path) -> list[int]:
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if _works_in(p, directory)]
