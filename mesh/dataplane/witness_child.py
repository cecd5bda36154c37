"""Reads legacy tables with python-iptables and prints what it saw as JSON.

A process of its own, for one family: the library may crash, keeps what it loaded of the other
family's extensions, and sees the network namespace it was started in.

    python -m mesh.dataplane.witness_child 4|6 TABLE…
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

_PREFIX: Final = "MESH-"


def main() -> None:
    """Print the rules of our chains, and those of others that lead to them, by table and chain."""
    import iptc

    family, *names = sys.argv[1:]
    # To tell a chain from an extension it opens every table of this list, which creates it.
    iptc.Table.ALL = iptc.Table6.ALL = names
    json.dump({name: _read(name, ipv6=family == "6") for name in names}, sys.stdout)


def _read(name: str, *, ipv6: bool) -> dict[str, list[Any]]:
    import iptc
    from iptc import easy

    table = iptc.Table6(name) if ipv6 else iptc.Table(name)
    return {
        chain.name: [
            easy.decode_iptc_rule(rule, ipv6)
            for rule in chain.rules
            if chain.name.startswith(_PREFIX) or _leads_to_us(rule)
        ]
        for chain in table.chains
    }


def _leads_to_us(rule: Any) -> bool:
    return rule.target is not None and rule.target.name.startswith(_PREFIX)


if __name__ == "__main__":
    main()
