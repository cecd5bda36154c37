"""The options that say what a service is to be, for `create` and `update`.  Writes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh import errors
from mesh.cli import health_options, options

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.cli.listeners import Occupied
    from mesh.model.cluster import Cluster
    from mesh.model.publish import PublishedPort
    from mesh.model.publish_syntax import Chosen
    from mesh.model.service import ServiceSpec

F = TypeVar("F", bound="Callable[..., Any]")

_AFFINITY = re.compile(r"(?:none|(client-ip)(?:/([0-9]{1,3}))?(?:,/([0-9]{1,3}))?)")

_PORT = "[IP:][PUB[-END]:]CTR[-END][/PROTO]"


class _Mode(click.Option):
    """--publish-mode, whose default is the environment's or the configuration's."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        assert record is not None  # it is not hidden
        try:
            default = options.publish_mode().value
        except errors.MeshError:
            default = "host"
        return record[0], f"{record[1]}  [default: {default}]"


_PORT_OPTIONS = (
    click.option(
        "-p",
        "--publish",
        multiple=True,
        metavar=_PORT,
        help="Publish container port CTR as PUB, without PUB as one of the dynamic range; also as "
        "target=CTR,published=PUB with protocol=, mode=, host_ip=, name=; repeatable.",
    ),
    click.option(
        "--publish-mode",
        cls=_Mode,
        type=click.Choice(["host", "ingress"]),
        help="Where ports answer that do not say: on the nodes that run the service, or on every "
        "node [env: MESH_PUBLISH_MODE; publish_mode in the configuration].",
    ),
    click.option(
        "--force", is_flag=True, help="Publish ports that are protected or used by a process, too."
    ),
)
_CHANGES = (
    click.option(
        "--publish-add", multiple=True, metavar=_PORT, help="Publish this port too; repeatable."
    ),
    click.option(
        "--publish-rm",
        multiple=True,
        metavar="[PUB:]CTR[/PROTO]",
        help="Publish the container port no more; repeatable.",
    ),
)
_OPTIONS = (
    click.option("--vip", metavar="auto|none|ADDRESS", help="The service's virtual address."),
    click.option(
        "--affinity",
        metavar="none|client-ip[/V4[,/V6]]",
        help="Whether a client is kept on one replica, or all clients of a prefix are.",
    ),
    click.option(
        "--source",
        type=click.Choice(["preserve", "masquerade"]),
        help="Whose address replicas on other nodes see: the client's, or the ingress node's.",
    ),
    click.option(
        "--prefer",
        type=click.Choice(["any", "local", "local-only", "zone"]),
        help="Which replicas a node balances over: all; its own, or those of its zone, while there "
        "are any; its own only.",
    ),
    click.option(
        "--publish-on",
        metavar="SELECTOR",
        help="The nodes on which published ports answer, by their labels: 'zone=a,role!=worker', "
        "'zone in (a, b)', '!gpu'; '' for all.",
    ),
    click.option(
        "--zone-label",
        metavar="KEY",
        help="The label of nodes that says their zone [default: zone].",
    ),
    click.option(
        "--allow", multiple=True, metavar="PREFIX", help="Who may connect; repeatable (all)."
    ),
    click.option(
        "--limit-connections",
        type=click.IntRange(0, 65_535),
        metavar="N",
        help="How many connections at a time a client may have to each port, on each node; 0: as "
        "many as it likes.",
    ),
    click.option(
        "--drain",
        metavar="DURATION",
        help="How long connections of a task that leaves may go on [default: 10s].",
    ),
    click.option(
        "--local-health-port",
        metavar="PORT|none",
        help="Where each node tells load balancers over HTTP whether it has replicas.",
    ),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable."),
    click.option("--no-wait", is_flag=True, help="Do not wait for VIP and ports."),
)


def apply(verb: F) -> F:
    """A verb with all of them."""
    return _with(verb, (*_PORT_OPTIONS, *health_options.OPTIONS, *_OPTIONS))


def apply_changes(verb: F) -> F:
    """A verb with all of them, and those that change a list of ports."""
    return _with(verb, (*_PORT_OPTIONS, *_CHANGES, *health_options.OPTIONS, *_OPTIONS))


