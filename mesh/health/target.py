"""What a check comes to for one task: where and how it is probed.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec import UNSET

from mesh.model.health import CheckType, Scheme, statuses
from mesh.model.publish import bracketed

if TYPE_CHECKING:
    from mesh.model.service import ServiceSpec
    from mesh.model.task import Task


class Tcp(NamedTuple):
    """A connection is made."""

    address: str
    port: int


class Http(NamedTuple):
    """A request is answered with one of some statuses; `verify`: its certificate is good."""

    address: str
    port: int
    path: str
    host: str
    passing: tuple[range, ...]
    tls: bool
    verify: bool

    @property
    def name(self) -> str:
        """What a certificate must be for."""
        name, colon, port = self.host.rpartition(":")
        return (name if colon and port.isdigit() else self.host).strip("[]")


class Exec(NamedTuple):
    """A command ends with 0.  It finds `environment`, and nothing else of its starter's."""

    address: str
    netns: str | None
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


Target = Tcp | Http | Exec


def of(spec: ServiceSpec, task: Task) -> Target | None:
    """How a task is probed, at the first of its addresses; None if it need not be."""
    check, address = spec.check, task.addresses[0]
    if check is None:
        return None
    if check.type is CheckType.EXEC:
        named = {"TASK": task.id, "SERVICE": task.service, "NODE": task.node, "ADDRESS": address}
        environment = tuple((f"MESH_{name}", value) for name, value in named.items())
        netns = None if task.netns is UNSET else task.netns
        return Exec(address, netns, check.command, environment)
    port = spec.checked_port
    assert port is not None  # the record would not have been read
    if check.type is CheckType.TCP:
        return Tcp(address, port)
    tls = check.scheme is Scheme.HTTPS
    host = check.host
    if host is None:
        usual = port == (443 if tls else 80)
        host = bracketed(address) if usual else f"{bracketed(address)}:{port}"
    passing = statuses(check.status)
    return Http(address, port, check.path, host, passing, tls, check.verify)
