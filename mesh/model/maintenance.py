"""What operators want of a node: `/mesh/maintenance/<node>`, `/mesh/labels/<node>`."""

from __future__ import annotations

import enum

import msgspec

from mesh.model.names import check_label


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


class NodeLabels(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Labels that operators gave a node; they win over those of its own record, and an empty value
    stands for none.
    """

    labels: dict[str, str] = {}

    def __post_init__(self) -> None:
        for key in self.labels:
            check_label(key)
