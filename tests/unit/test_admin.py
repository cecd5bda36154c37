"""The admin end point over real sockets: what it answers, to whom, and when its port is taken."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING

import pytest

from mesh.agent import admin, config
from mesh.agent.admin import Admin
from mesh.agent.config import AdminConfig
from mesh.agent.http import Reply
from mesh.errors import BadUsage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


def free() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port: int = found.getsockname()[1]
        return port


async def metrics(accept: str) -> Reply:
    return Reply(f"metrics for {accept}\n".encode(), "text/x-metrics")


@asynccontextmanager
async def serving(
    listen: str, unready: Callable[[], str | None] = lambda: None
) -> AsyncIterator[tuple[Admin, asyncio.Event]]:
    told = asyncio.Event()
    made = Admin(AdminConfig(listen=listen), {"/metrics": metrics}, unready, told.set)
    task = asyncio.create_task(made.run())
    try:
        yield made, told
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def said(port: int | str, request: str) -> str:
    """What the end point answers, once it listens."""
    async with asyncio.timeout(30):
        while True:
            try:
                if isinstance(port, str):
                    reader, writer = await asyncio.open_unix_connection(port)
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except OSError:
                await asyncio.sleep(0.01)
        writer.write(request.replace("\n", "\r\n").encode())
        answer = await reader.read()
        writer.close()
        return answer.decode()


GET = "GET {} HTTP/1.1\nHost: here\nAccept: something\n\n"


async def test_pages_are_served_one_after_the_other() -> None:
    port, reason = free(), ["starting"]
    async with serving(f"127.0.0.1:{port}", lambda: reason[0] if reason else None):
        page = await said(port, GET.format("/metrics?name=x"))
        assert page.startswith("HTTP/1.1 200 OK\r\n")
        assert "text/x-metrics" in page
        assert page.endswith("metrics for something\n")
        assert (await said(port, GET.format("/readyz"))).endswith("starting\n")
        assert (await said(port, GET.format("/readyz"))).startswith("HTTP/1.1 503 ")
        reason.clear()
        assert (await said(port, GET.format("/readyz"))).startswith("HTTP/1.1 200 ")
        assert (await said(port, GET.format("/healthz"))).startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET.format("/nothing"), 404),
        ("POST /metrics HTTP/1.1\nHost: here\nContent-Length: 3\n\nabc", 405),
        ("GET /metrics HTTP/1.1\n\n", 400),
        ("nonsense\n\n", 400),
        (f"GET /metrics HTTP/1.1\nHost: {'x' * 100_000}\n\n", 431),
        ("HEAD /healthz HTTP/1.1\nHost: here\n\n", 200),
    ],
)
async def test_whatever_is_asked_is_answered(request_: str, status: int) -> None:
    port = free()
    async with serving(f"127.0.0.1:{port}"):
        answer = await said(port, request_)
        assert answer.startswith(f"HTTP/1.1 {status} ")
        assert request_[:4] != "HEAD" or answer.endswith("\r\n\r\n")
        assert (await said(port, GET.format("/healthz"))).endswith("ok\n")


async def test_a_taken_port_is_a_problem_until_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_RETRY_SECONDS", 0.01)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port: int = taken.getsockname()[1]
        async with serving(f"127.0.0.1:{port}") as (made, told):
            await asyncio.wait_for(told.wait(), 30)
            (problem,) = made.problems
            assert f"127.0.0.1:{port}" in problem.message
            told.clear()
            taken.close()
            assert (await said(port, GET.format("/healthz"))).endswith("ok\n")
            await asyncio.wait_for(told.wait(), 30)
            assert made.problems == ()


async def test_a_unix_socket_is_gone_with_its_agent(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    for _ in range(2):
        async with serving(f"unix:{path}"):
            assert (await said(str(path), GET.format("/healthz"))).endswith("ok\n")
            assert path.stat().st_mode & 0o777 == 0o660
        assert not path.exists()


async def test_without_an_address_nothing_is_served() -> None:
    await asyncio.wait_for(Admin(AdminConfig(listen=""), {}, lambda: None, print).run(), 30)


@pytest.mark.parametrize("listen", ["9477", "localhost", "unix:relative", "::1:9477", "a.b:0"])
def test_what_cannot_be_listened_on_is_refused_by_its_name(tmp_path: Path, listen: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'node = "n1"\n[admin]\nlisten = "{listen}"\n')

    with pytest.raises(BadUsage, match="listen"):
        config.load(path)
