"""Waiting until tasks have drained: every live node applied it, and no connection is left.

Owns what the verbs `task drain`, `task rm --drain` and `node drain` have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from mesh import errors
from mesh.cli import output

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mesh.cli.options import Session
    from mesh.cli.world import World
    from mesh.model.report import Applied
    from mesh.model.task import Task
    from mesh.store.protocol import Snapshot
    from mesh.store.schema import Keys

_LOOK_SECONDS: Final = 0.2
_SPARE_SECONDS: Final = 30.0
"""Waited beyond the time that connections have to drain, before a verb gives up."""

WAIT = click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Wait until it has drained."
)
TIMEOUT = click.option(
    "--timeout",
    metavar="DURATION",
    help="Give up waiting after this long [default: 30 s more than the services' --drain].",
)


class Progress(NamedTuple):
    """What is waited for: live nodes that have yet to stop new connections, by name, and how many
    connections others tell are left.
    """

    behind: tuple[str, ...]
    left: dict[str, int]

    @property
    def is_done(self) -> bool:
        """Whether nothing is."""
        return not (self.behind or self.left)

    def __str__(self) -> str:
        parts = []
        if self.behind:
            parts.append(f"{', '.join(self.behind)} to apply it")
        if self.left:
            each = ", ".join(f"{node} {count}" for node, count in self.left.items())
            total = sum(self.left.values())
            parts.append(f"{total} connection{'' if total == 1 else 's'} to end ({each})")
        return "; ".join(parts) or "nothing"


def progress(
    snapshot: Snapshot, keys: Keys, tasks: Collection[tuple[str, str]], revision: int
) -> Progress:
    """How far the live nodes are with tasks that drain since `revision`; without any, with what
    was written at it.
    """
    from mesh.cli import world

    alive, applied = keys.under("alive"), keys.under("applied")
    live = {item.key.removeprefix(alive) for item in snapshot.items if item.key.startswith(alive)}
    told = {
        item.key.removeprefix(applied): _report(item.key, item.value)
        for item in snapshot.items
        if item.key.startswith(applied)
    }
    behind, left = [], {}
    for node in sorted(live, key=world.natural):
        report = told.get(node)
        if report is None or (report.drained if tasks else report).revision < revision:
            behind.append(node)
            continue
        here = (one for one in report.drained.left if (one.service, one.task) in tasks)
        count = sum(one.count for one in here)
        if count:
            left[node] = count
    return Progress(tuple(behind), left)


def _report(key: str, value: bytes) -> Applied | None:
    from mesh.model.report import Applied
    from mesh.store import schema

    try:
        return schema.decode(key, value, Applied)
    except errors.InvalidRecord:
        return None


async def wait(
    session: Session, tasks: Collection[tuple[str, str]], revision: int, seconds: float
) -> None:
    """Return when tasks that drain since `revision` have, or without any when all live nodes apply
    that; say on stderr what is waited for.

    Raises MeshError after `seconds`.
    """
    import asyncio

    keys, clock = session.keys, asyncio.get_running_loop().time
    began, said = clock(), ""
    while True:
        snapshot = await session.store.list(keys.under("alive"), keys.under("applied"))
        now = progress(snapshot, keys, tasks, revision)
        if now.is_done:
            return
        if clock() - began > seconds:
            raise errors.MeshError(
                f"not done within {seconds:g} s: still waiting for {now}; where it was applied no "
                "new connection is begun; wait on with the same verb, or look at `mesh status`"
            )
        if str(now) != said and clock() - began > output.PATIENCE:
            said = str(now)
            click.echo(f"mesh: waiting for {said} …", err=True)
        await asyncio.sleep(_LOOK_SECONDS)


def patience(given: str | None, seen: World | None, services: Iterable[str]) -> float:
    """How long to wait: as --timeout says, or long enough for these services of the world `seen`.

    Raises BadUsage.
    """
    from mesh.cli import options
    from mesh.model.names import parse_duration

    if given is not None:
        with options.naming("--timeout"):
            return parse_duration(given)
    views = (seen.state.service_view(name) for name in services if seen is not None)
    longest = max((view.spec.drain_seconds for view in views if view is not None), default=0.0)
    return longest + _SPARE_SECONDS


async def change_task(session: Session, service: str, name: str, **fields: Any) -> tuple[Task, int]:
    """Write fields of a task's record that somebody else owns and may write at the same time; the
    record, and the revision at which it is so.  Raises NotFound, Conflict.
    """
    import msgspec

    from mesh.store import schema
    from mesh.store.protocol import Compare, Put

    key = session.keys.task(service, name)
    for _ in range(_TRIES):
        item = await session.store.get(key)
        if item is None:
            raise errors.NotFound(f"no task {service}/{name}: `mesh task ls {service}` lists them")
        old = schema.parse_task(key, item.value)
        record = msgspec.structs.replace(old, **fields)
        if record == old:
            return old, item.mod_revision
        # Under the lease that it has: a task that `mesh task run` holds ends with it.
        put = Put(key, schema.encode(record), item.lease)
        written = await session.store.transact((Compare(key, item.mod_revision),), (put,))
        if written.succeeded:
            return record, written.revision
    raise errors.Conflict(f"task {service}/{name} is being written by somebody else: try again")


_TRIES: Final = 5
