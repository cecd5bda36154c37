"""Whom drivers tell what they had the kernel do: each program run, each transaction sent.

The observer belongs to a context: whoever looks after drivers sets it around them, and every task
and thread begun there has it.  Nobody listens otherwise.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Observer = Callable[[str, bool], None]

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Have `observer` told of what is done in a block: by which program ("netlink": none), and
    whether it failed.  It may be called in any thread.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def tell(program: str, *, failed: bool) -> None:
    """Something was done, or refused."""
    observer = _observer.get()
    if observer is not None:
        observer(program, failed)
