"""Keeps ports out of what the kernel lends to the host's own connections.

Owns net.ipv4.ip_local_reserved_ports as far as an agent added to it: what was added is noted in a
file first, and taken out again by `give_back`.  Held ports need none of this; it is for the time
between two agents.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.model import spans

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED: Final = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_NOTE: Final = "reserved-ports"
_NONE: Final = range(0)


def lent() -> range:
    """The ports that connections of the host are lent; none where the kernel does not tell."""
    try:
        low, high = map(int, _RANGE.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return _NONE
    return range(low, high + 1)


def reserve(wanted: Iterable[range], state_dir: Path) -> None:
    """Add what of `wanted` the kernel would lend; what others reserved stays."""
    low, high = lent().start, lent().stop
    ours = {n for each in wanted for n in range(max(each.start, low), min(each.stop, high))}
    noted, now = _noted(state_dir), _reserved()
    if now is None or (ours <= now and noted & now <= ours):
        return
    others = now - noted
    added = ours - others
    note = state_dir / _NOTE
    try:
        note.write_text(f"{_boot()} {spans.shown(added | noted)}\n", encoding="ascii")
        _write(others | added)
        note.write_text(f"{_boot()} {spans.shown(added)}\n", encoding="ascii")
    except OSError as error:
        log.warning("ports %s are not reserved: %s", spans.shown(added), error.strerror)
        return
    log.info("reserved ports=%s", spans.shown(added) or "none")


def give_back(state_dir: Path) -> None:
    """Take out what was added."""
    noted, now = _noted(state_dir), _reserved()
    if noted and now is not None:
        try:
            _write(now - noted)
        except OSError as error:
            log.warning("ports %s stay reserved: %s", spans.shown(noted), error.strerror)
            return
    (state_dir / _NOTE).unlink(missing_ok=True)


def _noted(state_dir: Path) -> set[int]:
    """What was added since the host was started: before that, it is gone with the rest."""
    try:
        boot, _, text = (state_dir / _NOTE).read_text(encoding="ascii").partition(" ")
        return spans.parsed(text) if boot == _boot() else set()
    except (OSError, ValueError):
        return set()


def _reserved() -> set[int] | None:
    try:
        return spans.parsed(_RESERVED.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _write(ports: set[int]) -> None:
    with _RESERVED.open("r+", encoding="ascii") as file:
        file.write(f"{spans.shown(ports)}\n")


def _boot() -> str:
    """The name of this start of the host, and of the network namespace in it."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    return f"{_BOOT.read_text(encoding='ascii').strip()}-{namespace}"
