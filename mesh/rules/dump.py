"""A node's rules as one document: what `mesh rules show --json` prints and others read offline.

Pure.  Elements are the kernel's bytes in hexadecimal, by owner; `FORMAT` changes with the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec

from mesh.model.address import parse_address, parse_prefix
from mesh.model.cluster import NODE_NUMBERS, NodeNetwork
from mesh.rules import elements, extras, program
from mesh.rules.marks import DEFAULT, Layout
from mesh.rules.program import Devices, Parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mesh.rules.elements import Elements

FORMAT: Final = 1

NODES: Final = "/nodes"
"""The owner of what describes the nodes; no service can have a name with a slash."""

POLICIES: Final = "/policies"
"""The owner of what policies come to."""

UNKNOWN: Final = "/unknown"
"""The owner of what the kernel holds and nobody wants."""

Backend = Literal["nftables", "iptables", "iptables-legacy", "iptables-nft"]
"""What drives the rules; "iptables" where it does not matter which flavour."""

BACKENDS: Final = get_args(Backend)

_PREFIXES: Final = ("prefixes", "vips", "closed", "subnets")


class Program(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """The parameters of a node's program; pairs hold v4, then v6."""

    number: int
    overlay_device: str
    steering_device: str
    bridge: str
    bridge_mac: str
    steering_port: int
    overlay: tuple[str, str]
    subnets: tuple[str, str]
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    vips: tuple[tuple[str, ...], tuple[str, ...]]
    closed: tuple[tuple[str, ...], tuple[str, ...]]
    packet_mark: int = DEFAULT.packet_mark
    ct_mark: int = DEFAULT.ct_mark

    def __post_init__(self) -> None:
        if self.number not in NODE_NUMBERS:
            raise ValueError(f"number {self.number} is not a node's")
        for address in self.overlay:
            parse_address(address)
        for name in _PREFIXES:
            for each in getattr(self, name):
                for prefix in (each,) if isinstance(each, str) else each:
                    parse_prefix(prefix)

    @staticmethod
    def of(parameters: Parameters) -> Program:
        """The document of what a program is made from."""
        devices, network = parameters.devices, parameters.network
        return msgspec.convert(
            {
                "number": network.number,
                "overlayDevice": devices.overlay,
                "steeringDevice": devices.steering,
                "bridge": devices.bridge,
                "bridgeMac": devices.bridge_mac,
                "steeringPort": parameters.steering_port,
                "overlay": network.overlay,
                "subnets": network.subnets,
                "prefixes": parameters.prefixes,
                "vips": parameters.vips,
                "closed": parameters.closed,
                "packetMark": parameters.layout.packet_mark,
                "ctMark": parameters.layout.ct_mark,
            },
            Program,
        )

    @property
    def parameters(self) -> Parameters:
        """What the program is made from.  Raises ValueError for a name nft might misread, and for
        marks that cannot be.
        """
        return Parameters(
            devices=Devices(
                self.overlay_device, self.steering_device, self.bridge, self.bridge_mac
            ),
            network=NodeNetwork(self.number, self.overlay, self.subnets),
            steering_port=self.steering_port,
            prefixes=self.prefixes,
            vips=self.vips,
            closed=self.closed,
            layout=Layout.of(self.packet_mark, self.ct_mark),
        )


