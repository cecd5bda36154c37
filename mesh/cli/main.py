"""The table of nouns and verbs.  Each is imported only when it is asked for."""

from __future__ import annotations

import importlib
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from mesh import __version__, errors
from mesh.cli import options, output

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from mesh.agent.config import EtcdConfig
    from mesh.store.protocol import Store

COMMANDS: Final = {
    "cluster": ("mesh.cli.cluster:cluster", "Initialise the cluster; show its settings."),
    "node": ("mesh.cli.node:node", "Join this host; list, inspect and remove nodes."),
    "agent": ("mesh.cli.agent:agent", "Run this node's agent in the foreground."),
    "service": ("mesh.cli.service:service", "Publish services; list and inspect them."),
    "task": ("mesh.cli.task:task", "Add, run, list and remove replicas of services."),
    "publish": (
        "mesh.cli.publish:publish",
        "Lead ports of this host to a container, without etcd.",
    ),
    "unpublish": ("mesh.cli.publish:unpublish", "Take the ports of a container back."),
    "published": ("mesh.cli.publish:published", "List the ports published without etcd."),
    "policy": ("mesh.cli.policy:policy", "Say who may connect to which tasks."),
    "status": ("mesh.cli.status:status", "Say how the whole mesh is."),
    "doctor": ("mesh.cli.doctor:doctor", "Examine this host; say what to do."),
    "trace": ("mesh.cli.trace:trace", "Walk one packet through a node's rules, step by step."),
    "rules": ("mesh.cli.rules:rules", "Show a node's rules; compare them with its kernel."),
    "schema": ("mesh.cli.schema:schema", "Print the JSON Schema of what etcd holds."),
    "bench": ("mesh.cli.bench:bench", "Measure the mesh on this machine."),
    "lab": ("mesh.cli.lab:lab", "A whole cluster in namespaces of this machine."),
}
"""Name, where it lives, and what it is for: help needs no import."""


class Failure(click.ClickException):
    """An expected failure: one line on stderr and its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: Any = None) -> None:
        """Write the line."""
        output.fail(self.message)


@contextmanager
def _failures() -> Iterator[None]:
    """Turn every expected error into a `Failure`: bad usage 2, the rest as mesh.errors says."""
    try:
        yield
    except errors.MeshError as error:
        raise Failure(str(error), error.exit_code) from None
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "mesh"
        text = error.format_message().rstrip(".")
        raise Failure(f"{text} (see `{where} --help`)", errors.BadUsage.exit_code) from None
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None  # 128 + SIGINT, as shells count


class Root(options.Noun):
    """The command line itself: nouns by name, expected errors as exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every noun, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the noun's module."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table; nothing is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the root's options."""
        with _failures():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        with _failures():
            return super().invoke(ctx)


@asynccontextmanager
async def open_etcd(etcd: EtcdConfig) -> AsyncIterator[Store]:
    """The store of production."""
    from mesh.agent import etcd as connection

    async with connection.opened(etcd) as store:
        yield store


@click.command(
    cls=Root,
    params=options.common_options(root=True),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="mesh")
@click.pass_context
def mesh(ctx: click.Context) -> None:
    """An ingress routing mesh for container clusters, driven by etcd.

    Exit codes: 0 ok, 1 failed, 2 bad usage, 3 not found, 4 conflict.
    """
    if ctx.obj is None:
        ctx.obj = open_etcd


def main() -> None:
    """Run the command line and exit."""
    mesh(prog_name="mesh")
