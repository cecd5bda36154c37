"""What agents and the controller report back: what is in force, and what is wrong."""

from __future__ import annotations

import msgspec


class Problem(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One thing an operator should know: what it is about, and one line that says what to do."""

    about: str
    message: str


class Status(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What the controller has to say about a service or a node; no record: nothing is wrong."""

    problems: tuple[Problem, ...]


class Applied(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The etcd revision a node's kernel has, with what drives it and why it is that."""

    revision: int
    backend: str
    version: str
    reason: str = ""
    problems: tuple[Problem, ...] = ()


class Health(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Whether a task answered its checks."""

    service: str
    healthy: bool
    reason: str = ""
