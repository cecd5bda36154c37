"""What agents and the controller report back: what is in force, and what is wrong."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One thing an operator should know: what it is about, and one line that says what to do."""

    about: str
    message: str

    @property
    def is_of_record(self) -> bool:
        """Whether it is about a record: all nodes have it, or none can help it."""
        return self.about.startswith(("/", "service ", "task ", "node "))


class Status(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the controller has to say about a service or a node; no record: nothing is wrong."""

    problems: tuple[Problem, ...]


class Healed(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One healing: when (UTC, RFC 3339), what had been done, and by which program and process."""

    at: str
    what: str
    by: str


class Healings(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How often a node put right what others changed, since its agent began; one healing may
    count as several kinds: elements, the program, lines in the host's own firewall.
    """

    total: int = 0
    elements: int = 0
    program: int = 0
    firewall: int = 0
    last: Healed | None = None


class Connections(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """How many connections to a draining task are left of those that a node translates."""

    service: str
    task: str
    count: int


class Drained(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Which connections to draining tasks a node has left, when its kernel had `revision`."""

    revision: int = 0
    left: tuple[Connections, ...] = ()


class Peer(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Another node as a node sees it over the overlay.

    `reach` is "reachable", "unreachable", or "unknown" if it never answers a probe; `left_out`:
    its tasks get no connections from there.  `rtt`, `since`, `heard` (its last answer) and
    `handshake` (WireGuard's last) are in seconds, the last three ago; None: none yet.
    """

    name: str
    reach: str
    since: float
    left_out: bool = False
    rtt: float | None = None
    heard: float | None = None
    endpoint: str | None = None
    handshake: float | None = None
    received: int = 0
    sent: int = 0


class Peers(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a node's agent answers when it is asked for the other nodes."""

    node: str
    peers: tuple[Peer, ...]


class Applied(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The etcd revision a node's kernel has, with what drives it and why it is that.

    `healings` lag behind by some seconds: a struggle with another program must not flood etcd.
    `unreachable` are the nodes that this one leaves out of its pools because it cannot reach them:
    its own view, on which nobody else acts.
    """

    revision: int
    backend: str
    version: str
    reason: str = ""
    problems: tuple[Problem, ...] = ()
    healings: Healings = Healings()
    drained: Drained = Drained()
    unreachable: tuple[str, ...] = ()

    @property
    def is_degraded(self) -> bool:
        """Whether a problem is the node's own, not that of a record that it was given."""
        return any(not each.is_of_record for each in self.problems)


class Health(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Whether a task passes its service's check, as its node sees it.

    `starting`: not healthy yet, and nothing is wrong with that so far.  `since` (UTC, RFC 3339) is
    when that became so, `reason` why it is not healthy, `address` what was probed: the verdict is
    about no other task of that name.
    """

    service: str
    healthy: bool
    starting: bool = False
    address: str = ""
    reason: str = ""
    since: str = ""
