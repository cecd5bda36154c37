"""The texts of the `wg` program: what it is given and what it prints.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.wg.plan import Peer, Session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.delta import Delta


@dataclass(frozen=True, slots=True)
class Interface:
    """A WireGuard device as it is: no key yet means `public_key` None, no port yet 0."""

    public_key: str | None
    port: int
    peers: dict[str, Peer]
    sessions: dict[str, Session]

    def live(self, now: float) -> frozenset[str]:
        """The peers with a living session; `now` in seconds since the epoch."""
        return frozenset(key for key, session in self.sessions.items() if session.is_live(now))


def render(private_key: str, port: int, peers: Mapping[str, Peer]) -> str:
    """The whole configuration, for `wg syncconf`.  It holds the secret."""
    lines = ["[Interface]", f"PrivateKey = {private_key}", f"ListenPort = {port}"]
    for key, peer in peers.items():
        lines += ["[Peer]", f"PublicKey = {key}", f"AllowedIPs = {', '.join(peer.allowed)}"]
        lines.append(f"PersistentKeepalive = {peer.keepalive}")
        if peer.endpoint is not None:
            lines.append(f"Endpoint = {peer.endpoint}")
    return "\n".join(lines) + "\n"


def arguments(delta: Delta[str, Peer]) -> list[str]:
    """What follows `wg set DEVICE` to make the change in one go.

    Removals come first, as an address given to one peer is silently taken from another.  Of a peer
    that stays only what differs is named: to set the same addresses again would lose packets.
    """
    words: list[str] = []
    for key in delta.remove:
        if key not in delta.add:
            words += ["peer", key, "remove"]
    for key, peer in delta.add.items():
        before = delta.remove.get(key)
        words += ["peer", key]
        if peer.endpoint is not None and (before is None or before.endpoint != peer.endpoint):
            words += ["endpoint", peer.endpoint]
        if before is None or before.keepalive != peer.keepalive:
            words += ["persistent-keepalive", str(peer.keepalive)]
        if before is None or before.allowed != peer.allowed:
            words += ["allowed-ips", ",".join(peer.allowed)]
    return words


def parse_fwmarks(shown: str) -> dict[str, int]:
    """The devices that mark their packets, in what `wg show all fwmark` printed."""
    marked = (line.split("\t") for line in shown.splitlines())
    return {device: int(mark, 16) for device, mark in marked if mark != "off"}


def parse(dump: str) -> Interface:
    """What `wg show DEVICE dump` printed; its private key is left behind."""
    first, *rest = dump.splitlines()
    _, public, port, _ = first.split("\t")
    peers: dict[str, Peer] = {}
    sessions: dict[str, Session] = {}
    for line in rest:
        key, _, endpoint, allowed, handshake, received, sent, keepalive = line.split("\t")
        peers[key] = Peer(
            endpoint=None if endpoint == "(none)" else endpoint,
            allowed=() if allowed == "(none)" else tuple(sorted(allowed.split(","))),
            keepalive=0 if keepalive == "off" else int(keepalive),
        )
        sessions[key] = Session(int(handshake), int(received), int(sent))
    return Interface(None if public == "(none)" else public, int(port), peers, sessions)
