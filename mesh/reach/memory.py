"""Which nodes could not be reached, kept in a file: for the agent after this one, and for who looks
at what this node's rules should be.  Never outlives a boot.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

FILE_NAME: Final = "unreachable.json"

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    """`nodes` are names."""

    boot: str
    nodes: tuple[str, ...]


def load(directory: Path) -> frozenset[str]:
    """Who could not be reached; nobody if that was before the last boot, or cannot be read."""
    try:
        saved = msgspec.json.decode((directory / FILE_NAME).read_bytes(), type=_Saved)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return frozenset()
    return frozenset(saved.nodes) if saved.boot == _boot() else frozenset()


def save(directory: Path, nodes: Iterable[str]) -> None:
    """Replace the file: whole or not at all."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / FILE_NAME
    scratch = path.with_suffix(".new")
    scratch.write_bytes(msgspec.json.encode(_Saved(boot=_boot(), nodes=tuple(sorted(nodes)))))
    scratch.rename(path)


def forget(directory: Path) -> None:
    """Remove the file."""
    (directory / FILE_NAME).unlink(missing_ok=True)


def _boot() -> str:
    return _BOOT.read_text(encoding="ascii").strip()
