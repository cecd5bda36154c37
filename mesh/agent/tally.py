"""What happened since the agent began, counted where it happens.  Pure, mutable.

Knows numbers, never the names they are shown under (metrics).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mesh.dataplane.protocol import ElementDelta
    from mesh.model.report import Problem

BOUNDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Seconds: from what one replica takes to what ten thousand services take to start."""

_OF_RULES: Final = ("iptables", "ip6tables", "ipset", "nft", "netlink")
_OF_SERVICES: Final = ("service ", "task ")


class Durations:
    """How often something took how long, in seconds."""

    def __init__(self) -> None:
        self.total = 0.0
        self._counts = [0] * (len(BOUNDS) + 1)

    def add(self, seconds: float) -> None:
        """It took so long."""
        self.total += seconds
        self._counts[bisect_left(BOUNDS, seconds)] += 1

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Of each bound in turn, how many took no longer; "+Inf" last."""
        count = 0
        for bound, more in zip((*BOUNDS, "+Inf"), self._counts, strict=True):
            count += more
            yield str(bound), count


class Tally:
    """The counts of one agent."""

    def __init__(self) -> None:
        self.publishing = Durations()
        """From hearing of a change of services until the kernel had it."""
        self.reconciling = Durations()
        """From planning until the kernel had it."""
        self.publish_errors: Counter[str] = Counter({"kernel": 0, "refused": 0, "controller": 0})
        self.unpublish_errors: Counter[str] = Counter({"kernel": 0, "conntrack": 0})
        self.elements: Counter[str] = Counter({"added": 0, "removed": 0})
        self.peer_changes: Counter[tuple[str, str]] = Counter()
        """How often what is held of a node became what, by both."""
        self.commands: Counter[str] = Counter()
        self.command_errors: Counter[str] = Counter()
        self._running = threading.Lock()
        self._refusals: frozenset[Problem] = frozenset()

    def ran(self, program: str, failed: bool) -> None:
        """A program was run, or a transaction sent; in any thread."""
        name = program.rpartition("/")[2]
        if name.startswith(_OF_RULES):
            with self._running:
                self.commands[name] += 1
                self.command_errors[name] += failed

    def written(self, delta: ElementDelta) -> None:
        """The kernel took a change."""
        self.elements["added"] += len(delta.add)
        self.elements["removed"] += len(delta.remove)

    def not_written(self, delta: ElementDelta) -> None:
        """The kernel refused a change.  It is tried again, in parts."""
        errors = self.publish_errors if delta.add else self.unpublish_errors
        errors["kernel"] += 1

    def refused(self, problems: Iterable[Problem]) -> tuple[Problem, ...]:
        """All problems there are now, passed on; those of services that are new count."""
        found = tuple(problems)
        refusals = frozenset(each for each in found if each.about.startswith(_OF_SERVICES))
        self.publish_errors["refused"] += len(refusals - self._refusals)
        self._refusals = refusals
        return found

    def not_allocated(self, services: int) -> None:
        """The controller, which is here now, had to refuse services something."""
        self.publish_errors["controller"] += services

    def not_forgotten(self) -> None:
        """Flows that nothing serves could not be deleted.  It is tried again."""
        self.unpublish_errors["conntrack"] += 1
