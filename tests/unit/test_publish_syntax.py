"""Published ports as text: every example of Swarm's and Warren's parsers, and what is ours."""

from __future__ import annotations

import re
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model import publish_syntax
from mesh.model.publish import PORTS, Protocol, PublishedPort, PublishMode, bracketed

INGRESS, HOST = PublishMode.INGRESS, PublishMode.HOST

SWARM: Final = {
    # the short syntax: published -> target/protocol
    "80": "*->80/tcp",
    "80:8080": "80->8080/tcp",
    "8080:80/tcp": "8080->80/tcp",
    "8080:80/TCP": "8080->80/tcp",
    "80:8080/udp": "80->8080/udp",
    "80:8080/sctp": "80->8080/sctp",
    "80-81:8080-8081/tcp": "80->8080/tcp 81->8081/tcp",
    "80-82:8080-8082/udp": "80->8080/udp 81->8081/udp 82->8082/udp",
    "80-82:8080/udp": "80->8080/udp 81->8080/udp 82->8080/udp",
    "80-80:8080/tcp": "80->8080/tcp",
    "8000-8002": "*->8000/tcp *->8001/tcp *->8002/tcp",
    ":80": "*->80/tcp",
    # the long one
    "target=80": "*->80/tcp",
    "target=80,protocol=tcp": "*->80/tcp",
    "target=80,published=8080,protocol=tcp": "8080->80/tcp",
    "published=80,target=8080,protocol=tcp": "80->8080/tcp",
    "target=80,published=8080,mode=ingress": "8080->80/tcp",
    "TARGET=80,Published=8080,Protocol=UDP,Mode=Ingress": "8080->80/udp",
    '"target=80","published=8080"': "8080->80/tcp",
    "target=8080-8081,published=80-81": "80->8080/tcp 81->8081/tcp",
    "target=8080,published=80-81": "80->8080/tcp 81->8080/tcp",
}


@pytest.mark.parametrize("spec", SWARM)
def test_what_swarm_accepts_means_the_same_here(spec: str) -> None:
    found = publish_syntax.parse(spec, INGRESS)

    assert SWARM[spec].split() == [
        f"{port.published or '*'}->{port.target}/{port.protocol.value}" for port in found
    ]
    assert {port.mode for port in found} == {INGRESS}


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("1.1.1.1:80:80", "1.1.1.1:80->80/tcp"),
        ("192.0.2.1:8080:80", "192.0.2.1:8080->80/tcp"),
        ("0.0.0.0:8080:80", "0.0.0.0:8080->80/tcp"),
        ("192.0.2.1::80/udp", "192.0.2.1:*->80/udp"),
        ("[2001:DB8:0::1]:8080:80", "[2001:db8::1]:8080->80/tcp"),
        ("[::1]::80/sctp", "[::1]:*->80/sctp"),
        ("[::1]:80-81:90-91", "[::1]:80->90/tcp [::1]:81->91/tcp"),
        ("target=80,published=8080,host_ip=192.0.2.1", "192.0.2.1:8080->80/tcp"),
        ("target=80,published=8080,hostIP=2001:db8::1", "[2001:db8::1]:8080->80/tcp"),
        ("target=80,published=8080,host-ip=[2001:db8::1]", "[2001:db8::1]:8080->80/tcp"),
        ("target=80,published=8080,mode=host", "*:8080->80/tcp"),
        ("target=80,published=8080,protocol=tcp,mode=host", "*:8080->80/tcp"),
    ],
)
def test_a_host_address_makes_a_port_answer_there_only(spec: str, wanted: str) -> None:
    found = publish_syntax.parse(spec, HOST)

    assert wanted == " ".join(map(str, found))
    assert {port.mode for port in found} == {HOST}


def test_a_mode_in_the_text_wins_over_the_default() -> None:
    assert [p.mode for p in publish_syntax.parse("target=80,mode=host", INGRESS)] == [HOST]
    assert [p.mode for p in publish_syntax.parse("target=80,mode=ingress", HOST)] == [INGRESS]


def test_a_random_port_has_no_number_and_says_so() -> None:
    found = publish_syntax.parse("target=80-81,published=random,name=Web", HOST)

    assert found == tuple(
        PublishedPort(target=target, random=True, name="Web") for target in (80, 81)
    )


