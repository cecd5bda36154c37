"""What every rule driver can do.  Drivers apply; they never decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.delta import Delta
    from mesh.model.report import Problem
    from mesh.rules.elements import ElementKey, Elements

    ElementDelta = Delta[ElementKey, bytes]


class Examined(NamedTuple):
    """What a backend holds, whole or damaged.

    `loaded` is how its program is recognised and `wanted` how this version's would be, by what
    tells it; `differences` is all that is not as the driver left it, but for elements.
    """

    elements: Elements
    loaded: Mapping[str, str | None]
    wanted: Mapping[str, str]
    differences: tuple[Problem, ...]


class Tampering(NamedTuple):
    """What somebody else may have done to what is ours, as far as it is known, and by whom:
    program and process id, or empty.  `elements`: these may differ and nothing else; None: all may.
    """

    what: str
    by: str
    elements: frozenset[ElementKey] | None = None


class Driver(Protocol):
    """A rule backend: nftables, iptables or memory."""

    name: str

    chunk: int
    """How many services one transaction takes best when there are thousands to write."""

    @property
    def port(self) -> int:
        """The netlink port id of the driver's own changes; 0 if it makes none by netlink."""
        ...

    async def prepare(self) -> bool:
        """Make the static program exist: load it, upgrade it in place, or adopt it as it is.

        Packets meet one that was not there before once it is attached.  Whether it had to be
        loaded.
        """
        ...

    async def attach(self) -> None:
        """Lead packets through the program, which is complete now; nothing if they go there."""
        ...

    async def read(self) -> Elements:
        """Every element the backend holds now."""
        ...

    async def read_some(self, keys: Iterable[ElementKey]) -> Elements:
        """Those of some elements that the backend holds now."""
        ...

    async def examine(self) -> Examined:
        """What the backend holds, also if it is damaged.  Raises NotFound if there is nothing."""
        ...

    async def apply(self, delta: ElementDelta) -> None:
        """Apply a change, all or nothing.  Raises ApplyFailed with the culprit element."""
        ...

    async def tampered(self, settle: float) -> Tampering:
        """Wait until somebody else may have changed what is ours, then `settle` seconds: changes
        come in bursts.
        """
        ...

    async def surplus(self) -> dict[int, int]:
        """How many connections were refused that were one too many for their client, by frontend
        id; counted since that has a limit, or since somebody last wrote its rules.
        """
        ...

    def problems(self) -> tuple[Problem, ...]:
        """What this host cannot do."""
        ...

    async def remove(self) -> None:
        """Delete everything this driver owns, and nothing else."""
        ...

    def close(self) -> None:
        """Release sockets; the kernel keeps forwarding."""
        ...
