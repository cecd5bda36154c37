"""A host without etcd, and one that publishes on it with each backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support import drivers
from tests.support.lonehost import lone_host, publishing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mesh.hostports import HostPortPublisher
    from tests.support.namespaces import Namespace


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    with lone_host() as made:
        yield made


@pytest.fixture(params=drivers.KERNEL)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "hostports"


@pytest.fixture
def ports(host: Namespace, state: Path, backend: str) -> Iterator[HostPortPublisher]:
    """Publishes on the host; nothing of it is left after the test."""
    del host
    with publishing(state, backend) as made:
        yield made
