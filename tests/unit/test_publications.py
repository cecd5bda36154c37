"""Who may have which port of a host without etcd, and in which words it may be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mesh.errors import BadUsage, Conflict
from mesh.hostports import asked
from mesh.hostports.publications import Publications, Request, Settings, addresses_of
from mesh.model.mapping import Cursors, PortMapping
from mesh.model.publish import Protocol, PublishedPort, PublishMode

if TYPE_CHECKING:
    from mesh.hostports.publications import Listener, Publication

BOTH = ("172.17.0.2", "fd17::2")


def nobody(_port: PublishedPort) -> str | None:
    return None


class Host:
    """A host, and where its searches go on."""

    def __init__(self, listener: Listener = nobody, **settings: Any) -> None:
        self.publications = Publications(Settings(**settings))
        self.listener = listener
        self.cursors = Cursors()
        self.draw = 0

    def publish(
        self, task: str, *texts: asked.Asked, addresses: tuple[str, ...] = BOTH
    ) -> Publication:
        self.draw += 1
        request = Request(task, addresses, asked.ports(texts), self.draw)
        found, self.cursors = self.publications.decide(request, self.cursors, self.listener)
        self.publications.put(found)
        return found

    def numbers(self, task: str, *texts: asked.Asked) -> list[int | None]:
        return [port.published for port in self.publish(task, *texts).ports]


def test_a_port_has_one_owner_whose_name_is_told() -> None:
    host = Host()
    host.publish("web", "8080:80", "53:53/udp")

    with pytest.raises(Conflict, match=r"8080/tcp is published by task web.*choose another"):
        host.publish("api", "8080:8080")
    with pytest.raises(Conflict, match=r"on 192\.0\.2\.1 is published by task web"):
        host.publish("api", "192.0.2.1:8080:8080")
    host.publish("api", "8080:8080/udp", "53:53/tcp")


def test_addresses_of_the_host_are_apart_and_any_address_is_all_of_them() -> None:
    host = Host()
    host.publish("web", "192.0.2.1:8080:80", "[2001:db8::1]:8080:80")
    host.publish("api", "192.0.2.2:8080:80")

    for text in ("8080:80", "192.0.2.1:8080:80", "[2001:db8::1]:8080:80"):
        with pytest.raises(Conflict, match="published by task"):
            host.publish("new", text)


def test_what_was_dropped_is_free() -> None:
    host = Host()
    host.publish("web", "8080:80", "80")
    host.publications.drop("web")
    host.publications.drop("web")

    assert host.numbers("api", "8080:80") == [8080]
    assert list(host.publications.names()) == ["api"]


def test_numbers_are_given_in_turn_and_kept() -> None:
    host = Host(dynamic=(32000, 32002))
    assert host.numbers("web", "80", "81", "80/udp") == [32000, 32001, 32000]
    assert host.numbers("web", "81", "80") == [32001, 32000]
    assert host.numbers("api", "80") == [32002]
    with pytest.raises(Conflict, match=r"all dynamic tcp ports \(32000-32002\) are taken"):
        host.publish("new", "80")
    assert host.publications.get("new") is None

    host.publications.drop("web")
    assert host.numbers("new", "80") == [32000]


def test_a_freed_number_rests_for_a_round() -> None:
    host = Host(dynamic=(32000, 32002))
    given = []
    for task in "abcd":
        given += host.numbers(task, "80")
        host.publications.drop(task)

    assert given == [32000, 32001, 32002, 32000]


def test_numbers_leave_out_what_is_named_held_protected_or_listened_on() -> None:
    def listener(port: PublishedPort) -> str | None:
        return "nginx (process 7)" if port.published == 32002 else None

    host = Host(listener, dynamic=(32000, 32005), protected=("32003",))
    host.publish("web", "32000:80")

    assert host.numbers("api", "80", "32001:81", "82") == [32004, 32001, 32005]


def test_random_numbers_differ_each_time_and_are_kept() -> None:
    host = Host()
    tasks = [f"t{n}" for n in range(20)]
    given = [host.numbers(task, "target=80,published=random")[0] for task in tasks]

    assert len(set(given)) == len(given)
    assert given != sorted(g for g in given if g is not None)
    assert [host.numbers(t, "target=80,published=random")[0] for t in tasks] == given


def test_protected_ports_are_given_by_force() -> None:
    host = Host()
    with pytest.raises(Conflict, match=r"22/tcp is protected \(22/tcp\)"):
        host.publish("ssh", "22:22")
    assert host.numbers("ssh", PublishedPort(target=22, published=22, force=True)) == [22]
    assert host.numbers("ssh", "22:22") == [22]
    assert host.numbers("dns", "22:22/udp", "51820:51820/udp") == [22, 51820]


def test_who_listens_is_named_unless_the_port_was_the_tasks_before() -> None:
    host = Host(lambda port: "nginx (process 7)" if port.published == 80 else None)
    with pytest.raises(Conflict, match=r"80/tcp is used by nginx \(process 7\)"):
        host.publish("web", "80:80")
    assert host.numbers("web", PublishedPort(target=80, published=80, force=True)) == [80]

    host.publish("api", "81:80")
    host.listener = lambda port: "its own proxy (process 8)"
    assert host.numbers("api", "81:81") == [81]


@pytest.mark.parametrize(
    ("texts", "addresses", "said"),
    [
        (("8080:80", "8080:81"), BOTH, "asked for twice"),
        (("127.0.0.1:8080:80",), BOTH, "do not answer on 127.0.0.1"),
        (("[::1]:8080:80",), BOTH, "do not answer on ::1"),
        (("[2001:db8::1]:8080:80",), BOTH[:1], "no address of that family"),
        (("target=80,mode=ingress",), BOTH, "mesh service create"),
        (("8080:80",), (), "give one, or an IPv4 and an IPv6"),
        (("8080:80",), ("172.17.0.2", "172.17.0.3"), "give one, or an IPv4 and an IPv6"),
        (("8080:80",), ("127.0.0.1",), "cannot be a host's"),
    ],
)
def test_what_nobody_could_have_is_bad_usage(
    texts: tuple[str, ...], addresses: tuple[str, ...], said: str
) -> None:
    with pytest.raises(BadUsage, match=said):
        Host().publish("web", *texts, addresses=addresses)


def test_mappings_are_galaxys() -> None:
    found = Host().publish("web", "192.0.2.1:8080:80", "[2001:db8::1]:8080:80", "53:53/udp")

    assert [(m.host_ip, m.host_port, m.protocol, m.pod_ip) for m in found.mappings] == [
        ("192.0.2.1", 8080, Protocol.TCP, "172.17.0.2"),
        ("2001:db8::1", 8080, Protocol.TCP, "fd17::2"),
        ("", 53, Protocol.UDP, "172.17.0.2"),
    ]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("8080:80", ["*:8080->80/tcp"]),
        ("80", ["*:*->80/tcp"]),
        ("[2001:db8::1]:8000-8001:80-81/UDP", ["[2001:db8::1]:8000->80/udp",
                                               "[2001:db8::1]:8001->81/udp"]),
        ({"hostPort": 8080, "containerPort": 80, "protocol": "TCP"}, ["*:8080->80/tcp"]),
        ({"hostPort": 0, "containerPort": 80, "hostIP": ""}, ["*:*->80/tcp"]),
        ({"target": 80, "published": 53, "protocol": "udp", "hostIP": "192.0.2.1"},
         ["192.0.2.1:53->80/udp"]),
        (PublishedPort(target=80), ["*:*->80/tcp"]),
        (PortMapping(host_port=1, container_port=2, protocol=Protocol.SCTP, pod_name="", pod_ip=""),
         ["*:1->2/sctp"]),
    ],
)  # fmt: skip
def test_ports_are_asked_for_in_many_shapes(given: asked.Asked, meant: list[str]) -> None:
    assert [str(port) for port in asked.ports([given])] == meant
    assert all(port.mode is PublishMode.HOST for port in asked.ports([given]))


@pytest.mark.parametrize(
    "given",
    ["", "99999:80", "8080:80/icmp", {"hostPort": 1}, {"containerPort": 80, "nodePort": 1},
     {"containerPort": "80"}, {"target": 80, "protocol": "icmp"}, {"target": 0}, {}, 8080, None],
)  # fmt: skip
def test_what_is_no_port_is_bad_usage(given: Any) -> None:
    with pytest.raises(BadUsage):
        asked.ports([given])


def test_addresses_are_one_or_one_of_each_family() -> None:
    assert addresses_of("172.17.0.2") == ("172.17.0.2",)
    assert addresses_of(["fd17::2", "172.17.0.2"]) == BOTH
    with pytest.raises(BadUsage, match="container address"):
        addresses_of("10.88.0")


@pytest.mark.parametrize(
    "wrong", [{"dynamic": (0, 5)}, {"dynamic": (9, 5)}, {"protected": ("x",)}], ids=str
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadUsage):
        Settings(**wrong).check()
