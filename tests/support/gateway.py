"""etcd as automation without the mesh's code sees it: its JSON gateway."""

from __future__ import annotations

import base64
import json
import urllib.request
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LIMIT: Final = 20.0
"""Seconds a request may take on a crowded machine."""


class Records:
    """etcd below `/mesh`, through its JSON gateway; every write returns its revision."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._headers: dict[str, str] = {}

    @contextmanager
    def user(self, name: str, password: str) -> Iterator[None]:
        """Be a user of etcd during a block."""
        token = self.call("auth/authenticate", {"name": name, "password": password})["token"]
        self._headers = {"Authorization": token}
        try:
            yield
        finally:
            self._headers = {}

    def put(self, key: str, record: object) -> int:
        """Write a record: bytes as they are, anything else as JSON."""
        value = record if isinstance(record, bytes) else json.dumps(record).encode()
        return revision_of(self.call("kv/put", {"key": full(key), "value": encoded(value)}))

    def delete(self, key: str) -> int:
        """Remove a key."""
        return revision_of(self.call("kv/deleterange", {"key": full(key)}))

    def delete_below(self, prefix: str) -> int:
        """Remove everything below a prefix that ends in a slash."""
        span = {"key": full(prefix), "range_end": encoded(end_of(prefix))}
        return revision_of(self.call("kv/deleterange", span))

    def change(self, puts: Mapping[str, object], deletes: Iterable[str]) -> int:
        """Write and remove keys in one transaction."""
        operations = [
            {"request_put": {"key": full(key), "value": encoded(json.dumps(record).encode())}}
            for key, record in puts.items()
        ] + [{"request_delete_range": {"key": full(key)}} for key in deletes]
        return revision_of(self.call("kv/txn", {"success": operations}))

    def get(self, key: str) -> Any:
        """A record, or None."""
        return next((json.loads(value) for value in self._range(key).values()), None)

    def text(self, key: str) -> str:
        """A value that is not JSON, or nothing."""
        return next((value.decode() for value in self._range(key).values()), "")

    def under(self, prefix: str) -> dict[str, Any]:
        """The readable records below a prefix that ends in a slash, by the rest of their keys."""
        found = {}
        for key, value in self._range(prefix, range_end=encoded(end_of(prefix))).items():
            with suppress(ValueError, RecursionError):
                found[key.removeprefix(f"/mesh/{prefix}")] = json.loads(value)
        return {name: record for name, record in found.items() if isinstance(record, dict)}

    def names(self, prefix: str) -> set[str]:
        """The keys below a prefix that ends in a slash, without it."""
        found = self._range(prefix, range_end=encoded(end_of(prefix)))
        return {key.removeprefix(f"/mesh/{prefix}") for key in found}

    def _range(self, key: str, **options: str) -> dict[str, bytes]:
        reply = self.call("kv/range", {"key": full(key), **options})
        return {
            base64.b64decode(item["key"]).decode(): base64.b64decode(item.get("value", ""))
            for item in reply.get("kvs", ())
        }

    def call(self, verb: str, body: Mapping[str, object]) -> Any:
        """One request to the gateway."""
        url, data = f"{self.url}/v3/{verb}", json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.load(answer)


def encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def full(key: str) -> str:
    return encoded(f"/mesh/{key}".encode())


def end_of(prefix: str) -> bytes:
    """The end of etcd's range for a prefix that ends in a slash."""
    return f"/mesh/{prefix}"[:-1].encode() + b"0"


def revision_of(reply: Any) -> int:
    return int(reply["header"]["revision"])
