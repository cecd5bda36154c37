"""What operators want of a node: `/mesh/maintenance/<node>`."""

from __future__ import annotations

import enum

import msgspec


class Duty(enum.Enum):
    """Whether a node's tasks may be given new connections."""

    ACTIVE = "active"
    DRAINING = "draining"


class Maintenance(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """The record; no record means active.  `since` (UTC, RFC 3339) is when it became so."""

    state: Duty = Duty.ACTIVE
    since: str = ""
