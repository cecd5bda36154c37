"""The agent's own HTTP end point: /healthz, /readyz, and the pages of others.

Tells, and takes no orders.  On the agent's event loop, with h11 for the protocol: that costs
0.1 MiB and 5 ms at the start, an ASGI server and framework 9 MiB and 60 ms, and a WSGI server a
thread that would have to ask the loop for everything it tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from mesh.agent import http
from mesh.agent.http import Reply
from mesh.model.node import split_endpoint
from mesh.model.report import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import h11

    from mesh.agent.config import AdminConfig

    Page = Callable[[str], Awaitable["Reply"]]
    """Given what the client accepts."""

log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 5.0
_MOST: Final = 32
"""Clients at once."""

_OWN: Final = 0o660
"""Who may use the unix socket: root, and its group."""


class Admin:
    """The end point.  `pages` are those of others, by path; `unready` says why the node is not
    ready, if it is not; `told` is called when `problems` changed.
    """

    def __init__(
        self,
        config: AdminConfig,
        pages: Mapping[str, Page],
        unready: Callable[[], str | None],
        told: Callable[[], None],
    ) -> None:
        self._config = config
        self._unready = unready
        self._told = told
        self._pages: dict[str, Page] = {
            **pages,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
        }
        self._clients = 0
        self.problems: tuple[Problem, ...] = ()

    async def run(self) -> None:
        """Serve for ever.  While somebody else has the address, say so and try again."""
        if not self._config.listen:
            return
        while True:
            try:
                server = await self._listen()
            except OSError as error:
                self._tell(error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                break
        log.info("admin listen=%s", self._config.listen)
        self._tell(None)
        try:
            async with server:
                await server.serve_forever()
        finally:
            if self._config.path is not None:
                _remove(self._config.path)

    async def _listen(self) -> asyncio.Server:
        path = self._config.path
        if path is None:
            host, port = split_endpoint(self._config.listen)
            return await asyncio.start_server(self._serve, host, port)
        server = await asyncio.start_unix_server(self._serve, path)
        os.chmod(path, _OWN)
        return server

    def _tell(self, error: OSError | None) -> None:
        before, self.problems = self.problems, ()
        if error is not None:
            message = (
                f"{self._config.listen} cannot be listened on, there are no metrics: "
                f"{error.strerror or error}: end who has it, or choose another `listen` in [admin] "
                "of agent.toml"
            )
            self.problems = (Problem(about="admin", message=message),)
        if self.problems != before:
            for problem in self.problems:
                log.warning("%s: %s", problem.about, problem.message)
            self._told()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            await http.serve(reader, writer, self._reply)
        finally:
            self._clients -= 1

    async def _reply(self, request: h11.Request) -> Reply:
        if self._clients > _MOST:
            return http.BUSY
        page = self._pages.get(request.target.decode("ascii", "replace").partition("?")[0])
        if page is None:
            known = f"there is {', '.join(self._pages)}\n"
            return Reply(known.encode(), status=HTTPStatus.NOT_FOUND)
        if not http.only_reads(request):
            return http.READ_ONLY
        accept = ",".join(v.decode("latin-1") for name, v in request.headers if name == b"accept")
        return await page(accept)

    async def _healthz(self, _accept: str) -> Reply:
        """The loop answers; that is all it needs."""
        return Reply(b"ok\n")

    async def _readyz(self, _accept: str) -> Reply:
        reason = self._unready()
        if reason is None:
            return Reply(b"ok\n")
        return Reply(f"{reason}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
