"""The short form of a health check: `tcp`, `http:8081/healthz`, `exec:COMMAND …`.  Pure."""

from __future__ import annotations

import re
import shlex
from typing import Any, Final

from mesh.model.health import CheckType, Scheme

_FORM: Final = re.compile(r"(?P<what>none|tcp|https?)(:(?P<port>\d{1,5})?(?P<path>/.*)?)?")


def parse(text: str) -> dict[str, Any]:
    """The fields of a HealthCheck that a text speaks of.  Raises ValueError.

    Type, port, path, scheme and command are always among them: what is not said is the default.
    """
    what, colon, rest = text.partition(":")
    if what == "exec":
        return _fields(CheckType.EXEC, command=words(rest))
    found = _FORM.fullmatch(text)
    if found is None or (colon and not rest):
        raise ValueError(
            f"{text!r} is no health check: write none, tcp[:PORT], http[:[PORT][/PATH]], "
            "https[:[PORT][/PATH]] or exec:COMMAND"
        )
    port = int(found["port"]) if found["port"] else None
    if what in ("none", "tcp") and found["path"]:
        raise ValueError(f"{text!r}: only http and https have a path")
    if what == "none" and port is not None:
        raise ValueError(f"{text!r}: none has no port")
    if what not in ("http", "https"):
        return _fields(CheckType(what), port=port)
    return _fields(CheckType.HTTP, port=port, path=found["path"] or "/", scheme=Scheme(what))


def words(text: str) -> tuple[str, ...]:
    """A command's words, quoted as for a shell; none is started.  Raises ValueError."""
    try:
        found = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"command {text!r}: {error}") from None
    if not found:
        raise ValueError("the command is empty")
    return found


def _fields(
    kind: CheckType,
    port: int | None = None,
    path: str = "/",
    scheme: Scheme = Scheme.HTTP,
    command: tuple[str, ...] = (),
) -> dict[str, Any]:
    return {"type": kind, "port": port, "path": path, "scheme": scheme, "command": command}
