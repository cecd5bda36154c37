"""A service's health check: how a task proves that it may be given new connections.

Says what is asked for and what is allowed; who probes and judges is mesh.health.
"""

from __future__ import annotations

import enum
import re
from typing import Final

import msgspec

from mesh.model.names import parse_duration
from mesh.model.publish import PORTS

SHORTEST_INTERVAL: Final = 0.1
"""Seconds: a thousand tasks probed more often would cost a node more than their work does."""

SHORTEST_TIMEOUT: Final = 0.001

LONGEST: Final = 3600.0
"""Seconds of any of a check's times."""

MOST_IN_A_ROW: Final = 100
"""The largest `rise` and `fall`."""

_STATUS: Final = re.compile(r"[1-5]\d\d(-[1-5]\d\d)?(,[1-5]\d\d(-[1-5]\d\d)?)*")
_PATH: Final = re.compile(r"/[\x21-\x7e]{0,1023}")
_HOST: Final = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
_MOST_WORDS: Final = 64
_LONGEST_WORD: Final = 4096


class CheckType(enum.Enum):
    """What is tried: nothing, a connection, a request, a command in the task's namespace."""

    NONE = "none"
    TCP = "tcp"
    HTTP = "http"
    EXEC = "exec"


class Scheme(enum.Enum):
    """Whether a request goes over TLS."""

    HTTP = "http"
    HTTPS = "https"


class Fallback(enum.Enum):
    """Who gets new connections while no running task of the service is healthy."""

    REFUSE = "refuse"
    ANY = "any"


class HealthCheck(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """What is tried, how often, and what follows.

    `port` None: the service's first target port over TCP.  `status` are the statuses that pass,
    "200-399" or "200,204"; 3xx are not followed.  `host` is the Host header and the name in TLS,
    None: the task's address.  `verify` False: any certificate will do.  `command` is executed as
    it is, by no shell.  Times are durations: `start_period` is how long failures of a task that
    was never healthy do not count.
    """

    type: CheckType = CheckType.NONE
    port: int | None = None
    path: str = "/"
    scheme: Scheme = Scheme.HTTP
    host: str | None = None
    status: str = "200-399"
    verify: bool = True
    command: tuple[str, ...] = ()
    interval: str = "5s"
    timeout: str = "2s"
    rise: int = 2
    fall: int = 3
    start_period: str = "0s"
    fallback: Fallback = Fallback.REFUSE

    def __post_init__(self) -> None:
        self._check_pace()
        if self.port is not None and self.port not in PORTS:
            raise ValueError(f"health port {self.port} is not in 1-65535")
        if not _PATH.fullmatch(self.path):
            raise ValueError(
                f"health path {self.path!r} must start with '/' and have neither spaces nor "
                "anything beyond ASCII"
            )
        if self.host is not None and not _HOST.fullmatch(self.host):
            raise ValueError(f"health host {self.host!r} is not a host name or address")
        statuses(self.status)
        if (self.type is CheckType.EXEC) != bool(self.command):
            raise ValueError("health type exec and a command go together")
        if len(self.command) > _MOST_WORDS or any(map(_is_odd, self.command)):
            raise ValueError(
                f"a health command has at most {_MOST_WORDS} words, each of at most "
                f"{_LONGEST_WORD} characters without NUL"
            )

    def _check_pace(self) -> None:
        for name, text, shortest in (
            ("interval", self.interval, SHORTEST_INTERVAL),
            ("timeout", self.timeout, SHORTEST_TIMEOUT),
            ("startPeriod", self.start_period, 0.0),
        ):
            try:
                seconds = parse_duration(text)
            except ValueError as error:
                raise ValueError(f"health {name} {error}") from None
            if not shortest <= seconds <= LONGEST:
                raise ValueError(f"health {name} {text!r} is not in {shortest:g}s-{LONGEST:g}s")
        for name, count in (("rise", self.rise), ("fall", self.fall)):
            if not 1 <= count <= MOST_IN_A_ROW:
                raise ValueError(f"health {name} {count} is not in 1-{MOST_IN_A_ROW}")


def _is_odd(word: str) -> bool:
    return "\0" in word or len(word) > _LONGEST_WORD


def statuses(text: str) -> tuple[range, ...]:
    """The ranges of HTTP statuses in a text such as "200-399" or "200,204".  Raises ValueError."""
    if not _STATUS.fullmatch(text):
        raise ValueError(f"health status {text!r}: write it like 200, 200-399 or 200,204")
    found = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found.append(range(int(low), int(high or low) + 1))
        if not found[-1]:
            raise ValueError(f"health status {part!r} is an empty range")
    return tuple(found)
