"""One agent per state directory: the lock that an agent, or its removal, holds.

The kernel drops it with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mesh.errors import HostNotReady

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def held(state_dir: Path) -> Iterator[None]:
    """Hold the state directory's lock.  Raises HostNotReady if another agent has it."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostNotReady(
            f"state_dir {state_dir}: {error.strerror}; run as root or choose another state_dir"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostNotReady(
                f"another agent runs with state_dir {state_dir}: stop it first"
            ) from None
        yield
    finally:
        os.close(descriptor)
