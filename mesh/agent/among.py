"""Those among all services that something concerns.  Pure.

By a look at every one of them: what asks for it is far too rare for an index to pay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.model.service import Prefer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.model.service import ServiceSpec
    from mesh.model.view import IngressPort


def heeding_labels(services: Mapping[str, ServiceSpec]) -> frozenset[str]:
    """Those to which the labels of nodes matter."""
    return frozenset(name for name, spec in services.items() if spec.heeds_labels)


def local_ingress(
    services: Mapping[str, ServiceSpec], ports: Mapping[str, Iterable[IngressPort]]
) -> dict[str, frozenset[tuple[int, int]]]:
    """Of those that do not answer alike on every node: the protocols and numbers of their ingress
    ports here.
    """
    return {
        name: frozenset((p.protocol.number, p.published) for p in ports.get(name, ()))
        for name, spec in services.items()
        if spec.prefer is Prefer.LOCAL_ONLY or spec.publish_on
    }
