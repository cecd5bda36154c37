"""`mesh doctor`: whether this host can carry the mesh and does, and what to do where not."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final

import click

from mesh import errors
from mesh.cli import options, output

if TYPE_CHECKING:
    from mesh.agent.config import AgentConfig
    from mesh.cli.options import Session
    from mesh.doctor.check import Check
    from mesh.doctor.subject import Known
    from mesh.store.etcd_version import Server

_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin"
"""A user's PATH often lacks the directories of nft and ip; the agent's does not."""

_WORDS: Final = {"ok": ("ok", "green"), "warn": ("warning", "yellow"), "fail": ("problem", "red")}


@click.command(cls=options.Verb)
def doctor() -> None:
    """Examine this host: etcd, the kernel, the rule backend, firewalls, and who is in the way.

    Changes nothing; what has to be tried is tried in a network namespace of its own.  Run it as
    root.  Exits with 1 if there is a problem; warnings alone are no problem.
    """
    from mesh.doctor.check import Status

    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATH}"
    logging.getLogger("mesh").addHandler(logging.NullHandler())  # what is tried may complain
    checks = _checks()
    healthy = all(each.status is not Status.FAIL for each in checks)
    if options.as_json():
        output.document({"ok": healthy, "checks": checks})
    else:
        _print(checks)
    options.exit_with(0 if healthy else 1)


def _checks() -> list[Check]:
    from mesh.doctor import examine, store
    from mesh.doctor.subject import Subject

    config, joined = _config()
    known, error, servers = _ask(config)
    subject = Subject(config, joined, known)
    of_etcd = [*store.of_etcd(known, error, servers), *store.of_cluster(subject)]
    return [*of_etcd, *asyncio.run(examine.of_host(subject))]


def _config() -> tuple[AgentConfig, bool]:
    """This host's configuration, and whether it has one."""
    from mesh.agent.config import AgentConfig

    named = options.setting("config") not in (None, os.environ.get("MESH_CONFIG"))
    if named or options.config_path().exists():
        return options.agent_config(), True
    return AgentConfig(node="this-host"), False


def _ask(config: AgentConfig) -> tuple[Known | None, str, list[Server]]:
    """What etcd knows; else why nothing is known."""
    from mesh.agent import etcd
    from mesh.doctor import subject
    from mesh.store import etcd_version

    async def read(session: Session) -> Known:
        keys = session.keys
        kinds = ("nodes", "alive", "applied", "allocations")
        snapshot = await session.store.list(keys.cluster, *map(keys.under, kinds))
        return subject.known(snapshot, keys, config.node)

    try:
        chosen = options.etcd_config()
        known = options.in_store(read, chosen)
    except errors.MeshError as error:
        return None, str(error), []
    return known, "", asyncio.run(etcd_version.ask(etcd.options(chosen)))


def _print(checks: list[Check]) -> None:
    rows = []
    for each in checks:
        word, style = _WORDS[each.status.value]
        rows.append((each.name, output.Styled(word, style), each.evidence))
    output.table(("CHECK", "STATUS", "EVIDENCE"), rows)
    advised = [each for each in checks if each.fix is not None]
    click.echo()
    if not advised:
        output.done("no problem")
    for each in advised:
        output.line(f"! {each.name}: {each.fix}", _WORDS[each.status.value][1])
