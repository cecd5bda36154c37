"""One check: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from mesh.dataplane import features, host
from mesh.errors import CommandFailed

AS_ROOT: Final = "run `mesh doctor` as root"


class Status(enum.Enum):
    """How a thing is."""

    OK = "ok"
    WARN = "warn"
    """It works, or was not looked at; somebody should look."""
    FAIL = "fail"
    """The mesh does not work here, or not as it should."""


class Check(msgspec.Struct, frozen=True):
    """One line of the table; `fix` says what to do, None where there is nothing to do."""

    name: str
    status: Status
    evidence: str
    fix: str | None = None


def ok(name: str, evidence: str) -> Check:
    """All is well."""
    return Check(name, Status.OK, evidence)


def warn(name: str, evidence: str, fix: str) -> Check:
    """Somebody should look."""
    return Check(name, Status.WARN, evidence, fix)


def fail(name: str, evidence: str, fix: str) -> Check:
    """Something has to be done."""
    return Check(name, Status.FAIL, evidence, fix)


def numbers(text: str) -> tuple[int, ...]:
    """The first dotted number in a text as a tuple that compares: "v1.0.6 (x)" is (1, 0, 6)."""
    found = ""
    for char in text:
        if char.isascii() and (char.isdigit() or (char == "." and found)):
            found += char
        elif found:
            break
    return tuple(int(part) for part in found.split(".") if part)


async def program(name: str, package: str, *argv: str) -> Check:
    """Whether a program runs, and its version; `package` is where Debian has it."""
    if not host.has_program(argv[0]):
        return fail(name, f"{argv[0]} is not installed", f"apt install {package}")
    try:
        return ok(name, (await features.version(*argv)).partition(" - ")[0])
    except CommandFailed as error:
        return warn(name, f"version not told: {error}", AS_ROOT)
