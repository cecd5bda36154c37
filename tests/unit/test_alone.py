"""The program of a host in no cluster touches nobody's packets but those to published ports."""

from __future__ import annotations

import ipaddress
import re

import pytest

from mesh.hostports import alone
from mesh.model.address import FAMILIES, Family
from mesh.rules import edition, elements, owner, program, xtables

SEGMENTS = ("172.17.0.0/16", "10.88.0.0/16", "fd17::/64")
PARAMETERS = alone.parameters(0xABC, SEGMENTS)
_USED = ("0.0.0.0/32", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
         "192.0.2.0/24", "224.0.0.0/3", "fc00::/7", "fe80::/10", "2000::/3", "::/96")  # fmt: skip


def test_its_addresses_are_nobodys() -> None:
    text = program.render(alone.parameters(1, ()))
    found = re.findall(r"(?<![\w.:])(?<!& )(?:\d+(?:\.\d+){3}|[0-9a-f]+:[0-9a-f:]+)(?:/\d+)?", text)
    own = {ipaddress.ip_network(each, strict=False) for each in found if each.count(":") != 5}
    own = {n for n in own if not n.is_loopback and str(n) not in ("0.0.0.0/32", "fe80::/10")}

    assert own
    for used in map(ipaddress.ip_network, _USED):
        for each in own:
            assert each.version != used.version or not each.overlaps(used), (each, used)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_network_of_containers_has_its_line_in_both_dialects(family: Family) -> None:
    own = [each for each in SEGMENTS if (":" in each) is (family is Family.V6)]
    ip = "ip" if family is Family.V4 else "ip6"
    tables = xtables.program(PARAMETERS, family)

    text = program.render(PARAMETERS)
    for each in own:
        assert f"{ip} saddr {each} {ip} daddr {each} masquerade" in text
    lines = [rule for rule in tables["nat"].chains["MESH-NAT-POST"] if "10.88" in rule or
             "172.17" in rule or "fd17" in rule]  # fmt: skip
    assert len(lines) == len(own)
    assert "172.17" not in program.render(alone.parameters(0xABC, ()))


def test_networks_are_another_version_and_owners_are_told() -> None:
    one, other = alone.parameters(1, SEGMENTS), alone.parameters(1, ())
    assert program.build(one).version != program.build(other).version
    assert program.build(one).schema == program.build(other).schema
    assert program.build(one) == program.build(alone.parameters(1, reversed(SEGMENTS)))
    assert f"{owner.SLOT} : 0xabc" in program.build(PARAMETERS).inet


def test_whose_rules_there_are_is_told_and_refused() -> None:
    slot = ("fingerprint", elements.mark_bytes(owner.SLOT))
    assert owner.of_fingerprint({slot: elements.mark_bytes(7)}) == 7
    assert owner.of_fingerprint({}) == owner.AGENT
    assert owner.of_canary("dd8e3da7.a2580751/1/abc") == 0xABC
    assert owner.of_canary("dd8e3da7.a2580751/1") == owner.AGENT
    assert edition.of_canary("dd8e3da7.a2580751/1/abc") == 1
    assert owner.refusal("x", 7, 7) is None
    for found, own, said in (
        (7, 0, "mesh unpublish --all"),
        (0, 7, "mesh service create"),
        (8, 7, "--force"),
    ):
        told = owner.refusal("table inet mesh", found, own)
        assert told is not None
        assert said in told