def _with(verb: F, wanted: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(wanted):
        verb = option(verb)
    return verb


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to become of a spec: fields that are replaced, ports that come and go.

    `health` are fields of the check; `force` publishes ports that are protected, or used by a
    process, too.
    """

    fields: dict[str, Any]
    health: dict[str, Any]
    added: tuple[PublishedPort, ...] = ()
    removed: tuple[Chosen, ...] = ()
    force: bool = False

    def __bool__(self) -> bool:
        return bool(self.fields or self.health or self.added or self.removed or self.force)

    def made(self, spec: ServiceSpec) -> ServiceSpec:
        """The spec with them.  Raises NotFound for a port that is not there, and ValueError for
        ports, or parts of a check, that do not go together.
        """
        import msgspec

        ports: list[PublishedPort] = list(self.fields.get("ports", spec.ports))
        for chosen in self.removed:
            left = [port for port in ports if not chosen.includes(port)]
            if len(left) == len(ports):
                known = ", ".join(map(str, ports)) or "none"
                raise errors.NotFound(
                    f"--publish-rm: {chosen.spec!r} names no published port; there are {known}"
                )
            ports = left
        for port in self.added:
            ports = [one for one in ports if _place(one) != _place(port)] + [port]
        fields = {**self.fields, "ports": tuple(ports)}
        fields["health"] = health_options.made(spec, self.health)
        return msgspec.structs.replace(spec, **fields)

    def allowed(
        self,
        spec: ServiceSpec,
        known: tuple[PublishedPort, ...],
        cluster: Cluster,
        occupied: Occupied,
    ) -> ServiceSpec:
        """The spec with ports forced that are protected, or that processes of nodes listen on.

        Raises Conflict where one may not be.  Not about ports that are `known`, which were there
        before.
        """
        import msgspec

        if spec.local_health_port and "local_health_port" in self.fields:
            _check_health_port(spec.local_health_port, cluster, occupied)
        ports = tuple(
            port
            if port in known and not self.force
            else _checked(port, cluster, occupied, self.force)
            for port in spec.ports
        )
        return msgspec.structs.replace(spec, ports=ports)


def _place(port: PublishedPort) -> tuple[object, ...]:
    """Where a port answers and what it leads to: one that is added again takes its place."""
    return port.host_ip, port.published, port.protocol, port.target


def _checked(
    port: PublishedPort, cluster: Cluster, occupied: Occupied, force: bool
) -> PublishedPort:
    """A port, forced if it has to be and may be.  Raises Conflict."""
    import msgspec

    from mesh.model import listener, protected
    from mesh.model.publish import PublishMode

    if port.published is None:
        return port
    place = (port.protocol, port.published)
    guard = protected.protection(cluster, *place)
    user = occupied.get(place)
    if guard is None and user is None:
        return port
    if guard is not None and not (guard.forcible and force):
        remedy = " (--force)" if guard.forcible else ""
        raise errors.Conflict(
            f"--publish: port {port.published}/{port.protocol.value} {guard.reason}{remedy}"
        )
    if user is not None and not force:
        if port.mode is PublishMode.HOST:  # where its tasks will be, nobody knows yet
            return port
        raise errors.Conflict(f"--publish: {listener.refusal(place, *user)}")
    return msgspec.structs.replace(port, force=True)


def _check_health_port(number: int, cluster: Cluster, occupied: Occupied) -> None:
    """Raises Conflict for a port that nodes cannot listen on."""
    from mesh.model import listener, protected
    from mesh.model.publish import Protocol

    place = (Protocol.TCP, number)
    if protected.protection(cluster, *place) is not None:
        raise errors.Conflict(
            f"--local-health-port: port {number}/tcp is protected: choose another one"
        )
    user = occupied.get(place)
    if user is not None:
        raise errors.Conflict(f"--local-health-port: {listener.refusal(place, *user)}")


def changes(given: dict[str, Any]) -> Changes:
    """What options ask for.  Raises BadUsage."""
    from mesh.model.publish_syntax import parse_chosen

    found = _fields(given)
    added, removed = given.get("publish_add", ()), given.get("publish_rm", ())
    if given["publish"] and (added or removed):
        raise errors.BadUsage(
            "--publish replaces all ports: leave it out, or --publish-add and --publish-rm"
        )
    if given["publish_mode"] is not None and not (given["publish"] or added):
        raise errors.BadUsage("--publish-mode: give the ports it is for with --publish [HOST:]CTR")
    if given["publish"]:
        found["ports"] = _ports(given, "publish")
    with options.naming("--publish-rm"):
        chosen = tuple(map(parse_chosen, removed))
    added = _ports(given, "publish_add") if added else ()
    return Changes(found, health_options.changes(given), added, chosen, given["force"])


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ServiceSpec that options were given for.  Raises BadUsage."""
    from mesh.model.address import parse_address, parse_prefix
    from mesh.model.names import parse_duration
    from mesh.model.service import Prefer, Source

    kinds: dict[str, Callable[[str], Any]] = {
        "source": Source,
        "prefer": Prefer,
    }
    found: dict[str, Any] = {
        name: kind(given[name]) for name, kind in kinds.items() if given[name] is not None
    }
    if given["vip"] is not None:
        with options.naming("--vip"):
            named = given["vip"] in ("auto", "none")
            found["vip"] = given["vip"] if named else parse_address(given["vip"])
    if given["allow"]:
        with options.naming("--allow"):
            found["allow"] = tuple(parse_prefix(text) for text in given["allow"])
    if given["limit_connections"] is not None:
        found["limit_connections"] = given["limit_connections"]
    if given["drain"] is not None:
        with options.naming("--drain"):
            parse_duration(given["drain"])
        found["drain"] = given["drain"]
    found |= _placement(given)
    if given["labels"]:
        found["labels"] = options.labels(given["labels"])
    return found


def _affinity(text: str) -> dict[str, Any]:
    """The fields for client-ip/24,/64 and the like.  Raises ValueError."""
    from msgspec import UNSET

    from mesh.model.service import WHOLE_ADDRESS, Affinity, AffinityPrefix

    match = _AFFINITY.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r}: write 'none', 'client-ip', or, for all clients of a prefix together, "
            "client-ip/24 or client-ip/24,/64 (IPv4, IPv6)"
        )
    name, *lengths = match.groups()
    kept = [
        int(length) if length else whole for length, whole in zip(lengths, (32, 128), strict=True)
    ]
    prefix = AffinityPrefix(ipv4=kept[0], ipv6=kept[1])
    return {
        "affinity": Affinity(name or "none"),
        "affinity_prefix": prefix if prefix != WHOLE_ADDRESS else UNSET,
    }


