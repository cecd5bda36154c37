"""What etcd's endpoints say of themselves to whoever asks, with and without TLS."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from mesh.store import etcd_version
from mesh.store.etcd_channel import EtcdOptions
from tests.support.certificates import Authority
from tests.support.etcd import Etcd, etcd, free_port

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.cluster


async def test_each_endpoint_tells_its_version_and_clock_or_why_not(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with etcd(tmp_path) as server:
        found, silent = await etcd_version.ask(EtcdOptions((server.url, nobody)))

    assert (found.endpoint, found.error) == (server.url, "")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", found.version or "")
    assert found.ahead is not None
    assert abs(found.ahead) < 5
    assert (silent.endpoint, silent.version, silent.ahead) == (nobody, None, None)
    assert "refused" in silent.error


async def test_over_tls_a_client_shows_its_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    own, client = authority.issue("server", "127.0.0.1"), authority.issue("client")
    server = Etcd(tmp_path)
    secure = server.secured(own, authority)
    try:
        server.start()
        known = EtcdOptions(
            (secure,), ca=authority.certificate, cert=client.certificate, key=client.key
        )
        (found,) = await etcd_version.ask(known)
        strange = [
            EtcdOptions((secure,), ca=authority.certificate),
            EtcdOptions((secure,)),
            EtcdOptions((secure,), ca=str(tmp_path / "missing.pem")),
        ]
        refused = [(await etcd_version.ask(each))[0] for each in strange]
    finally:
        server.stop()

    assert found.version is not None
    assert [(each.version, bool(each.error)) for each in refused] == [(None, True)] * 3
