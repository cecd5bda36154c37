"""What a node's rules should be, computed from etcd as its agent would, and what its kernel holds.

Reads only.  The kernel is read where this host is that node and this user may.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mesh import errors
from mesh.agent import config, planner, state
from mesh.cli import options, world
from mesh.delta import Delta
from mesh.model.link import DeviceNames
from mesh.rules import dump, nft, program
from mesh.rules.ids import Ids
from mesh.rules.ledger import Ledger
from mesh.rules.program import Devices, Parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.agent.config import AgentConfig
    from mesh.cli.options import Session
    from mesh.dataplane.protocol import ElementDelta
    from mesh.model.view import NodeView
    from mesh.rules.dump import Rules
    from mesh.rules.elements import Elements


@dataclass(frozen=True, slots=True)
class Loaded:
    """Schema and version of a program, as its fingerprint in the kernel has them."""

    schema: int | None
    version: int | None


@dataclass(frozen=True, slots=True)
class Engine:
    """One node's rules.  `kernel` is None where it was not read, and `unread` says why."""

    state: state.State
    desired: Rules
    kernel: Rules | None
    loaded: Loaded | None
    unread: str

    @property
    def delta(self) -> ElementDelta:
        """What the agent would change in the kernel.  Raises HostNotReady if it was not read."""
        return Delta.between(self.read_back().elements, self.desired.elements)

    @property
    def wanted(self) -> Loaded:
        """The program that this version of the mesh would load."""
        built = program.build(self.desired.parameters)
        return Loaded(built.schema, built.version)

    def read_back(self) -> Rules:
        """The kernel's rules.  Raises HostNotReady if they were not read."""
        if self.kernel is None:
            raise errors.HostNotReady(self.unread)
        return self.kernel


NODE: Final[Callable[..., Any]] = click.option(
    "--node", metavar="NAME", help="Which node (default: the one this host is)."
)


def offline(path: str) -> Rules:
    """The rules in a dump; `-` is standard input.  Raises BadUsage."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise errors.BadUsage(f"--offline {path}: {error.strerror}") from None
    with options.naming(f"--offline {path}"):
        return dump.load(data)


def read(node: str | None) -> Engine:
    """A node's rules.  Raises BadUsage without a name and NotFound for one that has no number."""
    own = _own_config()
    name = node or (own.node if own is not None else None)
    if name is None:
        raise errors.BadUsage(
            "which node? Add --node NAME (`mesh node ls` lists them), or run this on a node"
        )
    here = own if own is not None and own.node == name else None
    return options.in_store(lambda session: _read(session, name, here))


def _own_config() -> AgentConfig | None:
    """This host's configuration, if it has joined and this user may read it."""
    try:
        return options.agent_config()
    except errors.BadUsage:
        if options.setting("config") not in (None, os.environ.get("MESH_CONFIG")):
            raise  # it was named on the command line
        return None


async def _read(session: Session, name: str, here: AgentConfig | None) -> Engine:
    world.cluster(session)
    known = state.State(session.keys, name)
    known.apply(await session.store.list(f"{session.keys.prefix}/"))
    node, peers = known.node_view(), known.peers()
    if node is None or name not in peers:
        raise errors.NotFound(
            f"no node {name!r} that has registered and has a number: see `mesh node ls`"
        )
    parameters = _parameters(known, node, here or config.AgentConfig(node=name))
    held: Elements | None = None
    unread, loaded = f"the kernel of {name} can be read on {name} only, as root", None
    if here is not None:
        try:
            held, loaded = await _kernel(parameters)
        except errors.MeshError as error:
            unread = f"the kernel was not read: {error}"
    owners = _desired(known, node, held or {})
    addresses = peers[name].node.addresses
    desired = dump.Rules(name, "desired", parameters, addresses, owners)
    kernel = None
    if held is not None:
        holding = dump.by_owner(held, owners)
        kernel = dump.Rules(name, "kernel", parameters, addresses, holding)
    return Engine(known, desired, kernel, loaded, unread)


def _parameters(known: state.State, node: NodeView, settings: AgentConfig) -> Parameters:
    assert known.cluster is not None  # or the node would have no number
    names = DeviceNames(settings.overlay_device, settings.steering_device, settings.bridge)
    devices = Devices(*names, node.network.bridge_mac)
    return Parameters.of(known.cluster, node.network.number, devices)


async def _kernel(parameters: Parameters) -> tuple[Elements, Loaded]:
    """What the kernel holds.  Raises HostNotReady and NotFound."""
    from mesh.dataplane.nftables import NftablesDriver

    driver = NftablesDriver(parameters)
    try:
        return await driver.read(), _fingerprint()
    finally:
        driver.close()


def _fingerprint() -> Loaded:
    from mesh.dataplane import nfmessages
    from mesh.dataplane.nfnetlink import Socket
    from mesh.rules import elements

    socket = Socket()
    try:
        found = nfmessages.read_elements(socket, ["fingerprint"])
    except OSError:
        return Loaded(None, None)
    finally:
        socket.close()
    parts = (found.get(("fingerprint", elements.mark_bytes(slot))) for slot in range(2))
    return Loaded(*(elements.mark_of(part) if part is not None else None for part in parts))


def _desired(known: state.State, node: NodeView, held: Elements) -> dict[str, Elements]:
    """The elements of every owner, with the frontend ids that the kernel has already."""
    ids, ledger = Ids(), Ledger()
    views = [view for name in sorted(known.services()) if (view := known.service_view(name))]
    for view in views:
        nft.adopt(planner.plan(view, node), held, ids)
    wanted = {view.spec.name: planner.lower(view, node, ids)[0] for view in views}
    wanted[dump.NODES] = planner.lower_nodes(known.peers(), node.name)
    ledger.stage(wanted)
    return {owner: owned for owner in wanted if (owned := ledger.held_by(owner))}
