"""Network namespaces with an event loop inside, as if each were a machine with its own agent."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mesh.dataplane import netns

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

T = TypeVar("T")

_NOBODY = 9
_ANSWER_SECONDS = 2.0


def run(*argv: str) -> str:
    """What a program printed; its failure shows what it said."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr or done.stdout}"
    return done.stdout


class Namespace:
    """A namespace called `name`; coroutines run in it on a thread that lives there."""

    def __init__(self, name: str) -> None:
        self.name = name
        run("ip", "netns", "add", name)
        self.sh("ip", "link", "set", "lo", "up")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def sh(self, *argv: str) -> str:
        """Run a program in the namespace."""
        return run("ip", "netns", "exec", self.name, *argv)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the namespace."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    @contextmanager
    def running(self, work: Coroutine[Any, Any, None]) -> Iterator[None]:
        """Have a coroutine run in the namespace during a block; its failure is the block's."""

        async def begin() -> asyncio.Task[None]:
            return asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        task = self.run(begin())
        try:
            yield
        finally:
            self.run(end())

    def reaches(self, target: str, mark: int = 0, source: str = "") -> bool:
        """Whether the host `target` answers: it refuses a connection to a port nobody serves."""

        async def connect() -> bool:
            return await asyncio.to_thread(_is_refused, target, mark, source)

        return self.run(connect())

    def close(self) -> None:
        """Remove the namespace and all that is in it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        run("ip", "netns", "del", self.name)

    def _live(self) -> None:
        with netns.entered(f"/run/netns/{self.name}"):
            self._loop.run_forever()


def _is_refused(target: str, mark: int, source: str) -> bool:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_ANSWER_SECONDS)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
        if source:
            probe.bind((source, 0))
        try:
            probe.connect((target, _NOBODY))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    raise AssertionError(f"{target} serves port {_NOBODY}")


def wire(one: Namespace, device: str, other: Namespace, far: str, *addresses: str) -> None:
    """A cable between two namespaces; `addresses` belong to the end in `one`."""
    one.sh("ip", "link", "add", device, "type", "veth", "peer", "name", far, "netns", other.name)
    for address in addresses:
        one.sh("ip", "addr", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
    one.sh("ip", "link", "set", device, "up")
    other.sh("ip", "link", "set", far, "up")


def write_sysctls(namespace: str, wanted: dict[str, str]) -> None:
    """Set what there is of `wanted`, by paths below /proc/sys/net."""
    with netns.entered(f"/run/netns/{namespace}"):
        for name, value in wanted.items():
            path = Path("/proc/sys/net") / name
            if path.exists():  # not every kernel has br_netfilter
                path.write_text(value)


def nodad(address: str) -> list[str]:
    """The words that give an address at once."""
    return ["nodad"] if ":" in address else []
