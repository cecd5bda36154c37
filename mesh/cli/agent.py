"""`mesh agent`: this node's agent in the foreground, or the removal of what one left behind."""

from __future__ import annotations

import json
import logging
import time

import click

from mesh.cli import options, output


@click.command(cls=options.Verb)
@click.option("--cleanup", is_flag=True, help="Remove everything an agent set up here, and end.")
@click.option(
    "--downgrade", is_flag=True, help="Take over, or remove, what a later version's agent left."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def agent(cleanup: bool, downgrade: bool, log_level: str, log_format: str) -> None:
    """Run this node's agent until SIGTERM; --config says which node it is.

    Forwarding goes on when it ends: only --cleanup takes the mesh off this host.
    """
    import msgspec

    config = options.agent_config()
    config = msgspec.structs.replace(config, etcd=options.etcd_config())
    _configure_logging(log_level, log_format)
    if cleanup:
        from mesh.agent import cleanup as cleaner

        options.exit_with(cleaner.run(config, downgrade=downgrade))
    from mesh.agent import daemon

    options.exit_with(daemon.run(config, downgrade=downgrade))


class _JsonLines(logging.Formatter):
    """One JSON object a line, with the time in UTC (RFC 3339)."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{now}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _TextLines(logging.Formatter):
    """One line a record: text from etcd cannot forge another one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record without its traceback, which follows on lines of its own."""
        record.message = output.printable(record.message)
        return super().formatMessage(record)


def _configure_logging(level: str, form: str) -> None:
    """Send all logs to stderr, where systemd and container runtimes collect them."""
    handler = logging.StreamHandler()
    text = _TextLines("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
