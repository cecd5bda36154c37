"""Linux namespaces: entering and leaving them from a thread.

Owns the two system calls (setns(2), unshare(2)), which Python 3.11 does not have.  Never holds a
namespace open beyond the block that entered it.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces of the kinds in `flags`.  Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int = 0) -> None:
    """Move the calling thread into an existing namespace.  Raises OSError."""
    _check(_libc.setns(descriptor, kind), "setns")


@contextmanager
def entered(path: str) -> Iterator[None]:
    """Run the block in the network namespace at `path`; the thread returns to its own after it.

    Sockets made within stay in that namespace; processes started within are born there.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(there, CLONE_NEWNET)
        finally:
            os.close(there)
        try:
            yield
        finally:
            setns(before, CLONE_NEWNET)
    finally:
        os.close(before)
