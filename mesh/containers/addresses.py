"""Which addresses of the node's subnets its containers hold.

Owns one directory: a file per claimed IPv4 address, named by it, and the cursor of the last one
given.  IPv4 and IPv6 share the host number.  A claim whose owner died is free again; never takes
one from a process that lives.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.errors import Conflict, MeshError
from mesh.model import address
from mesh.model.address import Family

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from mesh.model.cluster import NodeNetwork

FIRST_HOST: Final = 2
"""Number 0 is the subnet itself and 1 its gateway, the bridge."""

_LOCK: Final = ".lock"
"""Its content is the cursor."""


class Owner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who holds a claim: a task, and the process whose life ends the claim.

    `started` tells a process from a later one with the same number, also across a reboot.
    """

    task: str
    pid: int
    started: str


def hosts(subnet: str) -> range:
    """The host numbers containers may have in an IPv4 subnet, without its broadcast address."""
    return range(FIRST_HOST, (1 << (32 - address.prefix_length(subnet))) - 1)


def choose(numbers: range, taken: Container[int], last: int) -> int | None:
    """The next free number after `last`, in a circle; None if all are taken.

    Next-fit, so that a freed address rests as long as possible: peers may still have
    connections, conntrack entries or DNS answers that name it.
    """
    start = numbers.index(last) + 1 if last in numbers else 0
    circle = chain(numbers[start:], numbers[:start])
    return next((number for number in circle if number not in taken), None)


def this_process(task: str) -> Owner:
    """The owner that `task` is for as long as the calling process lives."""
    pid = os.getpid()
    started = _started(pid)
    if started is None:
        raise MeshError("/proc does not show this process: mount it for this PID namespace")
    return Owner(task=task, pid=pid, started=started)


def claim(directory: Path, network: NodeNetwork, owner: Owner) -> tuple[str, ...]:
    """Addresses for a task, one per family, held until `release` or the owner's death.

    Raises Conflict if the task holds some already, MeshError if the subnet is full.
    """
    with _locked(directory) as lock:
        held = _living(directory)
        for other in held.values():
            if other.task == owner.task:
                raise Conflict(
                    f"task {owner.task} already runs on this node (process {other.pid}): "
                    "stop it, or choose another --id"
                )
        number = _next_number(network.subnet(Family.V4), held, _read_cursor(lock))
        chosen = tuple(address.nth(network.subnet(family), number) for family in address.FAMILIES)
        _write_claim(directory / chosen[0], owner)
        _write_cursor(lock, number)
    return chosen


def release(directory: Path, addresses: tuple[str, ...], owner: Owner) -> None:
    """Give the addresses of a claim back; nothing happens if they are no longer the owner's."""
    with _locked(directory):
        path = directory / addresses[0]
        if _read_claim(path) == owner:
            path.unlink()


def claims(directory: Path) -> dict[str, Owner]:
    """Every living claim by its IPv4 address; those of the dead are removed."""
    with _locked(directory):
        return _living(directory)


def _next_number(subnet: str, held: dict[str, Owner], last: int) -> int:
    base = int.from_bytes(address.packed(subnet.partition("/")[0]))
    taken = {int.from_bytes(address.packed(one)) - base for one in held}
    number = choose(hosts(subnet), taken, last)
    if number is None:
        raise MeshError(
            f"{subnet} is full: containers of this node hold all {len(hosts(subnet))} addresses; "
            "stop some, or start this one on another node"
        )
    return number


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """The directory's lock file, locked: other processes of this node wait."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _living(directory: Path) -> dict[str, Owner]:
    held = {}
    for path in sorted(directory.iterdir()):
        if path.name == _LOCK:
            continue
        owner = _read_claim(path)
        if owner is not None and _started(owner.pid) == owner.started:
            held[path.name] = owner
        else:
            path.unlink()
    return held


def _read_claim(path: Path) -> Owner | None:
    """None also for a half-written file: under the lock, only a crash leaves one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Owner)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write_claim(path: Path, owner: Owner) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, msgspec.json.encode(owner))
    finally:
        os.close(file)


def _read_cursor(lock: int) -> int:
    """The last number given; 0, before all others, if none is readable."""
    text = os.pread(lock, 16, 0)
    return int(text) if text.isdigit() else 0


def _write_cursor(lock: int, number: int) -> None:
    text = str(number).encode()
    os.pwrite(lock, text, 0)
    os.ftruncate(lock, len(text))


def _started(pid: int) -> str | None:
    """What no other process shares with a living `pid`: the boot and its start, in clock ticks.

    None if there is no such process, or only its zombie (proc(5), /proc/pid/stat).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may hold anything.
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{fields[19]}"
