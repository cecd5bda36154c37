"""Host mode: ports that answer on the node that runs the container.

For orchestrators without etcd there are `HostPortPublisher` and `AsyncHostPortPublisher`; whoever
does not ask for them does not load what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.hostports.publisher import AsyncHostPortPublisher, HostPortPublisher

__all__ = ["AsyncHostPortPublisher", "HostPortPublisher"]


def __getattr__(name: str) -> object:
    """The publishers, by their public names."""
    if name in __all__:
        from mesh.hostports import publisher

        return getattr(publisher, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
