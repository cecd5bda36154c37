"""The system calls a lab needs and Python 3.11 does not have: mount(2), prctl(2), pidfd ioctls.

Each is a thin call that raises OSError; none decides anything.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import os
import signal
import struct
from pathlib import Path
from typing import Final

MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18

CLONE_NEWUTS: Final = 0x04000000

_PR_SET_PDEATHSIG: Final = 1

_PIDFD_GET_INFO: Final = 0xC040FF0B
"""_IOWR(0xFF, 11, struct pidfd_info), its first published size of 64 bytes (linux/pidfd.h)."""
_PIDFD_INFO: Final = struct.Struct("=QQ11Ii")
"""mask, cgroupid, eleven ids, exit_code."""
_PIDFD_INFO_EXIT: Final = 1 << 3
"""Linux 6.15: the wait status of a process that has been reaped."""

_libc = ctypes.CDLL(None, use_errno=True)


class Ending(enum.Enum):
    """What is known of how a process ended."""

    EXITED = "exited"
    KILLED = "killed"
    UNDECIDED = "undecided"
    """It runs, or is a zombie whose status this user may not see."""
    HIDDEN = "hidden"
    """It is gone, and this kernel does not tell how."""


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system, or change a mount.  Raises OSError naming the target."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {os.strerror(number)}", target)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when the thread that forked it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def ending(pidfd: int, pid: int) -> Ending:
    """How the process behind `pidfd` ended, by the kernel's record or else by its zombie's."""
    found = _recorded(pidfd) or _zombie(pid)
    # It may have been buried between the two questions.
    return (_recorded(pidfd) or found) if found is Ending.HIDDEN else found


def _recorded(pidfd: int) -> Ending | None:
    """None before the burial, and on a kernel that keeps no record."""
    record = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(record, 0, _PIDFD_INFO_EXIT, *([0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, record)
    except OSError:
        return None  # before Linux 6.13, or gone before 6.15
    fields = _PIDFD_INFO.unpack(record)
    return _verdict(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None


def _zombie(pid: int) -> Ending:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return Ending.HIDDEN
    # proc(5): field 52 reads 0 also for those who may not see it.
    status = int(fields[-1])
    if fields[0] == "Z" and status:
        return _verdict(status)
    return Ending.UNDECIDED


def _verdict(status: int) -> Ending:
    return Ending.KILLED if os.WIFSIGNALED(status) else Ending.EXITED
