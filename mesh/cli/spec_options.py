"""The options that say what a service is to be, for `create` and `update`.  Writes nothing."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh import errors
from mesh.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.model.publish import PublishedPort

F = TypeVar("F", bound="Callable[..., Any]")

_OPTIONS = (
    click.option(
        "-p",
        "--publish",
        multiple=True,
        metavar="HOST:CTR[/tcp|udp]",
        help="Publish container port CTR as HOST; repeatable.",
    ),
    click.option(
        "--publish-mode",
        type=click.Choice(["host", "ingress"]),
        help="Where it answers: on the nodes that run the service (default), or on every node.",
    ),
    click.option("--vip", metavar="auto|none|ADDRESS", help="The service's virtual address."),
    click.option(
        "--affinity",
        type=click.Choice(["none", "client-ip"]),
        help="Whether a client is kept on one replica.",
    ),
    click.option(
        "--source",
        type=click.Choice(["preserve", "masquerade"]),
        help="Whose address replicas on other nodes see: the client's, or the ingress node's.",
    ),
    click.option(
        "--prefer",
        type=click.Choice(["any", "local", "local-only"]),
        help="Which replicas a node balances over.",
    ),
    click.option(
        "--allow", multiple=True, metavar="PREFIX", help="Who may connect; repeatable (all)."
    ),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable."),
    click.option("--no-wait", is_flag=True, help="Do not wait for VIP and ports."),
)


def apply(verb: F) -> F:
    """A verb with all of them."""
    for option in reversed(_OPTIONS):
        verb = option(verb)
    return verb


def fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ServiceSpec that options were given for.  Raises BadUsage."""
    from mesh.model.address import parse_address, parse_prefix
    from mesh.model.service import Affinity, Prefer, Source

    kinds: dict[str, Callable[[str], Any]] = {
        "affinity": Affinity,
        "source": Source,
        "prefer": Prefer,
    }
    found: dict[str, Any] = {
        name: kind(given[name]) for name, kind in kinds.items() if given[name] is not None
    }
    if given["publish"]:
        found["ports"] = _ports(given["publish"], given["publish_mode"] or "host")
    elif given["publish_mode"] is not None:
        raise errors.BadUsage("--publish-mode: give the ports it is for with --publish HOST:CTR")
    if given["vip"] is not None:
        with options.naming("--vip"):
            named = given["vip"] in ("auto", "none")
            found["vip"] = given["vip"] if named else parse_address(given["vip"])
    if given["allow"]:
        with options.naming("--allow"):
            found["allow"] = tuple(parse_prefix(text) for text in given["allow"])
    if given["labels"]:
        found["labels"] = options.labels(given["labels"])
    return found


def _ports(texts: tuple[str, ...], mode: str) -> tuple[PublishedPort, ...]:
    from mesh.model import publish_syntax
    from mesh.model.publish import PublishMode

    with options.naming("--publish"):
        each = (publish_syntax.parse(text, PublishMode(mode)) for text in texts)
        return tuple(chain.from_iterable(each))