class Dump(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The document.  `addresses` are the node's own beyond the mesh; `elements` are by owner:
    a service, NODES or UNKNOWN; each is set, key and data.
    """

    format: int
    backend: Backend
    node: str
    source: Literal["desired", "kernel"]
    program: Program
    addresses: tuple[str, ...]
    elements: dict[str, tuple[tuple[str, str, str], ...]]


@dataclass(frozen=True, slots=True)
class Rules:
    """A node's rules: its program, and the elements of each owner.

    `source` says whose word it is, `backend` what drives them.
    """

    node: str
    source: Literal["desired", "kernel"]
    parameters: Parameters
    addresses: tuple[str, ...]
    owners: Mapping[str, Elements]
    backend: Backend = "nftables"

    @property
    def elements(self) -> Elements:
        """The elements of all owners."""
        return {key: data for owned in self.owners.values() for key, data in owned.items()}


def dump(rules: Rules) -> Dump:
    """The document of a node's rules."""
    return Dump(
        format=FORMAT,
        backend=rules.backend,
        node=rules.node,
        source=rules.source,
        program=Program.of(rules.parameters),
        addresses=rules.addresses,
        elements={owner: tuple(_hex(owned)) for owner, owned in rules.owners.items()},
    )


def _hex(owned: Elements) -> Iterator[tuple[str, str, str]]:
    for (name, key), data in sorted(owned.items()):
        yield name, key.hex(), data.hex()


def load(text: bytes) -> Rules:
    """The rules in a document.  Raises ValueError that names what is wrong with it."""
    try:
        found = msgspec.json.decode(text)
        if isinstance(found, dict) and found.get("format") != FORMAT:
            raise ValueError(
                f"format {found.get('format')!r} is not {FORMAT}: "
                "make the dump with this version's `mesh rules show --json`"
            )
        given = msgspec.convert(found, Dump)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a dump of `mesh rules show --json`: {error}") from None
    for address in given.addresses:
        parse_address(address)
    return Rules(
        node=given.node,
        source=given.source,
        parameters=given.program.parameters,
        addresses=given.addresses,
        owners={owner: dict(map(_element, listed)) for owner, listed in given.elements.items()},
        backend=given.backend,
    )


def _element(listed: tuple[str, str, str]) -> tuple[elements.ElementKey, bytes]:
    name, key, data = listed[0], bytes.fromhex(listed[1]), bytes.fromhex(listed[2])
    spec = elements.SETS.get(name)
    if spec is None:
        raise ValueError(f"no set {name!r}: the dump is of another version")
    width = sum(part.width for part in spec.key)
    if (len(key), len(data)) != (width, sum(part.width for part in spec.data)):
        raise ValueError(f"element {listed[1]!r} of {name} has the wrong size")
    return (name, key), data


def text(rules: Rules, owners: Iterable[str] | None = None) -> Iterator[str]:
    """The lines that `nft -f` accepts: the program and all owners, or only the given owners'."""
    if owners is None:
        yield from program.render(rules.parameters).splitlines()
        needed = extras.needed(rules.elements, rules.parameters.layout)
        yield from extras.added(program.build(rules.parameters), needed).splitlines()
    for owner in sorted(rules.owners) if owners is None else owners:
        yield f"# {title(owner)}"
        for key, data in sorted(rules.owners[owner].items()):
            yield f"add element inet mesh {elements.describe(key, data)}"


def title(owner: str) -> str:
    """An owner as people call it."""
    known = {NODES: "nodes of the mesh", POLICIES: "policies", UNKNOWN: "wanted by nobody"}
    return known.get(owner, f"service {owner}")


def by_owner(
    held: Elements, desired: Mapping[str, Elements], layout: Layout
) -> dict[str, Elements]:
    """What a kernel holds, by who wants the element or, where it differs, has the frontend id."""
    wanting = {key: owner for owner, owned in desired.items() for key in owned}
    having = frontends(desired, layout)
    found: dict[str, Elements] = {}
    for key, data in held.items():
        owner = wanting.get(key) or having.get(_frontend((key, data), layout) or 0) or UNKNOWN
        found.setdefault(owner, {})[key] = data
    return found


def frontends(owners: Mapping[str, Elements], layout: Layout) -> dict[int, str]:
    """Who each frontend id belongs to."""
    return {
        number: owner
        for owner, owned in owners.items()
        for element in owned.items()
        if (number := _frontend(element, layout)) is not None
    }


def _frontend(element: tuple[elements.ElementKey, bytes], layout: Layout) -> int | None:
    """The frontend id that an element is about."""
    (name, key), data = element
    if name in elements.FRONTENDS:
        return layout.id_of(elements.mark_of(data))
    spec = elements.SETS[name]
    if spec.key[0] is elements.MARK:
        return layout.id_of(int(spec.key[0].show(key[:4]), 16))
    return None
