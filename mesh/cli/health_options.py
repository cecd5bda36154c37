"""The options that say how a service's tasks are checked.  Writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from mesh.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.model.health import HealthCheck
    from mesh.model.service import ServiceSpec

_COUNT: Final = click.IntRange(1, 100)

OPTIONS: Final = (
    click.option(
        "--health",
        metavar="CHECK",
        help="How a replica proves itself: tcp[:PORT], http[:[PORT][/PATH]], https…, "
        "exec:COMMAND, or none.",
    ),
    click.option("--health-type", type=click.Choice(["none", "tcp", "http", "exec"])),
    click.option(
        "--health-port", type=click.IntRange(1, 65535), help="[default: the first target over TCP]"
    ),
    click.option("--health-path", metavar="PATH", help="What is requested  [default: /]."),
    click.option("--health-scheme", type=click.Choice(["http", "https"])),
    click.option("--health-host", metavar="NAME", help="The Host header, and the name in TLS."),
    click.option("--health-status", metavar="RANGES", help="What passes  [default: 200-399]."),
    click.option(
        "--health-verify/--health-no-verify", default=None, help="Whether certificates must be good"
        "  [default: they must]."
    ),
    click.option("--health-cmd", metavar="COMMAND", help="For type exec; run by no shell."),
    click.option("--health-interval", metavar="TIME", help="From probe to probe  [default: 5s]."),
    click.option("--health-timeout", metavar="TIME", help="Of one probe  [default: 2s]."),
    click.option("--health-rise", type=_COUNT, help="Passes until healthy  [default: 2]."),
    click.option("--health-fall", type=_COUNT, help="Failures until unhealthy  [default: 3]."),
    click.option(
        "--health-start-period",
        metavar="TIME",
        help="How long failures of a fresh replica do not count  [default: 0s].",
    ),
    click.option(
        "--health-fallback",
        type=click.Choice(["refuse", "any"]),
        help="While no replica is healthy: refuse connections, or use any that runs.",
    ),
)  # fmt: skip

_PLAIN: Final = (
    "port", "path", "host", "status", "verify", "interval", "timeout", "rise", "fall",
    "start_period",
)  # fmt: skip


def changes(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a HealthCheck that options were given for.  Raises BadUsage."""
    from mesh.model import health_syntax
    from mesh.model.health import CheckType, Fallback, Scheme

    found: dict[str, Any] = {}
    if given["health"] is not None:
        with options.naming("--health"):
            found = health_syntax.parse(given["health"])
    kinds: dict[str, Callable[[str], Any]] = {
        "type": CheckType,
        "scheme": Scheme,
        "fallback": Fallback,
    }
    for name, kind in (*kinds.items(), *((name, _same) for name in _PLAIN)):
        if given[f"health_{name}"] is not None:
            found[name] = kind(given[f"health_{name}"])
    if given["health_cmd"] is not None:
        with options.naming("--health-cmd"):
            found["command"] = health_syntax.words(given["health_cmd"])
        found.setdefault("type", CheckType.EXEC)
    elif found.get("type", CheckType.EXEC) is not CheckType.EXEC:
        found["command"] = ()
    return found


def _same(value: Any) -> Any:
    return value


def made(spec: ServiceSpec, changes: dict[str, Any]) -> HealthCheck | None:
    """The check of a spec with changes.  Raises ValueError for what does not go together."""
    import msgspec

    from mesh.model.health import CheckType, HealthCheck

    if not changes:
        return spec.health
    check = msgspec.structs.replace(spec.health or HealthCheck(), **changes)
    if check.type is not CheckType.NONE:
        return check
    if changes.get("type") is None:
        raise ValueError("there is no health check to change: say which with --health")
    return None
