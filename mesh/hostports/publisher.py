"""Host ports for orchestrators that have no etcd: the kernel forwards, a state directory remembers.

    with HostPortPublisher() as publisher:
        publisher.publish_ports("task-abc123", "10.88.0.5", ["8080:80", "53:53/udp"])

Safe in threads and in several processes.  All work is done on one thread of its own, in the network
namespace of the thread that makes the publisher.
"""

from __future__ import annotations

import asyncio
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mesh.dataplane.firewall import Mode
from mesh.engine import backend as backends
from mesh.errors import BadUsage
from mesh.hostports.publications import DYNAMIC, Settings
from mesh.hostports.statedir import StateDirectory
from mesh.hostports.transactions import Host, Transactions
from mesh.hostports.worker import Worker
from mesh.model import protected

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Iterable
    from concurrent.futures import Future
    from types import TracebackType

    from mesh.hostports.asked import Asked
    from mesh.hostports.publications import Publication
    from mesh.hostports.transactions import Checked
    from mesh.model.mapping import PortMapping
    from mesh.model.report import Problem

T = TypeVar("T")

STATE_DIR: Final = "/var/lib/mesh/hostports"


class _Shared:
    """What both publishers are made of."""

    def __init__(self, state: StateDirectory, host: Host) -> None:
        self.state = state
        self.transactions = Transactions(state, host)
        self._worker = Worker(self.transactions)

    def submit(self, call: Callable[[Transactions], Coroutine[Any, Any, T]]) -> Future[T]:
        return self._worker.submit(lambda: call(self.transactions))

    def published(self, task: str) -> tuple[PortMapping, ...]:
        found = self.state.read(task)
        return found.mappings if found is not None else ()

    def all_published(self) -> dict[str, Publication]:
        return {each.task: each for each in self.state.tasks()}

    def close(self) -> None:
        self._worker.close()


def _host(
    backend: str, firewall: str, dynamic: tuple[int, int], protected_ports: Iterable[str]
) -> Host:
    settings = Settings(dynamic, tuple(protected_ports))
    settings.check()
    names = ("auto", "iptables", *backends.NAMES)
    if backend not in names:
        raise BadUsage(f"backend {backend!r} is not one of {', '.join(names)}")
    try:
        mode = Mode(firewall)
    except ValueError:
        known = ", ".join(each.value for each in Mode)
        raise BadUsage(f"firewall {firewall!r} is not one of {known}") from None
    return Host(backend, mode, settings)


class _Publisher:
    """What the blocking and the asynchronous publisher have in common."""

    def __init__(
        self,
        state_dir: str | os.PathLike[str] = STATE_DIR,
        *,
        backend: str = "auto",
        firewall: str = Mode.FORWARD.value,
        dynamic: tuple[int, int] = DYNAMIC,
        protected_ports: Iterable[str] = protected.DEFAULT,
    ) -> None:
        host = _host(backend, firewall, dynamic, protected_ports)
        self._shared = _Shared(StateDirectory(Path(state_dir)), host)
        weakref.finalize(self, self._shared.close).atexit = False

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What the last call found that keeps packets away: a firewall that drops them, a kernel
        that does not forward.
        """
        return self._shared.transactions.problems


class HostPortPublisher(_Publisher):
    """Publishes ports of containers on this host.  Calls block; they may come from any thread, also
    from one whose event loop runs.

    `state_dir` remembers what is published; one serves one network namespace.  `backend` is "auto"
    or a rule backend by name, `firewall` what may be done about a host's firewall that drops what
    is forwarded ("report", "forward", "open"), `dynamic` the first and last port that is given
    where none is named, `protected_ports` those that are given only by force.  Every method raises
    a mesh.errors.MeshError that says what to do; then all is as it was.
    """

    def publish_ports(
        self, task_id: str, container_ip: str | Iterable[str], ports: Iterable[Asked]
    ) -> tuple[PortMapping, ...]:
        """Have these ports of the host lead to a container, and no others of this task: all of them
        or, with an error, as it was before.  Returns them with their numbers.

        `container_ip` is an address, or one of each family.  Asked again, nothing changes.  Raises
        Conflict naming who has a port, BadUsage, ApplyFailed, HostNotReady.
        """
        return _mappings(
            self._shared.submit(lambda t: t.publish(task_id, container_ip, ports)).result()
        )

    def unpublish_ports(self, task_id: str) -> bool:
        """Have no port lead to a task any more; whether one did.  Its connections may end by
        themselves, UDP flows end here.
        """
        return self._shared.submit(lambda t: t.unpublish(task_id)).result()

    def get_published_ports(self, task_id: str) -> tuple[PortMapping, ...]:
        """The ports of a task, whoever published them with this state directory."""
        return self._shared.published(task_id)

    def published(self) -> dict[str, Publication]:
        """What every task has, by its name."""
        return self._shared.all_published()

    def check(self) -> Checked:
        """Find and put right what somebody else did to the rules, since the last call or since
        another process published; and say what else keeps packets away.
        """
        return self._shared.submit(lambda t: t.check()).result()

    def restore(self) -> int:
        """Have the kernel hold what the state directory says: after a reboot, or in a new network
        namespace that takes the place of the old one.  Returns how many tasks have ports.
        """
        return self._shared.submit(lambda t: t.restore()).result()

    def cleanup(self, *, force: bool = False) -> None:
        """Take all that was published off this host, rules and state, and see that it is gone;
        with `force` also what another state directory published here.
        """
        self._shared.submit(lambda t: t.cleanup(force=force)).result()

    def close(self) -> None:
        """Release sockets and the thread; what is published stays."""
        self._shared.close()

    def __enter__(self) -> HostPortPublisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class AsyncHostPortPublisher(_Publisher):
    """The same for an event loop, which is never blocked: each method as in HostPortPublisher."""

    async def publish_ports(
        self, task_id: str, container_ip: str | Iterable[str], ports: Iterable[Asked]
    ) -> tuple[PortMapping, ...]:
        """See HostPortPublisher.publish_ports."""
        return _mappings(await self._do(lambda t: t.publish(task_id, container_ip, ports)))

    async def unpublish_ports(self, task_id: str) -> bool:
        """See HostPortPublisher.unpublish_ports."""
        return await self._do(lambda t: t.unpublish(task_id))

    async def get_published_ports(self, task_id: str) -> tuple[PortMapping, ...]:
        """See HostPortPublisher.get_published_ports."""
        return await asyncio.to_thread(self._shared.published, task_id)

    async def published(self) -> dict[str, Publication]:
        """See HostPortPublisher.published."""
        return await asyncio.to_thread(self._shared.all_published)

    async def check(self) -> Checked:
        """See HostPortPublisher.check."""
        return await self._do(lambda t: t.check())

    async def restore(self) -> int:
        """See HostPortPublisher.restore."""
        return await self._do(lambda t: t.restore())

    async def cleanup(self, *, force: bool = False) -> None:
        """See HostPortPublisher.cleanup."""
        await self._do(lambda t: t.cleanup(force=force))

    async def close(self) -> None:
        """See HostPortPublisher.close."""
        await asyncio.to_thread(self._shared.close)

    async def __aenter__(self) -> AsyncHostPortPublisher:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    async def _do(self, call: Callable[[Transactions], Coroutine[Any, Any, T]]) -> T:
        """What has begun is done to its end, also if nobody waits for it any more."""
        return await asyncio.wrap_future(self._shared.submit(call))


def _mappings(found: Publication | None) -> tuple[PortMapping, ...]:
    return found.mappings if found is not None else ()
