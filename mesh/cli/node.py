"""`mesh node`: join this host to the cluster; list, inspect, drain and remove nodes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from mesh import errors
from mesh.cli import node_drain, node_labels, options, output

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.agent.config import AgentConfig, EtcdConfig
    from mesh.cli.options import Session
    from mesh.cli.world import World
    from mesh.model.report import Peers


@click.group(cls=options.Noun)
def node() -> None:
    """Join this host; list, inspect, label, drain and remove nodes."""


@node.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["manager", "worker"]),
    default="worker",
    show_default=True,
    help="Managers may be elected to allocate addresses and ports.",
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="ADDR[:PORT]",
    help="Where WireGuard answers, best first; repeatable (default: this host's own addresses).",
)
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option("--state-dir", metavar="DIR", help="Where the agent keeps its key.")
@click.option("--force", is_flag=True, help="Replace an existing configuration file.")
def join(name: str, force: bool, **given: Any) -> None:
    """Write the agent's configuration of this host, after asking etcd.

    The file is --config (default /etc/mesh/agent.toml).  The agent registers the node itself.
    """
    path = options.config_path()
    if path.exists() and not force:
        raise errors.Conflict(
            f"{path} exists: this host has joined already; run `mesh agent --config {path}`, "
            "or replace the file with --force"
        )
    config = _config(name, given)
    options.in_store(lambda session: _check_name_is_free(session, name), config.etcd)
    _write_private(path, config)
    if options.as_json():
        output.document({"node": name, "role": config.role, "config": str(path)})
        return
    output.done(f"Node {name} ({config.role.value}) may join: wrote {path}")
    output.line(f"  Next, as root: mesh agent --config {path}")


def _config(name: str, given: dict[str, Any]) -> AgentConfig:
    import msgspec

    from mesh.agent.config import AgentConfig
    from mesh.model.names import check_name
    from mesh.model.node import Role

    with options.naming("NAME"):
        check_name(name, "node")
    with options.naming("--endpoint"):
        config = AgentConfig(
            node=name,
            role=Role(given["role"]),
            etcd=_absolute(options.etcd_config(read_file=False)),
            endpoints=given["endpoints"],
            labels=options.labels(given["labels"]),
        )
    if given["state_dir"] is not None:
        config = msgspec.structs.replace(config, state_dir=os.path.abspath(given["state_dir"]))
    return config


def _absolute(etcd: EtcdConfig) -> EtcdConfig:
    """The same, with paths that do not depend on where the agent is started."""
    import msgspec

    paths = {name: getattr(etcd, name) for name in ("ca", "cert", "key")}
    return msgspec.structs.replace(
        etcd, **{name: os.path.abspath(path) for name, path in paths.items() if path is not None}
    )


async def _check_name_is_free(session: Session, name: str) -> None:
    from mesh.cli import world

    world.cluster(session)
    if await session.store.get(session.keys.alive(name)) is not None:
        raise errors.Conflict(
            f"node {name!r} is alive elsewhere: choose another NAME, or stop that agent first"
        )


def _write_private(path: Path, config: AgentConfig) -> None:
    """Put the file in place at once, readable by its owner only: it may hold a password."""
    import tempfile

    from mesh.agent import config as files

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        with open(handle, "w") as file:
            file.write(files.dump(config))
        os.replace(temporary, path)
    except OSError as error:
        raise errors.HostNotReady(
            f"--config {path}: {error.strerror}; name a file this user may write, or run as root"
        ) from None


COLUMNS = (
    "NAME", "ROLE", "NUMBER", "OVERLAY", "SUBNET", "ENDPOINT", "STATE", "APPLIED", "BACKEND"
)  # fmt: skip


@node.command("ls")
def list_() -> None:
    """List the nodes of the cluster; on a node, also how it reaches the others."""
    from mesh.cli import peers, world

    seen = options.in_store(world.read)
    names, told = sorted(seen.nodes, key=world.natural), peers.read()
    if options.as_json():
        output.document([describe(seen, name, told) for name in names])
        return
    output.table(COLUMNS, [row(seen, name) for name in names])
    peers.show(told)


def row(seen: World, name: str) -> list[output.Cell]:
    """A node as a line of `node ls` and `status`."""
    known, network, applied = seen.nodes[name], seen.network(name), seen.applied.get(name)
    return [
        name,
        known.role.value,
        str(network.number) if network is not None else "-",
        network.overlay[0] if network is not None else "-",
        network.subnets[0] if network is not None else "-",
        known.endpoints[0] if known.endpoints else "-",
        seen.node_state(name),
        seen.progress(name),
        applied.backend if applied is not None else "-",
    ]


def describe(seen: World, name: str, told: Peers | None) -> dict[str, Any]:
    """A node as one JSON object; `peer` is how this host reaches it, by what its agent `told`."""
    import msgspec

    from mesh.cli import peers

    network, applied = seen.network(name), seen.applied.get(name)
    return {
        **msgspec.to_builtins(seen.nodes[name]),
        "labels": seen.state.nodes.labels.get(name, {}),
        "number": network.number if network is not None else None,
        "overlay": list(network.overlay) if network is not None else [],
        "subnets": list(network.subnets) if network is not None else [],
        "state": seen.node_state(name).text,
        "applied": applied,
        "behind": seen.is_behind(name),
        "unreachedBy": peers.unreached_by(seen, name),
        "peer": peers.of(told, name),
    }


@node.command()
@click.argument("name")
def inspect(name: str) -> None:
    """Print everything known of a node, its tasks included."""
    from mesh.cli import peers, world

    seen = options.in_store(world.read)
    if name not in seen.nodes:
        raise errors.NotFound(f"no readable node {name!r}: `mesh node ls` lists them")
    listening = seen.listening.get(name)
    listeners = listening.listeners if listening is not None else ()
    found = describe(seen, name, peers.read())
    found |= {"tasks": seen.tasks_on(name), "listeners": listeners}
    if options.as_json():
        output.document(found)
    else:
        output.fields(found)


@node.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Remove it although its agent is alive.")
def rm(name: str, force: bool) -> None:
    """Forget a node; its number and addresses become free.

    Its agent must be stopped first: a running one registers again.
    """
    left = options.in_store(lambda session: _remove(session, name, force=force))
    if left:
        output.warn(f"tasks still placed on {name}: {', '.join(left)}; `mesh task rm` removes them")
    if options.as_json():
        output.document({"removed": [name]})
    else:
        output.done(f"Node removed: {name}")


async def _remove(session: Session, name: str, *, force: bool) -> list[str]:
    from mesh.cli import world
    from mesh.store.protocol import Compare, Delete

    seen, keys = await world.read(session), session.keys
    if await session.store.get(keys.node(name)) is None:
        raise errors.NotFound(f"no node {name!r}: `mesh node ls` lists them")
    kept = (keys.node, keys.maintenance, keys.labels, keys.applied, keys.cursors, keys.listeners)
    of_node = [key(name) for key in kept]
    result = await session.store.transact(
        () if force else (Compare(keys.alive(name), 0),), [Delete(key) for key in of_node]
    )
    if not result.succeeded:
        raise errors.Conflict(
            f"node {name!r} is alive: stop its agent first (`mesh agent --cleanup` there removes "
            "what it set up), or use --force"
        )
    for item in (await session.store.list(keys.published(name))).items:
        await session.store.delete(item.key)
    return [f"{task.service}/{task.id}" for task in seen.tasks_on(name)]


node.add_command(node_drain.drain)
node.add_command(node_drain.activate)
node.add_command(node_labels.update)
