"""What is examined: this host, its configuration, and what etcd knows of it.

Pure: whoever runs the checks reads the store and hands the snapshot over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mesh.agent import state
from mesh.errors import InvalidRecord
from mesh.model.cluster import Cluster
from mesh.model.link import DeviceNames
from mesh.model.report import Applied
from mesh.rules.program import Devices, Parameters
from mesh.store import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.agent.config import AgentConfig
    from mesh.model.cluster import NodeNetwork
    from mesh.store.protocol import Snapshot
    from mesh.store.schema import Keys

_ANY: Final = Cluster(id="any", prefix6="fd6d:6573:6800::/48")
"""The defaults, and an IPv6 prefix that nobody has by chance."""


@dataclass(frozen=True, slots=True)
class Known:
    """What etcd knows: the cluster, this node's place in it, and every agent's report.

    `peers` are the other nodes that are alive, by public key.
    """

    revision: int
    cluster: Cluster | None
    network: NodeNetwork | None
    registered: bool
    alive: bool
    reports: Mapping[str, Applied]
    peers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Subject:
    """This host.  `joined` says whether it has a configuration; `known` is None without etcd."""

    config: AgentConfig
    joined: bool
    known: Known | None

    @property
    def cluster(self) -> Cluster:
        """The cluster's settings, or the defaults."""
        return (self.known.cluster if self.known is not None else None) or _ANY

    @property
    def names(self) -> DeviceNames:
        """The names of our devices."""
        config = self.config
        return DeviceNames(config.overlay_device, config.steering_device, config.bridge)

    @property
    def reported(self) -> Applied | None:
        """What this node's agent told last."""
        return self.known.reports.get(self.config.node) if self.known is not None else None

    @property
    def numbered(self) -> bool:
        """Whether it is known which number this node has, and with it, which program."""
        return self.known is not None and self.known.network is not None

    @property
    def parameters(self) -> Parameters:
        """What the node's program is made from; of some other node if this one has no number.

        The names of chains and sets are the same for every node.
        """
        network = self.known.network if self.known is not None else None
        network = network or self.cluster.network(1)
        devices = Devices(*self.names, network.bridge_mac)
        return Parameters.of(self.cluster, network.number, devices, self.config.marks.layout)


def known(snapshot: Snapshot, keys: Keys, node: str) -> Known:
    """What a snapshot of the cluster's prefix says; records that cannot be read are left out."""
    view = state.State(keys, node)
    view.apply(snapshot)
    prefix, reports = keys.under("applied"), dict[str, Applied]()
    for item in snapshot.items:
        if item.key.startswith(prefix):
            try:
                report = schema.decode(item.key, item.value, Applied)
            except InvalidRecord:
                continue  # `mesh status` tells
            reports[item.key.removeprefix(prefix)] = report
    there = {item.key for item in snapshot.items}
    others = ((name, peer.node) for name, peer in view.peers().items() if name != node)
    return Known(
        revision=snapshot.revision,
        cluster=view.cluster,
        network=view.nodes.network(node),
        registered=keys.node(node) in there,
        alive=keys.alive(node) in there,
        reports=reports,
        peers={peer.public_key: name for name, peer in others if keys.alive(name) in there},
    )
