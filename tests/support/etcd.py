"""etcd servers of one's own: on loopback, on free ports, stopped by their process id."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.support.certificates import Authority, Identity

HEALTHY_WITHIN = 30.0

# Below the kernel's ephemeral range, so that no client's own port is ever in the way.
_ports = itertools.count(20_000)


def free_port() -> int:
    """A TCP port nobody uses now, never handed out before: tests have a namespace of their own."""
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError  # the count has no end


@dataclass
class Etcd:
    """One member.  `url` is plain HTTP on loopback; `flags` are added to its command line."""

    directory: Path
    name: str = "etcd"
    flags: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    def secured(self, own: Identity, authority: Authority) -> str:
        """Have it serve clients with certificates over TLS, too; the URL.  Before `start`."""
        secure = f"https://127.0.0.1:{free_port()}"
        self.flags = (
            "--listen-client-urls", f"{self.url},{secure}", "--advertise-client-urls", secure,
            "--cert-file", own.certificate, "--key-file", own.key,
            "--trusted-ca-file", authority.certificate, "--client-cert-auth",
        )  # fmt: skip
        return secure

    def start(self) -> None:
        """Start, or start again on the same data and ports."""
        self.launch()
        self.wait_healthy()

    def launch(self) -> None:
        """Start without waiting."""
        cluster = () if "--initial-cluster" in self.flags else (
            "--initial-cluster", f"{self.name}={self.peer_url}",
        )  # fmt: skip
        clients = () if "--listen-client-urls" in self.flags else (
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
        )  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "etcd", "--name", self.name, "--data-dir", str(self._data),
                    "--listen-peer-urls", self.peer_url,
                    "--initial-advertise-peer-urls", self.peer_url,
                    "--heartbeat-interval", "50", "--election-timeout", "500",
                    "--logger", "zap",
                    *cluster, *clients, *self.flags,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,  # it may be stopped, and so a stopped job of its group
            )  # fmt: skip

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + HEALTHY_WITHIN
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if json.load(answer)["health"] == "true":
                        return
            except (OSError, KeyError, ValueError):
                pass
            time.sleep(0.05)
        log = (self.directory / f"{self.name}.log").read_text()
        raise AssertionError(f"etcd {self.name} is not healthy:\n{log[-2000:]}")

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process and wait for it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Connections stay open and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Lose the disk; the server must be stopped."""
        assert self.process is None
        shutil.rmtree(self._data)

    def compact(self, revision: int) -> None:
        self.gateway("kv/compaction", {"revision": str(revision), "physical": True})

    def gateway(self, path: str, body: Mapping[str, object], token: str = "") -> dict[str, object]:
        """Call the server's JSON gateway: an administrator independent of the code under test."""
        headers = {"Authorization": token} if token else {}
        request = urllib.request.Request(
            f"{self.url}/v3/{path}", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            reply: dict[str, object] = json.load(answer)
            return reply

    @property
    def _data(self) -> Path:
        return self.directory / f"{self.name}.data"


def encoded(text: str) -> str:
    """Keys and values in the JSON gateway are base64."""
    return base64.b64encode(text.encode()).decode()


@contextmanager
def etcd(directory: Path, *flags: str) -> Iterator[Etcd]:
    """A running server of one member."""
    server = Etcd(directory, flags=flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def cluster(directory: Path, size: int) -> Iterator[list[Etcd]]:
    """A running cluster of several members."""
    members = [Etcd(directory, name=f"m{number}") for number in range(size)]
    peers = ",".join(f"{member.name}={member.peer_url}" for member in members)
    with ExitStack() as stack:
        for member in members:
            member.flags = ("--initial-cluster", peers)
            stack.callback(member.stop)
            member.launch()
        for member in members:
            member.wait_healthy()
        yield members
