"""Who of this host listens where a port would answer, for whoever publishes without etcd.

Looks only, in the network namespace of the calling thread.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from mesh.dataplane import sockdiag

if TYPE_CHECKING:
    from mesh.hostports.publications import Listener
    from mesh.model.publish import PublishedPort

log = logging.getLogger(__name__)


def look() -> Listener:
    """Who listens when that is first asked; whose a socket is, is searched for where it matters."""

    @cache
    def sockets() -> frozenset[sockdiag.Socket]:
        try:
            return sockdiag.listening()
        except OSError as error:
            log.warning("nobody can tell who listens on this host: %s", error)
            return frozenset()

    def who(port: PublishedPort) -> str | None:
        wanted = (port.protocol, port.published)
        for one in sockets():
            if (one.protocol, one.port) == wanted and sockdiag.listener(one).meets(port.host_ip):
                owner = sockdiag.owners((one.inode,))[one.inode]
                return sockdiag.listener(one, owner).owner
        return None

    return who
