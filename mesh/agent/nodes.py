"""The nodes of the cluster as etcd tells of them: who they are, their numbers, who is alive.

Mutable, a part of mesh.agent.state.  Pure: no clock, no I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.model.view import NodeView, PeerNode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.model.cluster import Cluster, NodeNetwork
    from mesh.model.node import Node


class Nodes:
    """What is known of the nodes, seen from the node `own`."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._cluster: Cluster | None = None
        self._known: dict[str, Node] = {}
        self._given: dict[str, Mapping[str, str]] = {}
        self._labels: dict[str, Mapping[str, str]] = {}
        self._numbers: dict[str, set[int]] = {}
        self._alive: set[str] = set()
        self.unreachable: frozenset[str] = frozenset()
        self._networks: dict[int, NodeNetwork] = {}
        self._view: NodeView | None = None

    def confine(self, cluster: Cluster | None) -> None:
        """The cluster has these settings."""
        self._cluster = cluster
        self._networks.clear()
        self._view = None

    def identified(self, name: str, node: Node | None) -> bool:
        """A node has this identity; None: it has none any more.  Whether its traits changed."""
        before = self.traits(name)
        if node is None:
            del self._known[name]
        else:
            self._known[name] = node
        self._label(name)
        return self.traits(name) != before

    def labelled(self, name: str, labels: Mapping[str, str]) -> bool:
        """Operators gave a node these labels; whether it has others than before."""
        self._given[name] = labels
        return self._label(name)

    def _label(self, name: str) -> bool:
        known = self._known.get(name)
        both = {**(known.labels if known is not None else {}), **self._given.get(name, {})}
        labels = {key: value for key, value in both.items() if value}
        if labels == self._labels.get(name, {}):
            return False
        self._view = None
        self._labels = {**self._labels, name: labels}
        return True

    def lives(self, name: str, *, alive: bool) -> None:
        """A node gives signs of life, or no longer does."""
        self._view = None
        (self._alive.add if alive else self._alive.discard)(name)

    def lack(self, names: frozenset[str]) -> frozenset[str]:
        """These nodes cannot be reached from here, and all others can; of which that is new."""
        self._view = None
        before, self.unreachable = self.unreachable, names
        return before ^ names

    @property
    def others_alive(self) -> frozenset[str]:
        """Every other node that gives signs of life."""
        return frozenset(self._alive - {self._own})

    def numbered(self, name: str, number: int, *, held: bool) -> None:
        """A node was given a number, or no longer has it."""
        self._view = None
        numbers = self._numbers.setdefault(name, set())
        (numbers.add if held else numbers.discard)(number)
        if not numbers:
            del self._numbers[name]

    @property
    def labels(self) -> Mapping[str, Mapping[str, str]]:
        """The labels of every node that has, or had, any."""
        return self._labels

    def traits(self, name: str) -> dict[str, str]:
        """What a node may be selected by: its labels, and its own name and role."""
        known = self._known.get(name)
        role = {"role": known.role.value} if known is not None else {}
        return {"node": name, **role, **self._labels.get(name, {})}

    def view(self) -> NodeView | None:
        """The own node, or None while it has no number."""
        if self._view is None:
            network = self.network(self._own)
            if network is None:
                return None
            live = frozenset(self._alive | {self._own})
            self._view = NodeView(self._own, network, live, self._labels, self.unreachable)
        return self._view

    def network(self, name: str) -> NodeNetwork | None:
        """The addresses of a node, or None while it has no number in the cluster."""
        cluster, numbers = self._cluster, self._numbers.get(name)
        if cluster is None or not numbers or min(numbers) not in range(1, cluster.capacity + 1):
            return None
        number = min(numbers)
        if number not in self._networks:
            self._networks[number] = cluster.network(number)
        return self._networks[number]

    def peers(self) -> dict[str, PeerNode]:
        """Every node with an identity and a number, the own one included."""
        networks = ((name, node, self.network(name)) for name, node in self._known.items())
        return {name: PeerNode(node, net) for name, node, net in networks if net is not None}
