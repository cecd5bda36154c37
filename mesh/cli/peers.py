"""What the agent of this very host sees of the other nodes: it is asked, and nobody else knows.

Only its own view is told to etcd as a result; round-trip times and bytes change all the time.
"""

from __future__ import annotations

import http.client
import socket
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.cli import options, output
from mesh.model.node import split_endpoint
from mesh.model.report import Peers

if TYPE_CHECKING:
    from mesh.agent.config import AdminConfig
    from mesh.cli.world import World
    from mesh.model.report import Peer

_PATIENCE: Final = 2.0

COLUMNS: Final = ("PEER", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT", "RTT", "HEARD", "REACH")

_NEW: Final = 135.0
"""Seconds: WireGuard shakes hands anew every 120 while something is sent."""

_DEAD: Final = 180.0
"""Seconds after which a session carries nothing."""

_RECENT: Final = 2.0
"""Seconds: a node that is well answers a few times in each."""


class _Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect to the path instead of the host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_PATIENCE)
        self.sock.connect(self._path)


def read() -> Peers | None:
    """The peers of the node that this host is; None if it is none, or its agent does not say."""
    known = options.readable_config()
    if known is None or not known.admin.listen:
        return None
    try:
        told = msgspec.json.decode(_asked(known.admin), type=Peers)
    except (OSError, http.client.HTTPException, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return told if told.node == known.node else None  # somebody else may listen there


def _asked(admin: AdminConfig) -> bytes:
    if admin.path is not None:
        connection: http.client.HTTPConnection = _Unix(admin.path)
    else:
        host, port = split_endpoint(admin.listen)
        connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE)
    try:
        connection.request("GET", "/peers")
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise http.client.HTTPException(answer.reason)
    return body


def of(told: Peers | None, name: str) -> Peer | None:
    """What is told of one node."""
    return next((peer for peer in told.peers if peer.name == name), None) if told else None


def unreached_by(seen: World, name: str) -> list[str]:
    """The live nodes that leave a node out because they cannot reach it, as they report."""
    reports = seen.applied.items()
    return sorted(node for node, told in reports if node in seen.alive and name in told.unreachable)


def show(told: Peers | None) -> None:
    """Print the peers as a table, if this host has any."""
    if told is None or not told.peers:
        return
    from mesh.cli import world

    output.line("")
    output.line(f"as {told.node} reaches them")
    each = sorted(told.peers, key=lambda peer: world.natural(peer.name))
    output.table(COLUMNS, [_row(peer) for peer in each])


def _row(peer: Peer) -> list[output.Cell]:
    return [
        peer.name,
        peer.endpoint or "-",
        _aged(peer.handshake, _NEW, _DEAD),
        _bytes(peer.received),
        _bytes(peer.sent),
        f"{peer.rtt * 1000:.1f} ms" if peer.rtt is not None else "-",
        _aged(peer.heard, _RECENT, 5 * _RECENT),
        _reach(peer),
    ]


def _aged(seconds: float | None, new: float, old: float) -> output.Cell:
    """How long ago something was, in the colour of its age."""
    if seconds is None:
        return output.Styled("never", "red")
    colour = "green" if seconds < new else "yellow" if seconds < old else "red"
    return output.Styled(f"{output.lasted(seconds)} ago", colour)


def _reach(peer: Peer) -> output.Cell:
    text = f"{peer.reach} {output.lasted(peer.since)}"
    if peer.left_out:
        return output.Styled(f"{text}, left out", "red")
    colours = {"reachable": "green", "unreachable": "red"}
    return output.Styled(text, colours.get(peer.reach, "yellow"))


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
