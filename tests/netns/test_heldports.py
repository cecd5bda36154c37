"""Held ports, listeners and reserved ports, as the kernel has them, in a namespace of their own."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from mesh.agent import systemd
from mesh.dataplane import localports, netns, sockdiag
from mesh.hostports import reservation
from mesh.hostports.reservation import Reservation
from mesh.model.listener import Binding
from mesh.model.publish import Protocol
from tests.support.namespaces import Namespace
from tests.support.stranger import can_bind

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.netns

NODE: Final = "heldports"
PATH: Final = f"/run/netns/{NODE}"
TCP, UDP, SCTP = Protocol
LOCAL: Final = ("192.0.2.1", "2001:db8::1")
LOOPBACK: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
KINDS: Final = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM}


@pytest.fixture(scope="module")
def node() -> Iterator[Namespace]:
    made = Namespace(NODE)
    try:
        for address in LOCAL:
            words = ("nodad",) if ":" in address else ()
            made.sh("ip", "addr", "add", address, "dev", "lo", *words)
        yield made
    finally:
        made.close()


@pytest.fixture
def held(node: Namespace) -> Iterator[Reservation]:
    with netns.entered(PATH), closing(Reservation(1000)) as made:
        yield made


def exchange(family: socket.AddressFamily, protocol: Protocol, port: int) -> str:
    """What becomes of a request to a port of the loopback."""
    with socket.socket(family, KINDS[protocol]) as client:
        client.settimeout(10)
        try:
            client.connect((LOOPBACK[family], port))
            client.send(b"?")
            client.recv(1)
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"
    return "answered"


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_held_port_can_be_had_by_nobody_and_refuses_at_once(
    held: Reservation, protocol: Protocol
) -> None:
    before = can_bind(PATH, 8080, protocol)
    failed = held.hold([Binding(protocol, 8080, None)])
    during = can_bind(PATH, 8080, protocol)
    outcomes = {exchange(family, protocol, 8080) for family in LOOPBACK}
    held.close()

    assert failed == {}
    assert (before, during) == (True, False)
    assert outcomes == {"refused"}
    assert can_bind(PATH, 8080, protocol)


def test_a_port_of_one_address_leaves_the_others_alone(held: Reservation) -> None:
    bindings = [Binding(p, 8080, a) for p in (TCP, UDP) for a in (*LOCAL, "198.51.100.7")]
    assert held.hold(bindings) == {}

    for protocol in (TCP, UDP):
        for address in (*LOCAL, *LOOPBACK.values()):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, KINDS[protocol]) as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken = _is_taken(other, address)
            assert taken is (address in LOCAL), (protocol, address)


def _is_taken(one: socket.socket, address: str) -> bool:
    try:
        one.bind((address, 8080))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def test_the_kernel_lends_no_held_port_to_connections_of_the_host(
    node: Namespace, held: Reservation
) -> None:
    key = "net.ipv4.ip_local_port_range"
    before = node.sh("sysctl", "-n", key).strip()
    node.sh("sysctl", "-qw", f"{key}=40000 40019")
    held.hold([Binding(p, n, None) for p in (TCP, UDP) for n in (40004, 40008, 40011)])

    lent: set[int] = set()
    with ExitStack() as stack:
        for family, address in LOOPBACK.items():
            server = stack.enter_context(socket.create_server((address, 50000), family=family))
            for _ in range(500):
                with socket.socket(family, socket.SOCK_DGRAM) as client:
                    client.connect((address, 9))
                    lent.add(client.getsockname()[1])
            for _ in range(6):  # as many as there are ports: each stays in use
                client = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                client.connect((address, 50000))
                stack.enter_context(server.accept()[0])
                lent.add(client.getsockname()[1])
    node.sh("sysctl", "-qw", f"{key}={before}")

    assert lent
    assert lent <= set(range(40000, 40020))
    assert lent.isdisjoint({40004, 40008, 40011})


def test_a_port_is_held_beside_connections_of_a_server_that_is_gone(held: Reservation) -> None:
    with socket.create_server(("127.0.0.1", 8090)) as server:
        client = socket.create_connection(server.getsockname())
        assert set(held.hold([Binding(TCP, 8090, None)])) == {Binding(TCP, 8090, None)}
        accepted, _ = server.accept()
        accepted.close()  # the server's side ends first, and waits for a minute
        client.recv(1)
        client.close()

    assert held.hold([Binding(TCP, 8090, None)]) == {}
    assert not can_bind(PATH, 8090, TCP)
    assert exchange(socket.AF_INET, TCP, 8090) == "refused"


def test_the_limit_of_descriptors_is_kept_and_told(node: Namespace) -> None:
    with netns.entered(PATH), closing(Reservation(2)) as few:
        bindings = [Binding(TCP, 8080 + n, None) for n in range(3)]
        failed = few.hold(bindings)
        before = set(few.lacking)
        few.release(bindings[:1])
        few.hold(before)

        assert failed == {}
        assert before == {bindings[2]}
        assert few.lacking == set()


def test_a_thousand_ports_are_held_with_the_usual_soft_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\n"
        "from mesh.hostports import reservation\n"
        "from mesh.model.listener import Binding\n"
        "from mesh.model.publish import Protocol\n"
        "held = reservation.Reservation(reservation.raise_limit())\n"
        "wanted = [Binding(p, 9000 + n, None) for n in range(1000) for p in Protocol]\n"
        "print(held.hold(wanted), len(held.lacking))\n"
    )
    argv = (*("unshare", "--net", sys.executable, "-c", script),)

    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert hard >= soft
    assert done.stdout.strip() == "{} 0", done.stderr


def test_many_ports_at_once_take_a_descriptor_each_as_far_as_there_are_any() -> None:
    script = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))\n"
        "from mesh.hostports.reservation import Reservation\n"
        "from mesh.model.listener import Binding\n"
        "from mesh.model.publish import Protocol\n"
        "held = Reservation(1000)\n"
        "for first, last in ((9000, 9200), (9200, 9500)):\n"
        "    before = set(os.listdir('/proc/self/fd'))\n"
        "    wanted = [Binding(Protocol.TCP, n, None) for n in range(first, last)]\n"
        "    spare = os.open('/dev/null', os.O_RDONLY)\n"  # to count with when all are taken
        "    failed = held.hold(wanted)\n"
        "    os.close(spare)\n"
        "    more = len(os.listdir('/proc/self/fd')) - len(before)\n"
        "    lacking = len(held.lacking)\n"
        "    print(failed, more + lacking - len(wanted), 100 < lacking < 200)\n"
    )
    argv = ("unshare", "--net", sys.executable, "-c", script)

    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert done.stdout.splitlines() == ["{} 0 False", "{} 0 True"], done.stderr


# ---- who listens


@contextmanager
def listening(family: int, kind: int, address: str, *, only6: bool = False) -> Iterator[int]:
    with netns.entered(PATH):
        one = socket.socket(family, kind)
    with one:
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only6))
        one.bind((address, 8080))
        if kind == socket.SOCK_STREAM:
            one.listen()
        yield os.fstat(one.fileno()).st_ino


@pytest.mark.parametrize(
    ("family", "address", "only6", "shown"),
    [
        (socket.AF_INET, "0.0.0.0", False, "0.0.0.0"),
        (socket.AF_INET, "192.0.2.1", False, "192.0.2.1"),
        (socket.AF_INET6, "::", False, ""),
        (socket.AF_INET6, "::", True, "::"),
        (socket.AF_INET6, "2001:db8::1", False, "2001:db8::1"),
        (socket.AF_INET6, "::ffff:192.0.2.1", False, "192.0.2.1"),
    ],
)
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_listeners_are_known_with_their_addresses_and_processes(
    held: Reservation, protocol: Protocol, family: int, address: str, only6: bool, shown: str
) -> None:
    held.hold([Binding(p, 8081, None) for p in Protocol])
    with (
        listening(family, KINDS[protocol], address, only6=only6) as inode,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connected,
    ):
        connected.connect(("192.0.2.1", 9))
        found = sockdiag.listening()
        owners = sockdiag.owners({one.inode for one in found})

    assert found == {sockdiag.Socket(protocol, 8080, shown, inode)}
    assert owners[inode].pid == os.getpid()
    assert owners[inode].name == Path("/proc/self/comm").read_text().strip()


def test_sockets_of_the_kernel_and_of_nobody_have_owners_too() -> None:
    assert sockdiag.owners({0, 1}) == {0: sockdiag.KERNEL, 1: sockdiag.UNKNOWN}


def test_a_look_at_listeners_costs_no_look_at_connections(held: Reservation) -> None:
    held.hold([Binding(UDP, 9000 + n, None) for n in range(900)])
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(server.getsockname()))
            stack.enter_context(server.accept()[0])

        assert len(sockdiag.listening()) == 1


# ---- over a restart


def test_systemd_keeps_held_ports_for_the_next_agent(
    held: Reservation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "notify")
    bindings = [Binding(p, 8080, None) for p in (TCP, UDP)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        store = systemd.Store({})
        held.hold([*bindings, Binding(TCP, 8081, None)])
        store.keep(held.changed())
        kept = _kept(manager, {})
        held.release([Binding(TCP, 8081, None)])
        store.keep(held.changed())
        kept = _kept(manager, kept)
        held.close()  # the agent ends, however
        between = can_bind(PATH, 8080)

        with closing(Reservation(10)) as fresh:
            fresh.adopt([d for name in ("t8080", "u8080") for d in kept[name]], frozenset(bindings))
            again = systemd.Store({name: fresh.descriptors(name) for name in ("t8080", "u8080")})
            again.keep(fresh.changed())
            told = _kept(manager, {})
            after = fresh.hold(bindings)
            fresh.adopt([], frozenset())

    assert set(kept) == {"t8080", "u8080", "t8081"}
    assert kept["t8081"] == []
    assert not between
    assert (after, told) == ({}, {})
    assert can_bind(PATH, 8080)


def _kept(manager: socket.socket, before: dict[str, list[int]]) -> dict[str, list[int]]:
    """What systemd would keep by what it was told; a name that it was to forget keeps nothing."""
    found = dict(before)
    manager.setblocking(False)
    while True:
        try:
            said, rights, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
        except BlockingIOError:
            return found
        words = dict(line.split("=", 1) for line in said.decode().splitlines())
        descriptors = array.array("i")
        for _, _, data in rights:
            descriptors.frombytes(data)
        if "FDSTOREREMOVE" in words:
            for descriptor in found.get(words["FDNAME"], []):
                os.close(descriptor)
            found[words["FDNAME"]] = []
        else:
            assert words["FDPOLL"] == "0"
            found[words["FDNAME"]] = list(descriptors)


def test_descriptors_of_systemd_are_taken_by_their_process_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for pid, expected in ((os.getpid(), {"t1": (3, 5), "u1": (4,)}), (os.getpid() + 1, {})):
        monkeypatch.setenv("LISTEN_PID", str(pid))
        monkeypatch.setenv("LISTEN_FDS", "3")
        monkeypatch.setenv("LISTEN_FDNAMES", "t1:u1:t1")
        monkeypatch.setattr(os, "set_inheritable", lambda *_: None)

        assert systemd.given() == expected
        assert "LISTEN_FDS" not in os.environ


def test_names_that_systemd_could_not_give_back_are_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        monkeypatch.setattr(systemd, "_LONGEST", 20)

        systemd.Store({}).keep({f"t{n}": (0,) for n in range(1000, 1010)})

        assert len(_kept(manager, {})) == 3


# ---- ports that are not lent


def test_reserved_ports_are_added_to_the_host_s_and_taken_out_again(
    node: Namespace, tmp_path: Path
) -> None:
    key = "net.ipv4.ip_local_reserved_ports"
    node.sh("sysctl", "-qw", f"{key}=33000-33009,40000")

    async def reserve() -> None:
        localports.reserve((range(30000, 32000), range(32000, 33005)), tmp_path)

    async def give_back() -> None:
        localports.give_back(tmp_path)

    node.run(reserve())
    once = node.sh("sysctl", "-n", key).strip()
    node.run(reserve())
    twice = node.sh("sysctl", "-n", key).strip()
    node.run(give_back())
    after = node.sh("sysctl", "-n", key).strip()
    left = list(tmp_path.iterdir())
    node.run(asyncio.sleep(0))
    node.sh("sysctl", "-qw", f"{key}=")

    assert once == twice == "32768-33009,40000"
    assert after == "33000-33009,40000"
    assert left == []
    assert reservation.raise_limit() > 0
