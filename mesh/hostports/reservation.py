"""Holds ports of this node: sockets that are bound and never listen.

The kernel then gives a port to nobody else, and lends it to no connection of the host.  Packets
are not affected: rules translate them before a socket is looked for, and without rules they are
refused as if there were none.  Never decides which ports.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from mesh.dataplane.sockdiag import NO_DEVICE
from mesh.model.listener import Binding
from mesh.model.publish import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_SPARE: Final = 512
"""Descriptors that are left for everything else."""

_MANY: Final = 100
"""Sockets at once, for which room is made first."""

_IP_FREEBIND, _IPV6_FREEBIND = 15, 78
_SO_BINDTOIFINDEX: Final = 62
_SMALLEST: Final = 1
"""The kernel makes the least that is possible of it (socket(7))."""

_KINDS: Final = {
    Protocol.TCP: socket.SOCK_STREAM,
    Protocol.UDP: socket.SOCK_DGRAM,
    Protocol.SCTP: socket.SOCK_STREAM,
}
_NOBODY_S: Final = frozenset({errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT})
"""The kernel lacks the protocol: nobody else can have the port either."""

_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def raise_limit() -> int:
    """Let this process have as many descriptors as it may; how many of them may hold ports."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(hard - _SPARE, 0)


class Reservation:
    """The ports that are held; one socket each, for both families unless it has an address."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sockets: dict[Binding, socket.socket | None] = {}
        self._named: dict[str, set[Binding]] = {}
        self._changed: set[str] = set()
        self.lacking: set[Binding] = set()
        """What is not held for want of descriptors."""

    def __contains__(self, binding: Binding) -> bool:
        return binding in self._sockets

    def descriptors(self, name: str) -> tuple[int, ...]:
        """The descriptors of what is held under a short name."""
        bindings: Collection[Binding] = self._named.get(name, ())
        if len(bindings) > 1:
            bindings = sorted(bindings, key=str)
        held = [self._sockets[binding] for binding in bindings]
        return tuple([one.fileno() for one in held if one is not None])

    def changed(self) -> dict[str, tuple[int, ...]]:
        """The same, of all short names under which it changed since last asked."""
        names, self._changed = self._changed, set()
        return {name: self.descriptors(name) for name in names}

    def adopt(self, descriptors: Iterable[int], wanted: frozenset[Binding]) -> None:
        """Take over what an earlier process held; what is not `wanted` is given up."""
        for descriptor in descriptors:
            one = socket.socket(fileno=descriptor)
            one.set_inheritable(False)
            binding = _bound(one)
            if binding is not None and binding in wanted and binding not in self._sockets:
                self._keep(binding, one)
            else:
                one.close()

    def hold(self, bindings: Collection[Binding]) -> dict[Binding, OSError]:
        """Hold ports; those that could not be bound, and why not."""
        failed: dict[Binding, OSError] = {}
        _make_room(len(bindings))
        for binding in bindings:
            if binding in self._sockets:
                continue
            if len(self._sockets) >= self._limit:
                self.lacking.add(binding)
                continue
            try:
                self._keep(binding, _bind(binding))
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    self.lacking.add(binding)
                else:
                    failed[binding] = error
        return failed

    def release(self, bindings: Iterable[Binding]) -> None:
        """Hold them no more."""
        for binding in bindings:
            self.lacking.discard(binding)
            if binding in self._sockets:
                one = self._sockets.pop(binding)
                self._named[_name(binding)].discard(binding)
                self._changed.add(_name(binding))
                if one is not None:
                    one.close()

    def close(self) -> None:
        """Hold nothing."""
        self.release(tuple(self._sockets))

    def _keep(self, binding: Binding, one: socket.socket | None) -> None:
        self._sockets[binding] = one
        self._named.setdefault(_name(binding), set()).add(binding)
        self._changed.add(_name(binding))
        self.lacking.discard(binding)


def _make_room(count: int) -> None:
    """Have the table of this process's descriptors grow once and not by and by.

    Each time the kernel has a process with threads wait for all processors (expand_fdtable).
    """
    if count < _MANY:
        return
    with socket.socket(socket.AF_UNIX) as one, suppress(OSError):
        os.close(fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, one.fileno() + count))


def _bind(binding: Binding) -> socket.socket | None:
    """A socket that holds a port; None where the kernel cannot give it to anybody."""
    try:
        one, ipv6 = _open(binding)
    except OSError as error:
        if error.errno in _NOBODY_S:
            return None
        raise
    try:
        for option in _options(binding, ipv6=ipv6):
            one.setsockopt(*option)
        where = binding.address or ("::" if ipv6 else ""), binding.port
        try:
            one.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or binding.protocol is not Protocol.TCP:
                raise
            _bind_beside_the_closed(one, where)
        if binding.protocol is Protocol.UDP:  # what nobody would read is not even received
            one.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, NO_DEVICE)
    except OSError:
        one.close()
        raise
    return one


def _bind_beside_the_closed(one: socket.socket, where: tuple[str, int]) -> None:
    """Bind where connections of a server that is gone wait for their end (TIME_WAIT, a minute).

    That takes SO_REUSEADDR, with which others could bind there as well; to have listened, be it for
    a microsecond, ends that (inet_csk_update_fastreuse).  Fails where anybody else listens.
    """
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(where)
    one.listen(0)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    one.shutdown(socket.SHUT_RDWR)


def _open(binding: Binding) -> tuple[socket.socket, bool]:
    """A socket, and whether it is one of IPv6, which can stand for both families."""
    kind, number = _KINDS[binding.protocol], binding.protocol.number
    if binding.address is not None and ":" not in binding.address:
        return socket.socket(socket.AF_INET, kind, number), False
    try:
        return socket.socket(socket.AF_INET6, kind, number), True
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT or binding.address is not None:
            raise
        return socket.socket(socket.AF_INET, kind, number), False  # a kernel without IPv6


def _options(binding: Binding, *, ipv6: bool) -> Iterator[tuple[int, int, int]]:
    if ipv6:
        yield socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(binding.address is not None)
    if binding.address is not None:  # it may come later than the service
        yield (
            socket.IPPROTO_IPV6 if ipv6 else socket.IPPROTO_IP,
            _IPV6_FREEBIND if ipv6 else _IP_FREEBIND,
            1,
        )
    if binding.protocol is Protocol.UDP:
        yield socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALLEST


def _bound(one: socket.socket) -> Binding | None:
    """What a socket holds; None if it is no such socket."""
    protocol = PROTOCOLS.get(one.proto)
    try:
        address, port = one.getsockname()[:2]
    except (OSError, ValueError):
        return None
    if protocol is None or not port:
        return None
    everywhere = address in ("::", "0.0.0.0")
    return Binding(protocol, port, None if everywhere else address)


def _name(binding: Binding) -> str:
    """A short name of a port: systemd passes those of all in one variable of 128 KiB."""
    return f"{binding.protocol.value[0]}{binding.port}"
