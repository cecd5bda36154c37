"""`mesh cluster`: the settings every node follows, written once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from mesh import errors
from mesh.cli import options, output

if TYPE_CHECKING:
    from mesh.cli.options import Session
    from mesh.model.cluster import Cluster


@click.group(cls=options.Noun)
def cluster() -> None:
    """Initialise the cluster; show its settings."""


class _PortRange(click.ParamType[tuple[int, int]]):
    name = "LOW-HIGH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value)
        if match is None:
            self.fail(f"{value!r} is not a range of ports: write it like 30000-31999", param, ctx)
        return int(match[1]), int(match[2])


class _Ports(click.ParamType[tuple[str, ...]]):
    name = "PORT[-END][/PROTO],…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(text.strip() for text in value.split(",") if text.strip())


_PORT = click.IntRange(1, 65535)


@cluster.command()
@click.option("--id", metavar="ID", help="The cluster's name (default: random).")
@click.option("--overlay4", metavar="PREFIX", help="IPv4 addresses of the nodes in the overlay.")
@click.option("--containers4", metavar="PREFIX", help="IPv4 addresses of all containers.")
@click.option("--node-bits4", type=click.IntRange(1, 30), help="Length of a node's own subnet.")
@click.option("--vips4", metavar="PREFIX", help="IPv4 addresses of services.")
@click.option("--prefix6", metavar="PREFIX", help="A /48 for all of IPv6 (default: random).")
@click.option("--wireguard-port", type=_PORT, help="UDP port of the overlay.")
@click.option("--steering-port", type=_PORT, help="UDP port of vxlan inside the overlay.")
@click.option("--steering-vni", type=click.IntRange(1, (1 << 24) - 1), help="Number of that vxlan.")
@click.option("--keepalive", type=click.IntRange(0, 65535), help="WireGuard's, in seconds.")
@click.option("--domain", metavar="NAME", help="What service names end in.")
@click.option("--liveness-ttl", type=click.IntRange(1), help="Seconds until a silent node is out.")
@click.option("--ingress-ports", type=_PortRange(), help="Dynamic ports of ingress mode.")
@click.option("--host-ports", type=_PortRange(), help="Dynamic ports of host mode.")
@click.option(
    "--protected-ports",
    type=_Ports(),
    help="Ports that are published by force only (default 22/tcp,2379-2380/tcp; '' for none).",
)
def init(**given: Any) -> None:
    """Write the cluster's settings to an empty prefix of etcd.

    What is not given takes its default; all of it is printed.
    """
    settings = _settings(given)
    for route in _overlapping_routes(settings):
        output.warn(
            f"this host routes {route}, which the cluster would cover: a host with such a route "
            "cannot join; choose other prefixes unless this host stays outside"
        )
    options.in_store(lambda session: _write(session, settings))
    if options.as_json():
        output.document(settings)
        return
    output.done(f"Cluster initialised: {settings.id}")
    _print(settings)
    click.echo("\nNext, on every host (one to three of them as managers, the others as workers):")
    click.echo("  mesh node join NAME --role manager|worker")


def _settings(given: dict[str, Any]) -> Cluster:
    from mesh.model import address
    from mesh.model.cluster import Cluster

    fields = {name: value for name, value in given.items() if value is not None}
    fields.setdefault("id", _random_id())
    fields.setdefault("prefix6", _random_prefix6())
    for name in {"overlay4", "containers4", "vips4", "prefix6"} & set(fields):
        with options.naming(f"--{name}"):
            fields[name] = address.parse_prefix(fields[name])
    try:
        return Cluster(**fields)
    except ValueError as error:
        raise errors.BadUsage(_as_options(str(error))) from None


def _as_options(message: str) -> str:
    """`message` with the settings' names written as the options that set them."""
    from mesh.model.cluster import Cluster

    names = zip(Cluster.__struct_fields__, Cluster.__struct_encode_fields__, strict=True)
    for field, encoded in names:
        if field != "id":
            option = f"--{field.replace('_', '-')}"
            message = re.sub(rf"(?<![\w-])({field}|{encoded})\b", option, message)
    return message


def _random_id() -> str:
    import secrets

    return secrets.token_hex(8)


def _random_prefix6() -> str:
    """A /48 of RFC 4193: fd and 40 random bits."""
    import secrets

    digits = "fd" + secrets.token_hex(5)
    return f"{digits[:4]}:{digits[4:8]}:{digits[8:]}::/48"


async def _write(session: Session, settings: Cluster) -> None:
    from mesh.store import schema
    from mesh.store.protocol import Compare, Put

    key = session.keys.cluster
    result = await session.store.transact((Compare(key, 0),), (Put(key, schema.encode(settings)),))
    if not result.succeeded:
        raise errors.Conflict(
            f"{key} exists: this cluster is already initialised; `mesh cluster show` prints it, "
            "and --prefix chooses a place for another one"
        )


def _overlapping_routes(settings: Cluster) -> list[str]:
    """Routes of this host that share addresses with the cluster, as text."""
    import json
    import subprocess

    from mesh.model import address

    found = []
    for family in address.FAMILIES:
        command = ["ip", f"-{family.suffix}", "-json", "route", "show"]
        try:
            printed = subprocess.run(command, capture_output=True, check=True, timeout=5).stdout
        except (OSError, subprocess.SubprocessError):
            continue  # no iproute2, or not Linux: this host will not be a node
        routes = {route["dst"] for route in json.loads(printed or b"[]")} - {"default"}
        ours = settings.prefixes(family)
        found += [r for r in sorted(routes) if any(address.overlaps(r, p) for p in ours)]
    return found


@cluster.command()
def show() -> None:
    """Print the cluster's settings."""
    settings = options.in_store(_read)
    if options.as_json():
        output.document(settings)
    else:
        _print(settings)


async def _read(session: Session) -> Cluster:
    from mesh.cli import world

    return world.cluster(session)


def _print(settings: Cluster) -> None:
    """Print every setting under the name of its option, and what follows from them."""
    rows = []
    for field in settings.__struct_fields__:
        value = getattr(settings, field)
        text = str(value)
        if isinstance(value, tuple):
            text = (", " if field == "protected_ports" else "-").join(map(str, value)) or "none"
        rows.append((field.replace("_", "-"), text))
    output.table(("SETTING", "VALUE"), [*rows, ("room for nodes", str(settings.capacity))])
