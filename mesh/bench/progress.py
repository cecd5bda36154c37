"""What is being done, on stderr: one line that is written over on a terminal, else a line each."""

from __future__ import annotations

import sys


def tell(what: str) -> None:
    """Say what begins now; nothing: that all is done."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what} …" if what else "\r\033[K")
    elif what:
        sys.stderr.write(f"mesh: {what} …\n")
    sys.stderr.flush()
