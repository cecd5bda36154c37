"""What it costs to publish a container's ports without etcd, beside the CNI plugin portmap.

Three ways side by side, each in a network namespace of its own and with the same mappings before:
the library in a process that lives on, `mesh publish` as a whole process, and portmap, which is one
by nature.  They take turns, so that whatever else the machine does meets all of them.
`python -m mesh.bench.portmap` measures one backend (mesh.bench.isolated).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mesh.bench import figures, isolated
from mesh.bench.progress import tell
from mesh.dataplane import netns
from mesh.errors import MeshError
from mesh.hostports import HostPortPublisher
from mesh.lab import environment
from mesh.model import address

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PLUGIN: Final = Path("/usr/lib/cni/portmap")
"""Where Debian's package containernetworking-plugins has it."""

_LIBRARY, _COMMAND, _PORTMAP = "library", "command", "portmap"
_NETWORK: Final = "172.17.0.0/16"
_BRIDGE: Final = "docker0"
_TARGET: Final = 80
_FIRST, _BASE = 10000, 20000
"""The first port that is measured, and the first of those that were there before."""

_COMMAND_SHARE: Final = 4
"""A whole process is measured once in so many rounds."""


class _Place(NamedTuple):
    """One way's network namespace."""

    name: str

    def sh(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a program in it."""
        with netns.entered(f"/run/netns/{self.name}"):
            return subprocess.run(argv, capture_output=True, text=True, check=False, **more)


def run(backend: str, wanted: Mapping[str, Any]) -> list[dict[str, object]]:
    """The figures of one backend, for every number of `mappings` there were before and of `ports`
    that are published at once.
    """
    with tempfile.TemporaryDirectory() as scratch, _places() as places:
        portmap = _Portmap.open(places[_PORTMAP], backend, Path(scratch) / "programs")
        states = {name: Path(scratch) / name for name in (_LIBRARY, _COMMAND)}
        with netns.entered(f"/run/netns/{_LIBRARY}"):
            library = HostPortPublisher(states[_LIBRARY], backend=backend)
        with library:
            command = _Command(places[_COMMAND], states[_COMMAND], backend)
            rounds = _Rounds(library, command, portmap, backend)
            found: list[dict[str, object]] = []
            before = 0
            for mappings in sorted(wanted["mappings"]):
                rounds.fill(range(before, mappings))
                before = mappings
                found += [
                    rounds.measure(mappings, ports, wanted["rounds"]) for ports in wanted["ports"]
                ]
            return found


class _Rounds:
    """The three ways, taking turns."""

    def __init__(
        self,
        library: HostPortPublisher,
        command: _Command,
        portmap: _Portmap | None,
        backend: str,
    ) -> None:
        self._library = library
        self._command = command
        self._portmap = portmap
        self._backend = backend

    def fill(self, numbers: range) -> None:
        """Have one container more for each number, with one port."""
        for number in numbers:
            if number % 50 == 0:
                tell(f"{self._backend}: {number} mappings")
            task, at = f"base-{number}", address.nth(_NETWORK, 1000 + number)
            self._library.publish_ports(task, at, [f"{_BASE + number}:{_TARGET}"])
            if self._portmap is not None:
                self._portmap.call("ADD", task, at, [_BASE + number])
        self._command.fill(numbers)

    def measure(self, mappings: int, ports: int, rounds: int) -> dict[str, object]:
        """Publish and unpublish so many ports, again and again."""
        tell(f"{self._backend}: {mappings} mappings, {ports} ports at once")
        taken: dict[str, list[float]] = {}

        def timed(what: str, began: float) -> None:
            taken.setdefault(what, []).append(time.perf_counter() - began)

        numbers, at = list(range(_FIRST, _FIRST + ports)), address.nth(_NETWORK, 2)
        for turn in range(rounds + 1):
            task = f"probe-{turn}"
            began = time.perf_counter()
            self._library.publish_ports(task, at, [f"{n}:{_TARGET}" for n in numbers])
            timed("library publish", began)
            began = time.perf_counter()
            self._library.unpublish_ports(task)
            timed("library unpublish", began)
            if self._portmap is not None:
                for verb in ("ADD", "DEL"):
                    began = time.perf_counter()
                    self._portmap.call(verb, task, at, numbers)
                    timed(f"portmap {verb}", began)
            if turn % _COMMAND_SHARE == 0:
                for verb in ("publish", "unpublish"):
                    began = time.perf_counter()
                    self._command.call(verb, task, at, numbers)
                    timed(f"command {verb}", began)
        told = {what: _told(values) for what, values in taken.items()}
        return {
            "bench": "portmap",
            "backend": self._backend,
            "mappings": mappings,
            "ports": ports,
            "library_ms": {verb: told[f"library {verb}"] for verb in ("publish", "unpublish")},
            "command_ms": {verb: told[f"command {verb}"] for verb in ("publish", "unpublish")},
            "portmap_ms": {
                verb: told[f"portmap {name}"]
                for verb, name in (("publish", "ADD"), ("unpublish", "DEL"))
            }
            if self._portmap is not None
            else None,
        }


def _told(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds; the first round, which meets cold files, does not count."""
    counted = values[1:] if len(values) > 1 else values
    return {f"p{share}": round(figures.percentile(counted, share) * 1e3, 2) for share in (50, 99)}


class _Command:
    """`mesh publish` and `mesh unpublish`, each time another process."""

    def __init__(self, place: _Place, state: Path, backend: str) -> None:
        self._place = place
        self._state = state
        self._backend = backend
        self._environment = environment.with_this_package(os.environ)

    def fill(self, numbers: range) -> None:
        """Have containers there; by the library, for that is quicker."""
        with netns.entered(f"/run/netns/{self._place.name}"):
            publisher = HostPortPublisher(self._state, backend=self._backend)
        with publisher:
            for number in numbers:
                at = address.nth(_NETWORK, 1000 + number)
                publisher.publish_ports(f"base-{number}", at, [f"{_BASE + number}:{_TARGET}"])

    def call(self, verb: str, task: str, at: str, numbers: Sequence[int]) -> None:
        """Run one to its end.  Raises MeshError."""
        words = ["--state-dir", str(self._state), "--backend", self._backend]
        if verb == "publish":
            words += [at, *itertools.chain.from_iterable(("-p", f"{n}:{_TARGET}") for n in numbers)]
        done = self._place.sh(
            *(sys.executable, "-m", "mesh", verb, task, *words), env=self._environment
        )
        if done.returncode:
            raise MeshError(f"mesh {verb}: {done.stderr.strip()}")


class _Portmap:
    """The plugin, driven as a container runtime does: configuration on standard input."""

    def __init__(self, place: _Place, programs: Path, backend: str | None) -> None:
        self._place = place
        self._backend = backend
        self._environment = {**os.environ, "PATH": f"{programs}:{environment.SYSTEM_PATH}"}

    @classmethod
    def open(cls, place: _Place, backend: str, programs: Path) -> _Portmap | None:
        """One for a rule backend; None if there is no plugin, or none that knows this backend."""
        if not PLUGIN.exists():
            tell(f"{PLUGIN} is not there (apt install containernetworking-plugins): left out")
            return None
        programs.mkdir()
        if backend != "nftables":
            for name in ("iptables", "ip6tables"):
                flavoured = shutil.which(f"{name}-{backend.removeprefix('iptables-')}")
                if flavoured is None:
                    raise MeshError(f"{backend} is not installed: apt install iptables")
                (programs / name).symlink_to(os.path.realpath(flavoured))
        made = cls(place, programs, backend if backend == "nftables" else None)
        if made._backend is not None and not made._uses_nftables():
            tell(f"{PLUGIN} is of a version without nftables: left out")
            return None
        return made

    def _uses_nftables(self) -> bool:
        at = address.nth(_NETWORK, 2)
        self.call("ADD", "probe", at, [_FIRST])
        found = "cni_hostport" in self._place.sh("nft", "list", "tables").stdout
        self.call("DEL", "probe", at, [_FIRST])
        return found

    def call(self, verb: str, container: str, at: str, numbers: Sequence[int]) -> None:
        """ADD or DEL these ports of a container.  Raises MeshError."""
        told = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": "/proc/self/ns/net",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(PLUGIN.parent),
        }
        done = self._place.sh(
            str(PLUGIN), input=self._configuration(at, numbers), env=self._environment | told
        )
        if done.returncode:
            raise MeshError(f"portmap {verb}: {(done.stdout or done.stderr).strip()}")

    def _configuration(self, at: str, numbers: Sequence[int]) -> str:
        length = address.prefix_length(_NETWORK)
        config: dict[str, object] = {
            "cniVersion": "0.4.0",
            "name": "bench",
            "type": "portmap",
            "capabilities": {"portMappings": True},
            "runtimeConfig": {
                "portMappings": [
                    {"hostPort": number, "containerPort": _TARGET, "protocol": "tcp"}
                    for number in numbers
                ]
            },
            "prevResult": {
                "cniVersion": "0.4.0",
                "interfaces": [{"name": _BRIDGE}, {"name": "eth0", "sandbox": "/proc/self/ns/net"}],
                "ips": [{"version": "4", "interface": 1, "address": f"{at}/{length}"}],
            },
        }
        if self._backend is not None:
            config["backend"] = self._backend
        return json.dumps(config)


@contextmanager
def _places() -> Iterator[dict[str, _Place]]:
    """A namespace for each way, all alike: a bridge with the network of the containers."""
    names = (_LIBRARY, _COMMAND, _PORTMAP)
    for name in names:
        _do("ip", "netns", "add", name)
        for words in (
            ("link", "set", "lo", "up"),
            ("link", "add", _BRIDGE, "type", "bridge"),
            ("addr", "add", f"{address.nth(_NETWORK, 1)}/16", "dev", _BRIDGE),
            ("link", "set", _BRIDGE, "up"),
        ):
            _do("ip", "-n", name, *words)
        with netns.entered(f"/run/netns/{name}"):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    try:
        yield {name: _Place(name) for name in names}
    finally:
        for name in names:
            _do("ip", "netns", "del", name)


def _do(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MeshError(f"{' '.join(argv)}: {done.stderr.strip()}")


def _measure(wanted: Mapping[str, Any]) -> list[dict[str, object]]:
    return run(wanted["backend"], wanted)


if __name__ == "__main__":
    isolated.answer(_measure)
