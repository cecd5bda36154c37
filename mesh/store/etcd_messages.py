"""etcd's messages and calls, in a descriptor pool of our own.

Generated code would refuse other protobuf versions and clash with the names other etcd clients
register.  Messages are described in etcd.proto; never opens a connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from google.protobuf import descriptor_pool, message_factory

from mesh.store.protocol import KeyValue

_POOL: Final = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(resources.files("mesh.store").joinpath("etcd.binpb").read_bytes())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"etcdserverpb.{name}"))


@dataclass(frozen=True, slots=True)
class Call:
    """A remote procedure; `streams` when requests and replies are streams."""

    path: str
    request: Any
    reply: Any
    streams: bool = False


def _call(service: str, name: str, *, streams: bool = False, message: str = "") -> Call:
    path = f"/etcdserverpb.{service}/{name}"
    message = message or name
    return Call(path, _message(f"{message}Request"), _message(f"{message}Response"), streams)


RANGE: Final = _call("KV", "Range")
PUT: Final = _call("KV", "Put")
DELETE: Final = _call("KV", "DeleteRange")
TXN: Final = _call("KV", "Txn")
WATCH: Final = _call("Watch", "Watch", streams=True)
GRANT: Final = _call("Lease", "LeaseGrant")
REVOKE: Final = _call("Lease", "LeaseRevoke")
KEEP_ALIVE: Final = _call("Lease", "LeaseKeepAlive", streams=True)
AUTHENTICATE: Final = _call("Auth", "Authenticate")

Compare: Final = _message("Compare")
RequestOp: Final = _message("RequestOp")
WatchCreateRequest: Final = _message("WatchCreateRequest")
WatchProgressRequest: Final = _message("WatchProgressRequest")

EVENT_DELETE: Final = 1
"""Event.EventType.DELETE."""

TARGET_MOD: Final = 2
"""Compare.CompareTarget.MOD."""


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys that begin with `prefix`: etcd's `range_end`."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1]) if head else b"\0"


def text(key: bytes) -> str:
    """A key as text.  What is not UTF-8 is nobody's valid key: it is made readable, not refused."""
    return key.decode(errors="backslashreplace")


def key_value(stored: Any) -> KeyValue:
    """A stored pair as the house knows it."""
    return KeyValue(
        text(stored.key),
        stored.value,
        stored.create_revision,
        stored.mod_revision,
        stored.version,
        stored.lease,
    )
