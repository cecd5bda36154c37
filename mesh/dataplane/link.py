"""The driver of links and routes: reads and applies keyed values without blocking the event loop.

Owns one worker thread with one rtnetlink socket.  Never plans, and never deletes what is not ours.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from mesh.delta import Delta
from mesh.errors import ApplyFailed
from mesh.model import link

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.dataplane.rtnetlink import Rtnetlink
    from mesh.dataplane.underlay import Underlay
    from mesh.model.link import DeviceNames, LinkDelta, LinkKey, LinkValue

T = TypeVar("T")


class LinkDriver:
    """The mesh's devices, addresses, neighbours, routes and rules of this network namespace."""

    def __init__(self, names: DeviceNames) -> None:
        self.names = names
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="links")
        self._rtnetlink: Rtnetlink | None = None

    async def read(self) -> dict[LinkKey, LinkValue]:
        """Everything that is ours now.

        Raises HostNotReady if a device with one of our names is something else.
        """
        return await self._run(lambda kernel: kernel.read())

    async def underlay(self) -> Underlay:
        """The host's own addresses and routes."""
        return await self._run(lambda kernel: kernel.underlay())

    async def overlay_kind(self) -> str | None:
        """What drives the overlay device: "wireguard", "tun", or None where there is none."""
        return await self._run(lambda kernel: kernel.overlay_kind())

    async def create_wireguard(self) -> bool:
        """Make the kernel's WireGuard device; False if the kernel has none."""
        return await self._run(lambda kernel: kernel.create_wireguard(self.names.overlay))

    async def apply(self, delta: LinkDelta) -> None:
        """Apply what can be applied; a refused thing does not stop the others.

        Raises ApplyFailed naming the first one refused and how many there were.
        """
        await self._run(lambda kernel: _apply(kernel, delta))

    async def remove(self) -> None:
        """Delete everything that is ours."""
        actual = await self.read()
        await self.apply(link.changes(actual, {}))

    async def close(self) -> None:
        """Release the socket and the thread; the kernel keeps forwarding."""
        if self._rtnetlink is not None:
            await self._run(lambda kernel: kernel.close())
            self._rtnetlink = None
        self._worker.shutdown()

    async def _run(self, work: Callable[[Rtnetlink], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._worker, lambda: work(self._open())
        )

    def _open(self) -> Rtnetlink:
        if self._rtnetlink is None:
            # Here, because importing pyroute2 takes 150 ms and every command would pay for it.
            from mesh.dataplane.rtnetlink import Rtnetlink

            self._rtnetlink = Rtnetlink(self.names)
        return self._rtnetlink


def _apply(kernel: Rtnetlink, delta: LinkDelta) -> None:
    refused: list[ApplyFailed] = []

    def attempt(write: Callable[..., None], *arguments: object) -> None:
        try:
            write(*arguments)
        except ApplyFailed as error:
            refused.append(error)

    gone = Delta({k: v for k, v in delta.remove.items() if k not in delta.add}, {})
    for key in _ordered(gone.remove, reverse=True):
        attempt(kernel.remove, key, gone.remove[key])
    for key in _ordered(delta.add, reverse=False):
        if key in delta.remove:
            attempt(kernel.replace, key, delta.remove[key], delta.add[key])
        else:
            attempt(kernel.add, key, delta.add[key])
    if refused:
        more = f" (and {len(refused) - 1} more refused)" if len(refused) > 1 else ""
        raise ApplyFailed(f"{refused[0]}{more}")


def _ordered(values: dict[LinkKey, LinkValue], *, reverse: bool) -> list[LinkKey]:
    return sorted(values, key=lambda key: link.ORDER.index(type(key)), reverse=reverse)
