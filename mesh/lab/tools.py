"""What a lab needs of this machine, checked before anything is started.

Reads only.  One line names everything that is missing, with the Debian packages that have it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from mesh.errors import HostNotReady
from mesh.lab.environment import SYSTEM_PATH

_PACKAGES: Final = {
    "etcd": "etcd-server",
    "ip": "iproute2",
    "nft": "nftables",
    "wg": "wireguard-tools",
}
_USERSPACE: Final = {"wireguard-go": "wireguard-go"}
"""Only where the kernel has no WireGuard; then it needs the tun device, too."""

_TUN: Final = Path("/dev/net/tun")


def check() -> None:
    """Raises HostNotReady if a lab cannot run here."""
    has_wireguard = Path("/sys/module/wireguard").exists()
    wanted = _PACKAGES if has_wireguard else _PACKAGES | _USERSPACE
    path = f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"
    missing = [tool for tool in wanted if shutil.which(tool, path=path) is None]
    if missing:
        packages = " ".join(wanted[tool] for tool in missing)
        raise HostNotReady(
            f"a lab needs {', '.join(missing)}: `apt-get install {packages}` (Debian's packages)"
        )
    if not has_wireguard and not os.access(_TUN, os.R_OK | os.W_OK):
        remedy = "load the module tun" if not _TUN.exists() else "run as root, or `chmod 666` it"
        raise HostNotReady(f"a lab needs {_TUN} for wireguard-go: {remedy}")
    if os.geteuid() != 0 and _limit("max_user_namespaces") == 0:
        raise HostNotReady(
            "this kernel gives users no namespaces (sysctl user.max_user_namespaces is 0): "
            "run as root"
        )


def _limit(name: str) -> int:
    try:
        return int(Path("/proc/sys/user", name).read_text())
    except FileNotFoundError:
        return 0
