"""What every verb shares: the options that say which etcd, and how a verb becomes an exit code.

The common options may stand before the noun or after the verb; the one given last wins.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

import click

from mesh import errors
from mesh.cli import output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from mesh.agent.config import AgentConfig, EtcdConfig
    from mesh.model.publish import PublishMode
    from mesh.store.protocol import KeyValue, Store
    from mesh.store.schema import Keys

T = TypeVar("T")

_META: Final = "mesh.cli."


class Connect(Protocol):
    """Opens the store that the options describe; the context's `obj`, so tests can give another."""

    def __call__(self, etcd: EtcdConfig) -> AbstractAsyncContextManager[Store]:
        """A store that is closed at the end of the block."""
        ...


@dataclass(frozen=True, slots=True)
class Session:
    """What a verb works with: an open store that answered, and the keys of its cluster."""

    store: Store
    keys: Keys
    etcd: EtcdConfig
    cluster: KeyValue | None


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value not in (None, (), False):
        ctx.meta[f"{_META}{param.name}"] = value


def _common(*names: str, **settings: Any) -> click.Option:
    return click.Option(names, expose_value=False, callback=_remember, **settings)


def common_options(*, root: bool) -> list[click.Parameter]:
    """The options of every command; the environment is read once, at the root."""
    env: dict[str, str | None] = {
        name: f"MESH_{name}" if root else None for name in ("ETCD", "CONFIG", "ETCD_USER")
    }
    return [
        _common(
            "--etcd",
            multiple=True,
            metavar="URL",
            envvar=env["ETCD"],
            help="An etcd endpoint; repeatable [env: MESH_ETCD].",
        ),
        _common("--prefix", metavar="KEY", help="Where the cluster's keys are (default /mesh)."),
        _common(
            "--config",
            metavar="FILE",
            envvar=env["CONFIG"],
            help="The agent's configuration [env: MESH_CONFIG; /etc/mesh/agent.toml if present].",
        ),
        _common("--cacert", metavar="FILE", help="Who signs etcd's certificate."),
        _common("--cert", metavar="FILE", help="This client's certificate."),
        _common("--key", metavar="FILE", help="This client's key."),
        _common(
            "--user",
            metavar="NAME:PASSWORD",
            envvar=env["ETCD_USER"],
            help="An etcd user [env: MESH_ETCD_USER].",
        ),
        _common("--json", is_flag=True, help="Print one JSON document."),
    ]


class Verb(click.Command):
    """A command with the common options, listed apart from its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.common = common_options(root=False)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the common ones."""
        return [*super().get_params(ctx), *self.common]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write two sections: what belongs to this verb, and what belongs to every verb."""
        own = [p for p in super().get_params(ctx) if isinstance(p, click.Option)]
        for title, group in (("Options", own), ("Options of every command", self.common)):
            records = [option.get_help_record(ctx) for option in group]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])


class Noun(click.Group):
    """A group of verbs."""

    command_class = Verb


def setting(name: str) -> Any:
    """A common option's value, or None when it was given nowhere."""
    return click.get_current_context().meta.get(f"{_META}{name}")


def as_json() -> bool:
    """Whether the result is for a program."""
    return bool(setting("json"))


def config_path() -> Path:
    """The agent's configuration file, whether or not it exists."""
    from mesh.agent import config

    given = setting("config")
    return Path(given) if given else config.DEFAULT_PATH


def agent_config() -> AgentConfig:
    """The agent's configuration.  Raises BadUsage naming the file and the field."""
    from mesh.agent import config

    return config.load(config_path())


def publish_mode() -> PublishMode:
    """How a port is published that does not say: as the environment, else the configuration has
    it.  Raises BadUsage.
    """
    from mesh.model.publish import PublishMode

    text = os.environ.get("MESH_PUBLISH_MODE")
    if text is None:
        known = readable_config()
        return PublishMode.HOST if known is None else known.publish_mode
    try:
        return PublishMode(text)
    except ValueError:
        raise errors.BadUsage(f"MESH_PUBLISH_MODE {text!r}: choose host or ingress") from None


def readable_config() -> AgentConfig | None:
    """The configuration; one that nobody named here, where this user may read it."""
    named = setting("config") not in (None, os.environ.get("MESH_CONFIG"))
    return agent_config() if named or os.access(config_path(), os.R_OK) else None


def etcd_config(*, read_file: bool = True) -> EtcdConfig:
    """How to reach etcd: the configuration file's answer, replaced field by field by options.

    Before `node join` there may be no file.  Raises BadUsage.
    """
    import msgspec

    from mesh.agent.config import EtcdConfig

    known = readable_config() if read_file else None
    base = known.etcd if known is not None else EtcdConfig()
    with naming("etcd options"):
        return msgspec.structs.replace(base, **_etcd_fields())


def _etcd_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {
        "prefix": setting("prefix"),
        "ca": setting("cacert"),
        "cert": setting("cert"),
        "key": setting("key"),
    }
    if setting("etcd"):
        fields["endpoints"] = tuple(url for text in setting("etcd") for url in text.split(","))
    if setting("user"):
        name, colon, password = setting("user").partition(":")
        if not (name and colon):
            raise errors.BadUsage("--user (or MESH_ETCD_USER): write NAME:PASSWORD")
        fields |= {"user": name, "password": password}
    return {name: value for name, value in fields.items() if value is not None}


@contextmanager
def naming(what: str) -> Iterator[None]:
    """A ValueError inside becomes BadUsage that starts with `what`: an option or a thing."""
    try:
        yield
    except ValueError as error:
        raise errors.BadUsage(f"{what}: {error}") from None


def labels(given: tuple[str, ...]) -> dict[str, str]:
    """The values of --label.  Raises BadUsage."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise errors.BadUsage(f"--label {text!r}: write KEY=VALUE")
        found[key] = value
    return found


def in_store(action: Callable[[Session], Awaitable[T]], etcd: EtcdConfig | None = None) -> T:
    """The result of `action` with an open store, which is closed afterwards."""
    import asyncio

    from mesh.store.schema import Keys

    chosen = etcd if etcd is not None else etcd_config()
    connect: Connect = click.get_current_context().obj
    keys = Keys(chosen.prefix)

    async def session() -> T:
        async with connect(chosen) as store:
            with output.patience(f"etcd at {', '.join(chosen.endpoints)}"):
                cluster = await store.get(keys.cluster)
            return await action(Session(store, keys, chosen, cluster))

    return asyncio.run(session())


def exit_with(code: int) -> NoReturn:
    """End the verb: its result is printed, and says something is wrong."""
    raise click.exceptions.Exit(code)
