"""Every error a user can meet, each with the exit code the command line gives it.

A message is one line: what is wrong, where, and what to do.  Never raises, never logs.
"""

_LONGEST = 300
"""Characters that are quoted of a record, which anybody may have written; etcd takes 1.5 MB."""


def clipped(text: str) -> str:
    """`text`, or the beginning of one that nobody could read."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class MeshError(Exception):
    """The root of all expected failures; `exit_code` is what the command line returns."""

    exit_code = 1


class BadUsage(MeshError):
    """A value given by the user is malformed."""

    exit_code = 2


class NotFound(MeshError):
    """The named thing does not exist."""

    exit_code = 3


class Conflict(MeshError):
    """Somebody else owns the name, port or address."""

    exit_code = 4


class InvalidRecord(MeshError):
    """A record that cannot be read: `key` is its etcd key, `reason` names field and remedy."""

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        self.reason = clipped(reason)
        super().__init__(f"{clipped(key)}: {self.reason}")


class StoreUnavailable(MeshError):
    """No etcd endpoint answers, or it refuses this client."""


class CommandFailed(MeshError):
    """A program the drivers call ended with an error, or is not installed."""


class ApplyFailed(MeshError):
    """The kernel refused a change; nothing of it was applied."""


class HostNotReady(MeshError):
    """This machine lacks a tool, a right or a free port that the mesh needs."""
