"""What this node found of its tasks, kept in a file for the agent after this one.

Records in etcd end with their lease, seconds after an agent.  The kernel forwards on meanwhile, and
the next agent must not take out of the pools what is healthy.  Never outlives a boot.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.model.report import Health

if TYPE_CHECKING:
    from collections.abc import Iterable

FILE_NAME: Final = "health.json"

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    """`tasks` are verdicts, each with the name of its task."""

    boot: str
    tasks: tuple[tuple[str, Health], ...]


def load(directory: Path) -> dict[tuple[str, str], Health]:
    """What was found, by service and task; nothing if that was before the last boot, or if nobody
    can read it.
    """
    try:
        saved = msgspec.json.decode((directory / FILE_NAME).read_bytes(), type=_Saved)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    if saved.boot != _boot():
        return {}
    return {(health.service, task): health for task, health in saved.tasks}


def save(directory: Path, tasks: Iterable[tuple[str, Health]]) -> None:
    """Replace the file: whole or not at all."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / FILE_NAME
    scratch = path.with_suffix(".new")
    scratch.write_bytes(msgspec.json.encode(_Saved(boot=_boot(), tasks=tuple(tasks))))
    scratch.rename(path)


def forget(directory: Path) -> None:
    """Remove the file."""
    (directory / FILE_NAME).unlink(missing_ok=True)


def _boot() -> str:
    return _BOOT.read_text(encoding="ascii").strip()
