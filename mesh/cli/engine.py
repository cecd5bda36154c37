"""What a node's rules should be, computed from etcd as its agent would, and what its kernel holds.

Reads only.  The kernel is read where this host is that node and this user may.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import msgspec

from mesh import errors
from mesh.agent import config, planner, state
from mesh.cli import options, world
from mesh.delta import Delta
from mesh.engine.desired import Touched
from mesh.model.link import DeviceNames
from mesh.model.report import Applied, Problem
from mesh.reach import memory
from mesh.rules import dump, guards, nft
from mesh.rules.guards import Numbers
from mesh.rules.ids import Ids
from mesh.rules.ledger import Ledger
from mesh.rules.program import Devices, Parameters
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.agent.config import AgentConfig
    from mesh.cli.options import Session
    from mesh.dataplane.protocol import ElementDelta, Examined
    from mesh.model.view import NodeView
    from mesh.rules.dump import Rules
    from mesh.rules.elements import Elements
    from mesh.rules.marks import Layout


NFTABLES: Final = "nftables"
"""What is taken to drive a node that nothing is known of."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One node's rules.  `kernel` is None where it was not read, and `unread` says why.

    `examined` is the backend as it was read, `differences` what is wrong beyond elements.
    """

    state: state.State
    desired: Rules
    kernel: Rules | None
    examined: Examined | None
    differences: tuple[Problem, ...]
    unread: str

    @property
    def delta(self) -> ElementDelta:
        """What the agent would change in the kernel.  Raises HostNotReady if it was not read."""
        return Delta.between(self.read_back().elements, self.desired.elements)

    def read_back(self) -> Rules:
        """The kernel's rules.  Raises HostNotReady if they were not read."""
        if self.kernel is None:
            raise errors.HostNotReady(self.unread)
        return self.kernel


class _Host(NamedTuple):
    """What this host's kernel holds; of `held` None says `unread` why."""

    backend: str
    held: Examined | None
    differences: tuple[Problem, ...]
    unread: str


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


def read(node: str | None, asked: str = "") -> Engine:
    """A node's rules; the kernel's are those of the backend that forwards, or of the `asked` one.

    Raises BadUsage without a name and NotFound for one that has no number.
    """
    own = _own_config()
    name = node or (own.node if own is not None else None)
    if name is None:
        raise errors.BadUsage(
            "which node? Add --node NAME (`mesh node ls` lists them), or run this on a node"
        )
    here = own if own is not None and own.node == name else None
    return options.in_store(lambda session: _read(session, name, here, asked))


def _own_config() -> AgentConfig | None:
    """This host's configuration, if it has joined and this user may read it."""
    try:
        return options.agent_config()
    except errors.BadUsage:
        if options.setting("config") not in (None, os.environ.get("MESH_CONFIG")):
            raise  # it was named on the command line
        return None


async def _read(session: Session, name: str, here: AgentConfig | None, asked: str) -> Engine:
    world.cluster(session)
    # Of another node nobody knows: it is taken to publish what somebody asked for.
    loopback = here is None or here.loopback_ports
    known = state.State(session.keys, name, loopback=loopback)
    known.apply(await session.store.list(f"{session.keys.prefix}/"))
    known.settle(Touched(frozenset(), nodes=False))
    if here is not None:
        known.nodes.lack(memory.load(Path(here.state_dir)))
    node, peers = known.node_view(), known.peers()
    if node is None or name not in peers:
        raise errors.NotFound(
            f"no node {name!r} that has registered and has a number: see `mesh node ls`"
        )
    parameters = _parameters(known, node, here or config.AgentConfig(node=name))
    reported = await _reported(session, name)
    if here is None:
        why = f"the kernel of {name} can be read on {name} only, as root"
        host = _Host(reported or NFTABLES, None, (), why)
    else:
        host = await _kernel(here.backend, reported, parameters, asked)
    held = host.held.elements if host.held is not None else {}
    owners = _desired(known, node, held, parameters.layout)
    addresses, backend = peers[name].node.addresses, msgspec.convert(host.backend, dump.Backend)
    desired = dump.Rules(name, "desired", parameters, addresses, owners, backend)
    read = None
    if host.held is not None:
        holding = dump.by_owner(held, owners, parameters.layout)
        read = dump.Rules(name, "kernel", parameters, addresses, holding, backend)
    return Engine(known, desired, read, host.held, host.differences, host.unread)


async def _reported(session: Session, name: str) -> str | None:
    """The backend that the node's agent says it drives."""
    from mesh.engine import backend

    key = session.keys.applied(name)
    item = await session.store.get(key)
    try:
        told = schema.decode(key, item.value, Applied).backend if item is not None else None
    except errors.InvalidRecord:
        return None  # `mesh status` tells
    return told if told in backend.NAMES else None


async def _kernel(
    configured: str, reported: str | None, parameters: Parameters, asked: str
) -> _Host:
    """What this host's kernel holds: of the backend that forwards, or of the one asked for."""
    from mesh.engine import backend

    name = asked or reported or configured
    try:
        holding, others = await backend.holding(parameters), list[Problem]()
        if asked:
            of_them = [each for each in holding if each.startswith(asked)]
            name = backend.in_force(None, asked, of_them) or await backend.expected(asked)
        else:
            found = backend.in_force(reported, configured, holding)
            name = found or await backend.expected(configured)
            others += _others(name, reported, holding)
        held = await backend.examine(name, parameters)
    except errors.MeshError as error:
        known = name if name in dump.BACKENDS else NFTABLES
        return _Host(known, None, (), f"the kernel was not read: {error}")
    return _Host(name, held, (*held.differences, *others), "")


def _others(name: str, reported: str | None, holding: Iterable[str]) -> Iterator[Problem]:
    """What does not fit the backend that forwards."""
    if reported not in (None, name):
        message = f"holds the rules, but the agent reported {reported}: start the agent again"
        yield Problem(about=f"backend {name}", message=message)
    for other in holding:
        if other != name:
            message = f"has rules of the mesh besides {name}: the agent removes them when it starts"
            yield Problem(about=f"backend {other}", message=message)


def _parameters(known: state.State, node: NodeView, settings: AgentConfig) -> Parameters:
    assert known.cluster is not None  # or the node would have no number
    names = DeviceNames(settings.overlay_device, settings.steering_device, settings.bridge)
    devices = Devices(*names, node.network.bridge_mac)
    layout = settings.marks.layout
    return Parameters.of(known.cluster, node.network.number, devices, layout)


def _desired(
    known: state.State, node: NodeView, held: Elements, layout: Layout
) -> dict[str, Elements]:
    """The elements of every owner, with the frontend ids that the kernel has already."""
    ids, ledger = Ids(layout), Ledger()
    views = [view for name in sorted(known.services()) if (view := known.service_view(name))]
    for view in views:
        nft.adopt(planner.plan(view, node), held, ids)
    wanted = {view.spec.name: planner.lower(view, node, ids)[0] for view in views}
    numbers, found = Numbers(), known.guards()
    guards.adopt(found, held, numbers)
    wanted[dump.POLICIES] = guards.lower(found, numbers)
    wanted[dump.NODES] = planner.lower_nodes(known.peers(), node.name, layout)
    ledger.stage(wanted)
    return {owner: owned for owner in wanted if (owned := ledger.held_by(owner))}
