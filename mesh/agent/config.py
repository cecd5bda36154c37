"""The agent's configuration file: what a node knows before it can ask etcd anything.

TOML, snake_case.  Read by the agent, by the command line for its etcd, and written by the lab.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

import msgspec

from mesh.errors import BadUsage
from mesh.model.address import parse_address
from mesh.model.names import check_name, parse_duration
from mesh.model.node import Role, split_endpoint
from mesh.model.publish import PublishMode
from mesh.reach.judge import Pace
from mesh.rules.marks import DEFAULT, Layout

BACKENDS: Final = ("auto", "nftables", "iptables", "iptables-legacy", "iptables-nft")
"""What may drive the rules; `iptables` is the flavour that the host uses."""

FIREWALLS: Final = ("report", "forward", "open")
"""What may be done about a firewall of the host that drops the mesh's flows: nothing; one line in
FORWARD of iptables; lines wherever they are needed."""

DEFAULT_PATH: Final = Path("/etc/mesh/agent.toml")


class EtcdConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach etcd.  `ca`, `cert` and `key` are paths of PEM files."""

    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    prefix: str = "/mesh"
    user: str | None = None
    password: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("endpoints is empty")
        for endpoint in self.endpoints:
            if not endpoint.startswith(("http://", "https://")):
                raise ValueError(f"endpoint {endpoint!r}: write http://HOST:PORT or https://…")
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key go together")
        if not self.prefix.startswith("/") or self.prefix.endswith("/"):
            raise ValueError(f"prefix {self.prefix!r} must start with '/' and not end with one")


class MarksConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which bits of marks are the mesh's on this host: 12 in a row of the packet mark, and at least
    26 of the conntrack mark, those 12 among them.  Other bits stay the host's own.
    """

    packet_mark: int = DEFAULT.packet_mark
    ct_mark: int = DEFAULT.ct_mark

    def __post_init__(self) -> None:
        self.layout  # noqa: B018 - raises ValueError

    @property
    def layout(self) -> Layout:
        """What is where in them."""
        return Layout.of(self.packet_mark, self.ct_mark)


class AdminConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where /metrics, /healthz and /readyz are served: "HOST:PORT", "unix:/PATH", or "" for not.

    They tell the names of services to whoever asks, so by default only this host may.
    """

    listen: str = "127.0.0.1:9477"

    def __post_init__(self) -> None:
        if self.listen.startswith(_UNIX):
            if not self.listen.startswith(f"{_UNIX}/"):
                raise ValueError(f"listen {self.listen!r}: write unix:/ABSOLUTE/PATH")
        elif self.listen:
            try:
                split_endpoint(self.listen)
            except ValueError as error:
                raise ValueError(f"listen {self.listen!r}: {error}") from None

    @property
    def path(self) -> str | None:
        """The path of the unix socket, if it is one."""
        return self.listen.removeprefix(_UNIX) if self.listen.startswith(_UNIX) else None


_UNIX: Final = "unix:"


class ReachConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the other nodes are probed: once in `interval` ("off": never), until `fall` probes in a
    row are unanswered or `rise` answered.
    """

    interval: str = "250ms"
    fall: int = 4
    rise: int = 3

    def __post_init__(self) -> None:
        if self.interval != _OFF:
            try:
                seconds = parse_duration(self.interval)
            except ValueError as error:
                raise ValueError(f'interval {error}, or "off"') from None
            if not _QUICKEST <= seconds <= _SLOWEST:
                raise ValueError(f'interval {self.interval!r} is not from 50ms to 1m, nor "off"')
        for name in ("fall", "rise"):
            if not 1 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} {getattr(self, name)} is not in 1-100")

    @property
    def pace(self) -> Pace | None:
        """The same as numbers; None: off."""
        if self.interval == _OFF:
            return None
        return Pace(parse_duration(self.interval), self.fall, self.rise)


_OFF: Final = "off"
_QUICKEST, _SLOWEST = 0.05, 60.0


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node's configuration.

    `endpoints` are where WireGuard answers ("192.0.2.1" or "192.0.2.1:51820"), best first; empty
    means: the addresses of the interface with the default route.  `publish_mode` is the command
    line's, for ports that do not say.  `published_dir` is where the host ports of each task are
    kept as a file, too, and `published_hook` the command that is told of them.  `exec_checks`:
    commands of health checks are executed here, as root; whoever may write services to etcd chooses
    them.  `loopback_ports`: ports that name 127.0.0.1 or ::1 may answer there.
    """

    node: str
    role: Role = Role.WORKER
    etcd: EtcdConfig = EtcdConfig()
    marks: MarksConfig = MarksConfig()
    admin: AdminConfig = AdminConfig()
    reach: ReachConfig = ReachConfig()
    state_dir: str = "/var/lib/mesh"
    endpoints: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    backend: str = "auto"
    firewall: str = "forward"
    overlay_device: str = "warren0"
    steering_device: str = "warren-x0"
    bridge: str = "warren-br0"
    publish_mode: PublishMode = PublishMode.HOST
    published_dir: str | None = None
    published_hook: tuple[str, ...] = ()
    exec_checks: bool = False
    loopback_ports: bool = False

    def __post_init__(self) -> None:
        check_name(self.node, "node")
        for endpoint in self.endpoints:
            if not _is_address(endpoint):
                split_endpoint(endpoint)
        if self.published_dir is not None and not self.published_dir.startswith("/"):
            raise ValueError(f"published_dir {self.published_dir!r} is not an absolute path")
        if self.published_hook and not self.published_hook[0].startswith("/"):
            raise ValueError(f"published_hook {self.published_hook[0]!r} is not an absolute path")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r} is not one of {', '.join(BACKENDS)}")
        if self.firewall not in FIREWALLS:
            raise ValueError(f"firewall {self.firewall!r} is not one of {', '.join(FIREWALLS)}")
        for name in ("overlay_device", "steering_device", "bridge"):
            device = getattr(self, name)
            if not 0 < len(device) < 16 or "/" in device or device != device.strip():
                raise ValueError(f"{name} {device!r} is not an interface name (1-15 characters)")


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except ValueError:
        return False
    return True


def load(path: Path) -> AgentConfig:
    """The configuration in a file.  Raises BadUsage naming the file and the field."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), AgentConfig)
    except FileNotFoundError:
        raise BadUsage(f"{path}: no such file; `mesh node join` writes one") from None
    except OSError as error:
        raise BadUsage(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise BadUsage(f"{path}: {error}") from None


def dump(config: AgentConfig) -> str:
    """The TOML text that `load` reads back as `config`."""
    top, sections = [], []
    for name, value in msgspec.to_builtins(config).items():
        if isinstance(value, dict):
            lines = [f"{_key(k)} = {_toml(v, k)}" for k, v in value.items() if v is not None]
            sections += ["", f"[{name}]", *lines]
        elif value is not None:
            top.append(f"{name} = {_toml(value)}")
    return "\n".join([*top, *sections, ""])


def _key(text: str) -> str:
    return text if text.isascii() and text.isidentifier() else _toml(text)


def _toml(value: object, name: str = "") -> str:
    """A mark, a number, a text, a truth or a list of texts: JSON is TOML there, but for DEL."""
    if name.endswith("_mark") and isinstance(value, int):
        return f"0x{value:08x}"
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
