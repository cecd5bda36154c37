"""What was healed on this node, by whom it was broken, and who breaks it over and over.

Counts and remembers.  Pure, mutable: times are seconds since the epoch, given by the caller.
"""

from __future__ import annotations

from collections import Counter, deque
from datetime import UTC, datetime
from typing import Final, NamedTuple

from mesh.model.report import Healed, Healings, Problem

WINDOW: Final = 600.0
"""Seconds after which a healing does not count as part of a struggle any more."""

_STRUGGLE: Final = 5
"""Healings within the window, made necessary by one program, that are no accident."""

_QUIET_AFTER: Final = 10
_EVERY: Final = 10
"""After so many healings within the window, only one in so many is logged."""

SOMEBODY: Final = "somebody"


class Repair(NamedTuple):
    """How much was put right at once: elements, the program, lines in other people's firewalls."""

    elements: int = 0
    program: bool = False
    lines: int = 0

    def __bool__(self) -> bool:
        return self.program or self.elements + self.lines > 0

    def __or__(self, other: Repair) -> Repair:
        return Repair(
            self.elements + other.elements,
            self.program or other.program,
            self.lines + other.lines,
        )


class _Entry(NamedTuple):
    at: float
    what: str
    by: str


class History:
    """All healings since the agent began."""

    def __init__(self) -> None:
        self._total = 0
        self._kinds: Counter[str] = Counter()
        self._last: Healed | None = None
        self._recent: deque[_Entry] = deque(maxlen=1000)

    def add(self, now: float, repair: Repair, what: str, by: str) -> bool:
        """Count one healing; whether it is to be logged."""
        by = by or SOMEBODY
        self._total += 1
        self._kinds["elements"] += repair.elements > 0
        self._kinds["program"] += repair.program
        self._kinds["firewall"] += repair.lines > 0
        at = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        self._last = Healed(at=at.replace("+00:00", "Z"), what=what, by=by)
        self._recent.append(_Entry(now, what, by))
        recent = len(self._since(now))
        return recent <= _QUIET_AFTER or recent % _EVERY == 0

    def report(self) -> Healings:
        """All of it, for others to read."""
        return Healings(
            total=self._total,
            elements=self._kinds["elements"],
            program=self._kinds["program"],
            firewall=self._kinds["firewall"],
            last=self._last,
        )

    def problem(self, now: float) -> Problem | None:
        """Who struggles with the agent, if anybody does."""
        recent = self._since(now)
        programs = Counter(_program(entry.by) for entry in recent)
        for program, times in programs.most_common(1):
            if times >= _STRUGGLE:
                last = next(e for e in reversed(recent) if _program(e.by) == program)
                message = (
                    f"{last.by} keeps changing what is the mesh's (last: {last.what}): healed "
                    f"{times} times within {WINDOW / 60:.0f} minutes; find what runs it, and stop "
                    "that"
                )
                return Problem(about="healing", message=message)
        return None

    def _since(self, now: float) -> list[_Entry]:
        """Healings within the window."""
        return [entry for entry in self._recent if entry.at > now - WINDOW]


def _program(by: str) -> str:
    """Its name: each time it runs it has another process id."""
    return by.partition("(")[0]
