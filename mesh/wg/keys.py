"""The node's WireGuard key: made once, kept in the state directory, never shown.

The secret leaves this module only inside a `PrivateKey`, and no process argument ever holds it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mesh.dataplane import command
from mesh.errors import HostNotReady

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME: Final = "wireguard.key"
_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A private key and the public key that belongs to it; prints without the secret."""

    secret: str = field(repr=False)
    public: str


async def load(state_dir: Path) -> PrivateKey:
    """The key in `state_dir`, made on first use.

    Raises HostNotReady if its file is unusable, CommandFailed if `wg` is.
    """
    path = state_dir / FILE_NAME
    secret = await asyncio.to_thread(_read, path)
    if secret is None:
        secret = (await command.run("wg", "genkey")).strip()
        await asyncio.to_thread(_write, path, secret)
    public = (await command.run("wg", "pubkey", input=secret + "\n")).strip()
    return PrivateKey(secret, public)


def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="ascii").strip()
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise HostNotReady(f"{path} cannot be read: {error}") from None
    try:
        if len(base64.b64decode(text, validate=True)) == _KEY_BYTES:
            return text
    except binascii.Error:
        pass
    raise HostNotReady(f"{path} is not a WireGuard key: delete it, the node will make a new one")


def _write(path: Path, secret: str) -> None:
    """Put the secret in place whole or not at all, unreadable for others from the start."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        scratch.unlink(missing_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(descriptor)
        scratch.rename(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise HostNotReady(f"{path} cannot be written: {error.strerror}") from None