SHORT: Final = publish_syntax.SHORT
NUMBERS: Final = "1-65535, or a range"
REFUSED: Final = [
    # text, the part that is wrong, what is allowed
    ("", "no target port", SHORT),
    ("9999999", "target port '9999999'", NUMBERS),
    ("tcp", "target port 'tcp'", NUMBERS),
    ("udp", "target port 'udp'", NUMBERS),
    ("80/xyz", "protocol 'xyz'", "tcp, udp or sctp"),
    ("80:80/", "protocol ''", "tcp, udp or sctp"),
    ("80:80/tcp/udp", "more than one '/'", SHORT),
    ("80-82:8080-8081", "published 80-82 and target 8080-8081", "make them equal"),
    ("80:8080-8081", "published 80 and target 8080-8081", "make them equal"),
    ("8080:", "no target port", SHORT),
    ("99999:80", "published port '99999'", NUMBERS),
    ("81-80:80", "published port '81-80'", NUMBERS),
    ("0:80", "published port '0'", "leave it out for a dynamic port"),
    ("80abc:80", "published port '80abc'", NUMBERS),
    ("80:80abc", "target port '80abc'", NUMBERS),
    ("-80:80", "published port '-80'", NUMBERS),
    ("+80:80", "published port '+80'", NUMBERS),
    (" 80:80", "published port ' 80'", NUMBERS),
    ("٣:80", "published port '٣'", NUMBERS),
    ("9" * 5000 + ":80", "published port", NUMBERS),
    ("1:2:3:4", "IPv6 host address", "in brackets"),
    ("::1:80:80", "IPv6 host address", "in brackets"),
    ("[zz]:1:2", "host address: 'zz'", "in brackets"),
    ("1.2.3:80:80", "host address: '1.2.3'", "in brackets"),
    ("fe80::1%eth0", "target port '1%eth0'", NUMBERS),
    ("[fe80::1%eth0]:80:80", "host address: 'fe80::1%eth0'", "without %eth0"),
    ("1.1.1.1:80", "behind a host address", "127.0.0.1::80"),
    ("[::1]:80", "behind a host address", "127.0.0.1::80"),
    ("[::1]", "behind a host address", "127.0.0.1::80"),
    ("invalid,target=80", "field 'invalid'", publish_syntax.LONG),
    ("target=80,", "field ''", publish_syntax.LONG),
    ("invalid=field", "field 'invalid'", "target, published, protocol, mode, host_ip, name"),
    ("target=80,target=81", "field 'target'", "twice"),
    ("protocol=invalid", "protocol 'invalid'", "tcp, udp or sctp"),
    ("target=invalid", "target port 'invalid'", NUMBERS),
    ("published=invalid", "published port 'invalid'", "leave it out"),
    ("target=80,published=", "published port ''", "leave it out"),
    ("mode=invalid", "mode 'invalid'", "host or ingress"),
    ("published=8080,protocol=tcp,mode=ingress", "no target port", "target="),
    ('target=80,protocol="tcp,mode=ingress"', "column 20", "around a whole field"),
    ('target=80,"protocol=tcp,mode=ingress"', "protocol 'tcp,mode=ingress'", "tcp, udp or sctp"),
    ('target=80,"protocol=tcp"x', "column 11", "around a whole field"),
    ("target=0", "target port '0'", NUMBERS),
    ("target=99999", "target port '99999'", NUMBERS),
    ("target=80,name=a b", "port name 'a b'", "letters, digits"),
    ("target=80,host_ip=192.0.2.1,mode=ingress", "hostIP", "mode host"),
    ("target=80,published=random,mode=ingress", "random", "mode host"),
]


@pytest.mark.parametrize(("spec", "part", "allowed"), REFUSED, ids=[r[0][:60] for r in REFUSED])
def test_a_refusal_quotes_the_text_and_names_the_part_and_what_is_allowed(
    spec: str, part: str, allowed: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(part)) as refusal:
        publish_syntax.parse(spec, HOST)

    told = str(refusal.value)
    assert repr(spec) in told
    assert allowed in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("spec", "gone"),
    [
        ("80", {8080, 8081}),
        ("80/udp", {53}),
        ("8081:80", {8081}),
        ("9999:80", set()),
        ("80-90/tcp", {8080, 8081, 8090}),
        ("target=90,mode=ingress", {8090}),
        ("target=80,published=8080-8099", {8080, 8081}),
    ],
)
def test_ports_are_chosen_by_target_and_if_given_by_published_port(
    spec: str, gone: set[int]
) -> None:
    ports = (
        PublishedPort(target=80, published=8080),
        PublishedPort(target=80, published=8081, mode=INGRESS),
        PublishedPort(target=90, published=8090),
        PublishedPort(target=80, published=53, protocol=Protocol.UDP),
    )

    chosen = publish_syntax.parse_chosen(spec)

    assert {port.published for port in ports if chosen.includes(port)} == gone


def _short(port: PublishedPort) -> str:
    host = f"{bracketed(port.host_ip)}:" if port.host_ip is not None else ""
    published = f"{port.published or ''}:" if host or port.published else ""
    return f"{host}{published}{port.target}/{port.protocol.value}"


_NUMBER = st.integers(min(PORTS), max(PORTS))
_HOST = st.none() | st.ip_addresses().map(str)
_PORT = st.builds(
    PublishedPort,
    target=_NUMBER,
    published=st.none() | _NUMBER,
    protocol=st.sampled_from(Protocol),
    host_ip=_HOST.filter(lambda text: text is None or "%" not in text),
)


@given(_PORT)
def test_every_port_can_be_written_in_the_short_syntax(port: PublishedPort) -> None:
    assert publish_syntax.parse(_short(port), HOST) == (port,)


@given(st.text(alphabet="0189:-/[].,=\"' atcpudprgmeo", max_size=30) | st.text(max_size=20))
def test_any_text_is_either_ports_or_an_error_that_quotes_it(spec: str) -> None:
    told = ""
    try:
        found = publish_syntax.parse(spec, HOST)
    except ValueError as error:
        found, told = (), str(error)

    assert found or repr(spec) in told
