"""One probe against real sockets and processes, on both event loops that the agent may run on."""

from __future__ import annotations

import asyncio
import os
import resource
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from mesh.health import probe
from mesh.health.target import Exec, Http, Tcp
from mesh.model.health import statuses
from tests.support.certificates import Authority
from tests.support.namespaces import run
from tests.support.tasks import BRIEF, OK, PATIENT, probed, saying, served, unaccepted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from mesh.health.target import Target
    from tests.support.tasks import Run, Serve

pytestmark = pytest.mark.netns


def http(port: int, status: str = "200-399", host: str = "127.0.0.1", **more: Any) -> Http:
    plain = Http(host, port, "/up", "a.example", statuses(status), tls=False, verify=True)
    return plain._replace(**more)


def asked(serve: Serve, timeout: float = PATIENT, **more: Any) -> Awaitable[str]:
    async def ask() -> str:
        async with served(serve) as port:
            return await probed(http(port, **more), timeout)

    return ask()


# ---- connections


def test_a_port_that_is_listened_on_passes(on_loop: Run) -> None:
    async def connect() -> list[str]:
        async with unaccepted() as port, served(saying(OK), "::1") as six:
            return [
                await probed(Tcp("127.0.0.1", port), BRIEF),
                await probed(Tcp("::1", six)),
            ]

    assert on_loop(connect()) == ["", ""]


def test_a_closed_port_fails_at_once(on_loop: Run) -> None:
    assert on_loop(probed(Tcp("127.0.0.1", 9))) == "connection refused"
    assert "refused" in on_loop(probed(http(9)))


@pytest.fixture(scope="module")
def nowhere() -> Iterator[str]:
    """An address whose packets nobody answers."""
    run("ip", "link", "add", "hole", "type", "veth", "peer", "name", "pit")
    run("ip", "addr", "add", "192.0.2.1/24", "dev", "hole")
    for end in ("hole", "pit"):
        run("ip", "link", "set", end, "up")
    run("ip", "neigh", "add", "192.0.2.9", "lladdr", "02:00:00:00:00:09", "dev", "hole")
    yield "192.0.2.9"
    run("ip", "link", "del", "hole")


def test_a_black_hole_fails_when_its_time_is_over(on_loop: Run, nowhere: str) -> None:
    assert on_loop(probed(Tcp(nowhere, 80), BRIEF)) == "no connection within 0.3 s"
    assert on_loop(probed(http(80, host=nowhere), BRIEF)) == "no connection within 0.3 s"


def test_a_server_that_speaks_first_sees_no_reset(on_loop: Run) -> None:
    async def connect() -> tuple[str, bytes | str]:
        seen = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 ready\r\n")
            try:
                await writer.drain()
                seen.set_result(await reader.read())
            except ConnectionError as error:
                seen.set_result(type(error).__name__)

        async with served(serve) as port:
            return await probed(Tcp("127.0.0.1", port)), await seen

    assert on_loop(connect()) == ("", b"")


# ---- requests


@pytest.mark.parametrize(
    ("status", "passing", "reason"),
    [
        (200, "200-399", ""),
        (302, "200-399", ""),
        (404, "200-399", "HTTP 404"),
        (503, "200,204", "HTTP 503"),
        (404, "404", ""),
    ],
)
def test_the_status_decides(on_loop: Run, status: int, passing: str, reason: str) -> None:
    answer = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status

    assert on_loop(asked(saying(answer), status=passing)) == reason


@pytest.mark.parametrize(
    "answer",
    [
        (OK[:20], OK[20:]),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end",),
        (b"HTTP/1.1 100 Continue\r\n\r\n", OK),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", b"0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (1 << 20),),
    ],
    ids=["in parts", "until the end", "continued", "chunked", "very long"],
)
def test_every_form_of_an_answer_is_understood(on_loop: Run, answer: tuple[bytes, ...]) -> None:
    assert on_loop(asked(saying(*answer, pause=0.01))) == ""


def test_a_request_has_the_path_and_the_host(on_loop: Run) -> None:
    async def ask() -> bytes:
        heard = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.set_result(await reader.readuntil(b"\r\n\r\n"))
            writer.write(OK)

        async with served(serve) as port:
            await probed(http(port, path="/healthz?full"))
            return await heard  # type: ignore[no-any-return]

    heard = on_loop(ask())

    assert heard.startswith(b"GET /healthz?full HTTP/1.1\r\n")
    assert b"host: a.example\r\n" in heard.lower()
    assert b"connection: close\r\n" in heard.lower()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ((), "no answer"),
        ((OK[:-30],), "no answer"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"x"), "no complete answer"),
    ],
    ids=["silence", "half a head", "slow body"],
)
def test_an_answer_must_be_whole_in_time(
    on_loop: Run, said: tuple[bytes, ...], reason: str
) -> None:
    async def ask() -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.writelines(said)
            await reader.read()

        async with served(serve) as port:
            return await probed(http(port), BRIEF)

    assert on_loop(ask()) == f"{reason} within 0.3 s"


def test_who_listens_but_takes_no_connection_gives_no_answer(on_loop: Run) -> None:
    async def ask() -> str:
        async with unaccepted() as port:
            return await probed(http(port), BRIEF)

    assert on_loop(ask()) == "no answer within 0.3 s"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "closed before a"),
        (b"SSH-2.0-x\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", "closed before a complete answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 9999, "no HTTP"),
    ],
    ids=["nothing", "another protocol", "cut off", "endless head"],
)
def test_what_is_no_answer_fails(on_loop: Run, said: bytes, words: str) -> None:
    assert words in on_loop(asked(saying(said)))


# ---- TLS


@pytest.fixture(scope="module")
def own_tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Of a server whose certificate nobody has signed whom we know."""
    identity = Authority(tmp_path_factory.mktemp("tls") / "own").issue("a.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    return context


def test_a_certificate_must_be_good_unless_any_will_do(
    on_loop: Run, own_tls: ssl.SSLContext
) -> None:
    async def ask(*, verify: bool) -> str:
        async with served(saying(OK), tls=own_tls) as port:
            return await probed(http(port, tls=True, verify=verify))

    assert on_loop(ask(verify=False)) == ""
    assert on_loop(ask(verify=True)).startswith("certificate: ")


def test_who_speaks_no_tls_fails(on_loop: Run) -> None:
    assert on_loop(asked(saying(OK), tls=True, timeout=BRIEF))


# ---- a busy prober


def test_a_time_out_while_this_process_was_busy_is_no_verdict(on_loop: Run) -> None:
    async def ask() -> str:
        import time

        async with unaccepted() as port:
            asyncio.get_running_loop().call_later(0.1, lambda: time.sleep(1))
            return await probed(http(port), BRIEF)

    with pytest.raises(probe.Unsure):
        on_loop(ask())


@pytest.mark.parametrize("kind", ["tcp", "http", "exec"])
def test_a_process_without_descriptors_has_no_verdict(on_loop: Run, kind: str) -> None:
    targets: dict[str, Target] = {
        "tcp": Tcp("127.0.0.1", 9),
        "http": http(9),
        "exec": Exec("", "/proc/self/ns/net", ("true",), ()),
    }

    async def ask() -> None:
        with ThreadPoolExecutor(1) as executor, exhausted():
            await probe.run(targets[kind], PATIENT, executor)

    with pytest.raises(probe.Unsure):
        on_loop(ask())


@contextmanager
def exhausted() -> Iterator[None]:
    """No descriptor is to be had during a block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
