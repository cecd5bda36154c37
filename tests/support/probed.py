"""Health as a replica tells it: a server in its network, which a test has answer as it likes."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from mesh.dataplane import netns

PORT: Final = 9000
PATH: Final = "/healthz"

QUICK: Final = {
    "type": "http",
    "port": PORT,
    "path": PATH,
    "interval": "200ms",
    "timeout": "10s",
    "fall": 2,
}
"""A check that notices within half a second; patient on a crowded machine."""


class HealthServer:
    """Answers on `PATH` in the network namespace at a path, until closed."""

    def __init__(self, path: str) -> None:
        self.status = 200

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805
                handler.send_response(self.status if handler.path == PATH else 404)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        self._server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
        self._server.socket.close()
        with netns.entered(path):
            self._server.socket = socket.create_server(("0.0.0.0", PORT))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
