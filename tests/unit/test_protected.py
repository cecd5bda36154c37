"""Ports that nobody publishes by accident."""

from __future__ import annotations

import msgspec
import pytest

from mesh.model import protected
from mesh.model.cluster import Cluster
from mesh.model.publish import Protocol

CLUSTER = Cluster(id="c", prefix6="fd00:1::/48")
TCP, UDP, SCTP = Protocol


def test_ssh_and_etcd_are_protected_and_may_be_forced() -> None:
    for port in (22, 2379, 2380):
        found = protected.protection(CLUSTER, TCP, port)

        assert found is not None
        assert found.forcible
        assert protected.protection(CLUSTER, UDP, port) is None


def test_the_overlay_s_own_ports_are_nobody_s_whatever_he_says() -> None:
    cluster = msgspec.structs.replace(CLUSTER, protected_ports=("51820/udp",))

    for port in (51820, 4790):
        found = protected.protection(cluster, UDP, port)

        assert found is not None
        assert not found.forcible
        assert protected.protection(CLUSTER, TCP, port) is None


def test_the_list_is_the_cluster_s_and_an_entry_without_protocol_means_all() -> None:
    cluster = msgspec.structs.replace(CLUSTER, protected_ports=("6000-6001", "53/UDP"))

    assert protected.barred(cluster, TCP) == {6000, 6001}
    assert protected.barred(cluster, UDP) == {6000, 6001, 53, 51820, 4790}
    assert protected.barred(cluster, SCTP) == {6000, 6001}
    found = protected.protection(cluster, SCTP, 6001)
    assert found is not None
    assert "6000-6001" in found.reason


@pytest.mark.parametrize("entry", ["", "ssh", "0", "65536", "9-8", "22/icmp", "22/", "22/tcp/udp"])
def test_an_entry_that_means_nothing_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="protected port"):
        msgspec.structs.replace(CLUSTER, protected_ports=(entry,))
