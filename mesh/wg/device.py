"""The overlay's WireGuard device: makes it, adopts it, revives it, and brings its peers in line.

The device outlives the agent: wireguard-go runs in a session of its own and belongs to init, so no
restart of the agent loses a session.  `wg setconf`, which would, is never used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mesh.dataplane import command, host
from mesh.errors import ApplyFailed, CommandFailed, HostNotReady
from mesh.wg import conf, plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.dataplane.link import LinkDriver
    from mesh.delta import Delta
    from mesh.wg.conf import Interface
    from mesh.wg.keys import PrivateKey
    from mesh.wg.plan import Peer

log = logging.getLogger(__name__)

_SOCKETS: Final = Path("/var/run/wireguard")
"""Where wireguard-go listens for `wg`: one directory per file system, not per namespace."""

_START_SECONDS: Final = 15.0


async def fwmarks() -> dict[str, int]:
    """What WireGuard devices of this host mark their own packets with; one that nothing drives
    sends none.
    """
    try:
        return conf.parse_fwmarks(await command.run("wg", "show", "all", "fwmark"))
    except CommandFailed:
        return {}


class Overlay:
    """The driver of the overlay device; there is one per network namespace."""

    def __init__(self, links: LinkDriver) -> None:
        self._links = links
        self._name = links.names.overlay
        self.seen: Interface | None = None
        """The device as it was read last."""

    async def bring_up(self, key: PrivateKey, port: int, desired: Mapping[str, Peer]) -> None:
        """Make the device what it should be, from whatever it is: absent, dead, ours or empty.

        Sessions of peers that stay are kept.  Raises HostNotReady, ApplyFailed or CommandFailed.
        """
        await self._exist(port)
        actual = await self.read()
        if (actual.public_key, actual.port) != (key.public, port):
            await self._configure(key, port, desired)
            return
        await self.apply(plan.changes(actual.peers, desired, actual.live(time.time())))

    async def read(self) -> Interface:
        """The device as it is.  Raises CommandFailed if nothing drives it."""
        self.seen = conf.parse(await command.run("wg", "show", self._name, "dump"))
        return self.seen

    async def apply(self, delta: Delta[str, Peer]) -> None:
        """Change peers, and no other peer's session.  Raises ApplyFailed."""
        if not delta:
            return
        try:
            await command.run("wg", "set", self._name, *conf.arguments(delta))
        except CommandFailed as error:
            raise ApplyFailed(f"peers of {self._name}: {error}") from error
        log.info("peers changed device=%s count=%d", self._name, len(delta))

    def remove_socket(self) -> None:
        """Take wireguard-go's socket away: it ends; a killed one has left its socket behind."""
        (_SOCKETS / f"{self._name}.sock").unlink(missing_ok=True)

    async def _configure(self, key: PrivateKey, port: int, desired: Mapping[str, Peer]) -> None:
        text = conf.render(key.secret, port, desired)
        try:
            await command.run("wg", "syncconf", self._name, "/dev/stdin", input=text)
        except CommandFailed as error:
            # Not "from error": its notes may quote the text, which holds the secret.
            raise ApplyFailed(f"configuration of {self._name}: {error}") from None
        log.info("configured device=%s port=%d peers=%d", self._name, port, len(desired))

    async def _exist(self, port: int) -> None:
        kind = await self._links.overlay_kind()
        if kind is None:
            host.check_port(port)
            if await self._links.create_wireguard():
                return
            await self._start_wireguard_go()
        elif kind == "tun" and not await self._answers():
            raise HostNotReady(
                f"device {self._name} exists, and no wireguard-go drives it: "
                f"remove it (ip link del {self._name}) or name another overlay_device"
            )

    async def _answers(self) -> bool:
        try:
            await command.run("wg", "show", self._name, "listen-port")
        except CommandFailed:
            return False
        return True

    async def _start_wireguard_go(self) -> None:
        """Start it as a daemon: it detaches when its device and socket are there."""
        host.check_program("wireguard-go", "wireguard-go")
        host.check_tun()
        done = await asyncio.to_thread(self._spawn)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            reason = said or f"exit status {done.returncode}"
            raise ApplyFailed(f"wireguard-go {self._name}: {reason}")
        log.info("this kernel has no WireGuard: started wireguard-go device=%s", self._name)

    def _spawn(self) -> subprocess.CompletedProcess[bytes]:
        """In a thread, with vfork(2): see mesh.dataplane.command.

        Without LOG_LEVEL the daemon writes to /dev/null; with one it would fill a disk as long as
        a peer is out of reach, and hold our pipe open.
        """
        try:
            return subprocess.run(
                ["wireguard-go", self._name],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                start_new_session=True,  # no signal meant for the agent reaches it
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath)},
                timeout=_START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ApplyFailed(
                f"wireguard-go {self._name} was not ready after {_START_SECONDS:g} s: "
                "is this machine overloaded?"
            ) from None
