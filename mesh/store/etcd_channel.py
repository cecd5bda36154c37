"""Reaching etcd: endpoints, TLS, tokens, time limits and the choice of the next endpoint.

The only place where gRPC's errors become the house's.  Failover is decided here and nowhere else:
gRPC's own retries are off.  Never looks into keys or values.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC writes to stderr by itself otherwise

import grpc

from mesh.errors import BadUsage, StoreUnavailable
from mesh.store import etcd_messages
from mesh.store.protocol import Compacted, LeaseLost

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),  # the default of 4 MiB fails on 10 000 keys
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web is none for etcd
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2000),  # also the time limit of one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 3000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),  # 1 makes etcd answer GOAWAY too_many_pings
)

_TRANSIENT: Final = frozenset({
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
})  # fmt: skip

_REMEDIES: Final = {
    "user name is empty": "give it user and password",
    "authentication failed": "check user and password",
    "permission denied": "grant this user the keys, or check which user this is",
    "too large": "make the record smaller",
    "space exceeded": "compact and defragment etcd, then disarm its alarm",
}
"""What to do about words of etcd's errors; its own client knows them by their text as well."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
_WAKE: Final = 0.1
"""Seconds for a stream that ended to say why."""


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """How to reach etcd.

    `endpoints` are http://HOST:PORT or https://HOST:PORT, tried in order; `ca`, `cert` and `key`
    are paths of PEM files, read at each connection.  `timeout` limits a call over all endpoints;
    a watch that is silent for `probe` seconds is asked for a sign of life and given up as stalled
    after `stall` seconds.
    """

    endpoints: tuple[str, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    timeout: float = 5.0
    probe: float = 5.0
    stall: float = 15.0

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise BadUsage("etcd: no endpoints; give at least one http://HOST:PORT")
        for endpoint in self.endpoints:
            _target(endpoint)


class Unreachable(Exception):
    """This endpoint gave no answer; another one, or a later time, may."""


class _TokenRefused(Exception):
    """The token has expired, or the users changed since it was given."""


class Link:
    """A connection to one endpoint, with the token that endpoint gave."""

    def __init__(self, endpoint: str, options: EtcdOptions) -> None:
        self.endpoint = endpoint
        self._options = options
        self._channel = _open(endpoint, options)
        self._stubs: dict[str, Any] = {}
        self._token: str | None = None
        self._authenticating = asyncio.Lock()

    @property
    def ready(self) -> bool:
        """Whether a connection stands, as far as is known."""
        return bool(self._channel.get_state() is grpc.ChannelConnectivity.READY)

    async def send(self, call: etcd_messages.Call, request: Any, timeout: float) -> Any:
        """One request, one reply.  Raises Unreachable and what the reply means."""
        try:
            return await self._exchange(call, request, timeout, await self._metadata(timeout))
        except _TokenRefused:
            self.forget_token()
        try:
            return await self._exchange(call, request, timeout, await self._metadata(timeout))
        except _TokenRefused as error:
            raise StoreUnavailable(
                f"etcd at {self.endpoint} refuses: {error}; check user and password"
            ) from None

    async def open(self, call: etcd_messages.Call, timeout: float) -> Any:
        """A stream for as long as it lasts.  `timeout` limits the authentication before it."""
        leader = ("hasleader", "true")  # a member cut off from its leader refuses, or ends it
        metadata = await self._metadata(timeout)
        with self._translated(None):
            return self._stub(call)(metadata=(*metadata, leader))

    def forget_token(self) -> None:
        """Ask for a new token before the next call."""
        self._token = None

    async def close(self) -> None:
        """Close, which ends every call under way as Unreachable; idempotent."""
        await self._channel.close()

    async def _metadata(self, timeout: float) -> tuple[tuple[str, str], ...]:
        if self._options.user is None:
            return ()
        async with self._authenticating:
            if self._token is None:
                self._token = await self._authenticate(timeout)
        return (("token", self._token),) if self._token else ()

    async def _authenticate(self, timeout: float) -> str:
        call = etcd_messages.AUTHENTICATE
        request = call.request(name=self._options.user, password=self._options.password or "")
        with self._translated(request):
            try:
                return str((await self._stub(call)(request, timeout=timeout)).token)
            except grpc.aio.AioRpcError as error:
                if "authentication is not enabled" in (error.details() or ""):
                    return ""
                raise

    async def _exchange(
        self,
        call: etcd_messages.Call,
        request: Any,
        timeout: float,
        metadata: tuple[tuple[str, str], ...],
    ) -> Any:
        with self._translated(request):
            under_way = self._stub(call)(
                *(() if call.streams else (request,)), timeout=timeout, metadata=metadata
            )
            if not call.streams:
                return await under_way
            reply = await _first_reply(under_way, request, timeout)
        if reply is grpc.aio.EOF:
            raise Unreachable("the stream ended")
        return reply

    @contextmanager
    def _translated(self, request: Any) -> Iterator[None]:
        """What gRPC raises, in the house's words."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._meaning(error, request) from None
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            raise Unreachable("the connection was closed") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unreachable("the connection was given up") from None  # its channel was closed

    def _stub(self, call: etcd_messages.Call) -> Any:
        if call.path not in self._stubs:
            kind = self._channel.stream_stream if call.streams else self._channel.unary_unary
            self._stubs[call.path] = kind(
                call.path,
                request_serializer=call.request.SerializeToString,
                response_deserializer=call.reply.FromString,
            )
        return self._stubs[call.path]

    def _meaning(self, error: grpc.aio.AioRpcError, request: Any) -> Exception:
        """What a gRPC status means to the house."""
        code, details = error.code(), error.details() or error.code().name
        if code in _TRANSIENT:
            return Unreachable(details)
        if code is grpc.StatusCode.OUT_OF_RANGE:
            return Compacted(getattr(request, "revision", 0))
        if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
            return LeaseLost(details)
        if "invalid auth token" in details or "revision of auth store is old" in details:
            return _TokenRefused(details)
        remedies = (remedy for words, remedy in _REMEDIES.items() if words in details)
        remedy = next(remedies, "see etcd's log")
        return StoreUnavailable(f"etcd at {self.endpoint} refuses: {details}; {remedy}")


class Connection:
    """One link at a time, to the endpoint that answered last."""

    def __init__(self, options: EtcdOptions) -> None:
        self.options = options
        self._index = 0
        self._link: Link | None = None
        self._closed = False

    async def send(self, call: etcd_messages.Call, request: Any, *, repeatable: bool = True) -> Any:
        """One request, one reply, from whichever endpoint answers within the time limit.

        A request that is not `repeatable` is sent once.  Raises StoreUnavailable.
        """
        loop, pause, attempts = asyncio.get_running_loop(), _FIRST_PAUSE, 0
        end = loop.time() + self.options.timeout
        share = (
            self.options.timeout / len(self.options.endpoints)
            if repeatable
            else self.options.timeout
        )
        while True:
            link = self.link()
            try:
                return await link.send(call, request, min(share, end - loop.time()))
            except Unreachable as error:
                cause = str(error)
                await self.abandon(link)
            attempts += 1
            if not repeatable:
                raise StoreUnavailable(
                    f"etcd at {link.endpoint}: {cause}; whether the change was made is unknown"
                )
            if attempts % len(self.options.endpoints) == 0:
                await asyncio.sleep(min(pause, max(0.0, end - loop.time())))
                pause = min(2 * pause, _LONGEST_PAUSE)
            if loop.time() >= end:
                raise StoreUnavailable(
                    f"no etcd answers at {', '.join(self.options.endpoints)}: {cause}; "
                    "check that it runs and is reachable from here"
                )

    def link(self) -> Link:
        """The link in use, or a new one to the next endpoint.  Raises StoreUnavailable."""
        if self._closed:
            raise StoreUnavailable("this connection to etcd is closed")
        if self._link is None:
            self._link = Link(self.options.endpoints[self._index], self.options)
        return self._link

    async def abandon(self, link: Link) -> None:
        """Leave an endpoint that failed: its calls end, the next ones go to the next endpoint."""
        if link is self._link:
            self._link = None
            self._index = (self._index + 1) % len(self.options.endpoints)
        await link.close()

    async def close(self) -> None:
        """Close for good; idempotent."""
        self._closed = True
        if self._link is not None:
            await self._link.close()


async def _first_reply(call: Any, request: Any, timeout: float) -> Any:
    """Send one request on a new stream and end it after its reply."""

    async def exchange() -> Any:
        await call.write(request)
        return await call.read()

    exchanging, loop = asyncio.ensure_future(exchange()), asyncio.get_running_loop()
    # gRPC never wakes the writer of a call that was ended before its metadata was sent.
    call.add_done_callback(lambda _: loop.call_later(_WAKE, exchanging.cancel))
    try:
        async with asyncio.timeout(timeout):  # wait_for may swallow that we are cancelled
            return await exchanging
    except TimeoutError:
        raise Unreachable("Deadline Exceeded") from None
    finally:
        call.cancel()


def _target(endpoint: str) -> str:
    """HOST:PORT of an endpoint.  Raises BadUsage."""
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port or 2379
    except ValueError:
        host, port = None, 0
    if url.scheme not in ("http", "https") or not host or url.path not in ("", "/"):
        raise BadUsage(f"etcd endpoint {endpoint!r}: write http://HOST:PORT or https://HOST:PORT")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _open(endpoint: str, options: EtcdOptions) -> Any:
    if not endpoint.startswith("https:"):
        return grpc.aio.insecure_channel(_target(endpoint), options=_CHANNEL_OPTIONS)
    ca, key, cert = (_pem(path) for path in (options.ca, options.key, options.cert))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.aio.secure_channel(_target(endpoint), credentials, options=_CHANNEL_OPTIONS)


def _pem(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StoreUnavailable(f"{path}: {error.strerror}; etcd needs it for TLS") from None
