"""What every endpoint of etcd says of itself over HTTP: its version and its clock.

Only asks, each endpoint once and without a user: `/version` is open to whoever reaches it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import time
import urllib.request
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.store.etcd_channel import EtcdOptions

_PATIENCE: Final = 3.0
_TICK: Final = 0.5
"""A Date header has whole seconds, rounded down: half of one is lost on average (RFC 9110)."""


class Server(NamedTuple):
    """One endpoint.  `error` says why it did not answer; `ahead` is by how many seconds its clock
    is before ours, None where it was not told.
    """

    endpoint: str
    version: str | None = None
    ahead: float | None = None
    error: str = ""


async def ask(options: EtcdOptions) -> list[Server]:
    """Ask all endpoints at once."""
    work = (asyncio.to_thread(_ask, endpoint, options) for endpoint in options.endpoints)
    return list(await asyncio.gather(*work))


def _ask(endpoint: str, options: EtcdOptions) -> Server:
    try:
        opener = urllib.request.build_opener(*_handlers(endpoint, options))
        began = time.time()
        with opener.open(f"{endpoint.rstrip('/')}/version", timeout=_PATIENCE) as reply:
            text, date = reply.read(65536), reply.headers.get("Date")
        version = json.loads(text)["etcdserver"]
    except (OSError, http.client.HTTPException) as error:
        return Server(endpoint, error=str(getattr(error, "reason", error)))
    except (ValueError, KeyError, TypeError):
        return Server(endpoint, error="answers, but does not tell its version")
    ahead = None
    if date is not None:
        now = (began + time.time()) / 2
        ahead = parsedate_to_datetime(date).timestamp() + _TICK - now
    return Server(endpoint, str(version), ahead)


def _handlers(endpoint: str, options: EtcdOptions) -> Iterable[urllib.request.BaseHandler]:
    yield urllib.request.ProxyHandler({})  # a proxy for the web is none for etcd
    if endpoint.startswith("https:"):
        context = ssl.create_default_context(cafile=options.ca)
        if options.cert is not None:
            context.load_cert_chain(options.cert, options.key)
        yield urllib.request.HTTPSHandler(context=context)
