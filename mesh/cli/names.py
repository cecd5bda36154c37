"""Addresses by the names that etcd knows, for verbs that take either.

Reads a State only; without one (a dump) nothing has a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh import errors
from mesh.model import address

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.agent.state import State
    from mesh.model.address import Family


class Names:
    """Who has which address."""

    def __init__(self, state: State | None) -> None:
        self._state = state

    def source(self, text: str, family: Family) -> str:
        """An address, or that of a task or a node.  Raises NotFound."""
        return _address(text, family, (*self._task(text), *self._node(text)), "task or node")

    def destination(self, text: str, family: Family) -> str:
        """An address, or the VIP of a service, or a node's address.  Raises NotFound."""
        return _address(text, family, (*self._vips(text), *self._node(text)), "service or node")

    def steering(self, node: str) -> str:
        """The MAC address of a node's steering device.  Raises NotFound."""
        network = self._state.nodes.network(node) if self._state is not None else None
        if network is None:
            raise errors.NotFound(f"no node {node!r} that has a number: see `mesh node ls`")
        return network.mac

    def _node(self, name: str) -> tuple[str, ...]:
        peer = self._state.peers().get(name) if self._state is not None else None
        return peer.node.addresses if peer is not None else ()

    def _vips(self, name: str) -> tuple[str, ...]:
        view = self._state.service_view(name) if self._state is not None else None
        return view.vips if view is not None else ()

    def _task(self, name: str) -> Iterable[str]:
        if self._state is None:
            return
        for service in sorted(self._state.services()):
            view = self._state.service_view(service)
            for task in view.tasks if view is not None else ():
                if name in (task.id, f"{service}/{task.id}"):
                    yield from task.addresses


def _address(text: str, family: Family, named: Iterable[str], kinds: str) -> str:
    try:
        return address.parse_address(text)
    except ValueError:
        pass
    found = next((a for a in named if address.family_of(a) is family), None)
    if found is None:
        raise errors.NotFound(
            f"{text!r} is neither an address nor a {kinds} with an IPv{family.suffix} address"
        )
    return found
