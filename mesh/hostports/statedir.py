"""What is published on this host, on disk: one file a task, each replaced as a whole.

`header` says whether a change was under way when its process ended, and counts changes, by which
processes hear of each other's.  Never decides who may have a port, and knows no kernel.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.engine import lock
from mesh.errors import HostNotReady, InvalidRecord
from mesh.hostports.publications import Publication
from mesh.model.mapping import Cursors
from mesh.model.names import check_id

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER: Final = "header"
_TASKS: Final = "tasks"
_SUFFIX: Final = ".json"
_WIDTH: Final = 512
"""Bytes of the header, which is written in place: less than a sector."""

_PATIENCE_SECONDS: Final = 30.0
_AGAIN_SECONDS: Final = 0.002


class Header(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`owner` is what the rules of this directory are recognised by in the kernel.

    `unfinished`: a change has begun.  `namespace` is the boot and the network namespace whose
    kernel has what is written here; `cursors` are where searches for dynamic ports go on.
    """

    owner: int
    generation: int = 0
    unfinished: bool = False
    namespace: str = ""
    cursors: Cursors = Cursors()


class StateDirectory:
    """A state directory.  Whatever is read or written under `locked` is one process's alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = -1
        self._written: set[Path] = set()
        self.header = Header(owner=0)

    # ---- the header

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody else out, and know the header.  Raises HostNotReady.

        Waits for others, who take milliseconds.
        """
        descriptor = self._acquired()
        try:
            self._lock = descriptor
            self.header = self._known() or Header(owner=1 + secrets.randbelow(0xFFFFFFFF))
            yield
        finally:
            self._lock = -1
            os.close(descriptor)

    def _acquired(self) -> int:
        ends = time.monotonic() + _PATIENCE_SECONDS
        while True:
            descriptor = lock.opened(self._path, _HEADER)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = os.stat(self._path / _HEADER)
                if os.path.samestat(os.fstat(descriptor), there):
                    return descriptor
            except FileNotFoundError:  # removed by `clear`
                pass
            except BlockingIOError:
                if time.monotonic() > ends:
                    os.close(descriptor)
                    raise HostNotReady(
                        f"{self._path}: another process has been changing ports for "
                        f"{_PATIENCE_SECONDS:.0f} s: see who has {_HEADER} open, and end that"
                    ) from None
                time.sleep(_AGAIN_SECONDS)
            os.close(descriptor)

    def _known(self) -> Header | None:
        """The header; None if there is none yet, or none that makes sense: then whose rules are in
        the kernel is not known either, and nobody takes them over unasked.
        """
        with suppress(msgspec.DecodeError, msgspec.ValidationError):
            return msgspec.json.decode(os.pread(self._lock, _WIDTH, 0).strip(b" \0"), type=Header)
        return None

    def save(self, header: Header) -> None:
        """Replace the header.  What it says is about this boot: it need not outlive a power cut."""
        os.pwrite(self._lock, msgspec.json.encode(header).ljust(_WIDTH), 0)
        self.header = header

    # ---- the tasks

    def read(self, task: str) -> Publication | None:
        """What a task has; None: nothing.  Needs no lock.  Raises InvalidRecord."""
        try:
            check_id(task, "task")
        except ValueError:
            return None
        path = self._file(task)
        try:
            data = path.read_bytes()
            if not data:  # lost in a power cut, as was the kernel's part of it
                return None
            found = msgspec.json.decode(data, type=Publication)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostNotReady(f"{path}: {error.strerror}; run as root") from None
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise InvalidRecord(str(path), f"{error}: mend or remove the file") from None
        if found.task != task:
            raise InvalidRecord(str(path), f"is of task {found.task!r}: rename or remove the file")
        return found

    def tasks(self) -> Iterator[Publication]:
        """What every task has, by name.  Needs no lock.  Raises InvalidRecord."""
        try:
            names = sorted(os.listdir(self._path / _TASKS))
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostNotReady(f"{self._path}: {error.strerror}; run as root") from None
        for name in names:
            if name.endswith(_SUFFIX) and not name.startswith("."):
                found = self.read(name.removesuffix(_SUFFIX))
                if found is not None:
                    yield found

    def write(self, publication: Publication) -> None:
        """A task has these ports.  Raises HostNotReady; then the file is as it was.

        What a power cut leaves is settled by `sync`: it may be an empty file before.
        """
        path = self._file(publication.task)
        draft = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.encode(publication))
            os.replace(draft, path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise HostNotReady(f"{path}: {error.strerror}") from None
        self._written.add(path)

    def remove(self, task: str) -> None:
        """A task has no ports.  Raises HostNotReady."""
        path = self._file(task)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise HostNotReady(f"{path}: {error.strerror}") from None
        self._written.add(path)

    def sync(self) -> None:
        """Have the disk keep what was written and removed since last asked.  Raises HostNotReady.

        Takes a disk milliseconds.
        """
        written, self._written = self._written, set()
        try:
            for path in (*written, *{path.parent for path in written}):
                with suppress(FileNotFoundError):
                    _sync(path)
        except OSError as error:
            raise HostNotReady(f"{self._path}: {error.strerror}") from None

    def clear(self) -> None:
        """Remove every file of ours, and the directory if nothing else is in it."""
        with suppress(FileNotFoundError):
            for path in (self._path / _TASKS).iterdir():
                if path.name.endswith(_SUFFIX):
                    path.unlink()
        (self._path / _HEADER).unlink(missing_ok=True)
        for path in (self._path / _TASKS, self._path):
            with suppress(OSError):
                path.rmdir()

    def _file(self, task: str) -> Path:
        return self._path / _TASKS / f"{task}{_SUFFIX}"

    def __str__(self) -> str:
        return str(self._path)


def here() -> str:
    """This boot, and the network namespace of the calling thread."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot}/{os.stat('/proc/thread-self/ns/net').st_ino}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
