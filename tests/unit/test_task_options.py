"""What `mesh task run` decides before and between lives: refusals, names, pauses."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.agent.config import AgentConfig
from mesh.containers import run
from mesh.errors import BadUsage
from mesh.model.task import Task
from mesh.store import schema
from mesh.store.memory import MemoryStore


@pytest.mark.parametrize(
    "options",
    [
        run.RunOptions("we/b", "web-1", ("true",)),
        run.RunOptions("web", "", ("true",)),
        run.RunOptions("web", "web-1", ("true",), weight=256),
        run.RunOptions("web", "web-1", ()),
    ],
)
async def test_malformed_options_are_refused_before_anything_is_touched(
    options: run.RunOptions,
) -> None:
    config = AgentConfig(node="n1")

    with pytest.raises(BadUsage):
        await run.run_until(asyncio.Event(), MemoryStore(), schema.Keys(), config, options)


def test_pauses_double_to_a_limit_and_begin_anew_after_a_steady_life() -> None:
    pauses = [0.0]
    for _ in range(7):
        pauses.append(run.next_pause(pauses[-1], lasted=0.1))

    assert pauses[1:] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert run.next_pause(5.0, lasted=60) == 0.2


def test_a_default_id_is_a_name_that_begins_with_the_services() -> None:
    dice = random.Random(1)
    names = {run.default_id("s" * 63, dice) for _ in range(50)}

    assert len(names) == 50
    for name in names:
        Task(service="web", id=name, node="n1", addresses=("10.0.3.2",))
        assert name.startswith("s" * 56 + "-")


def test_without_rights_the_message_names_them() -> None:
    program = "import mesh.containers.run as run; run._check_rights()"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", sys.executable, "-c", program],
        capture_output=True, text=True, check=False, cwd=Path(run.__file__).parents[2],
    )  # fmt: skip

    assert "CAP_NET_ADMIN and CAP_SYS_ADMIN: run as root" in done.stderr