def _placement(given: dict[str, Any]) -> dict[str, Any]:
    """Those that say where a service answers, and which replicas clients get."""
    from msgspec import UNSET

    from mesh.model import selector
    from mesh.model.names import check_label

    found: dict[str, Any] = {}
    if given["affinity"] is not None:
        with options.naming("--affinity"):
            found |= _affinity(given["affinity"])
    if given["local_health_port"] is not None:
        with options.naming("--local-health-port"):
            found["local_health_port"] = _port_or_none(given["local_health_port"])
    if given["publish_on"] is not None:
        with options.naming("--publish-on"):
            selector.parse(given["publish_on"])
        found["publish_on"] = given["publish_on"] or UNSET
    if given["zone_label"] is not None:
        with options.naming("--zone-label"):
            found["zone_label"] = check_label(given["zone_label"])
    return found


def _port_or_none(text: str) -> Any:
    """A port, or what stands for none in a record.  Raises ValueError."""
    from msgspec import UNSET

    from mesh.model.publish import PORTS

    if text == "none":
        return UNSET
    if not (text.isascii() and text.isdigit() and int(text) in PORTS):
        raise ValueError(f"{text!r} is no port: write 1-65535, or none")
    return int(text)


def _ports(given: dict[str, Any], name: str) -> tuple[PublishedPort, ...]:
    """The ports that an option names, in the mode that goes for those that do not say."""
    from mesh.model.publish import PublishMode
    from mesh.model.publish_syntax import parse

    mode = PublishMode(given["publish_mode"]) if given["publish_mode"] else options.publish_mode()
    with options.naming(f"--{name.replace('_', '-')}"):
        return tuple(chain.from_iterable(parse(text, mode) for text in given[name]))
