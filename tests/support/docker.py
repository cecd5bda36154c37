"""Docker's rules for its default bridge, as dockerd 20.10 (seen) and 28 (its documentation) write
them, and what it does to them when firewalld tells it to reload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_RULES: Final = {
    "20.10": """
        -N DOCKER
        -N DOCKER-ISOLATION-STAGE-1
        -N DOCKER-ISOLATION-STAGE-2
        -N DOCKER-USER
        -A FORWARD -j DOCKER-ISOLATION-STAGE-1
        -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        -A FORWARD -o docker0 -j DOCKER
        -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
        -A FORWARD -i docker0 -o docker0 -j ACCEPT
        -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
        -A DOCKER-ISOLATION-STAGE-1 -j RETURN
        -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
        -A DOCKER-ISOLATION-STAGE-2 -j RETURN
    """,
    "28": """
        -N DOCKER
        -N DOCKER-BRIDGE
        -N DOCKER-CT
        -N DOCKER-INTERNAL
        -N DOCKER-FORWARD
        -N DOCKER-USER
        -I FORWARD -j DOCKER-FORWARD
        -A DOCKER ! -i docker0 -o docker0 -j DROP
        -A DOCKER-BRIDGE -o docker0 -j DOCKER
        -A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        -A DOCKER-FORWARD -j DOCKER-CT
        -A DOCKER-FORWARD -j DOCKER-INTERNAL
        -A DOCKER-FORWARD -j DOCKER-BRIDGE
        -A DOCKER-FORWARD -i docker0 -j ACCEPT
    """,
}
VERSIONS: Final = tuple(_RULES)
PROGRAMS: Final = ("iptables", "ip6tables")

Run = Callable[..., str]


def start(run: Run, version: str, flavour: str) -> None:
    """What dockerd does on a host that did not forward yet: the policy becomes DROP."""
    for program in PROGRAMS:
        for line in _RULES[version].split("\n"):
            if words := line.split():
                run(f"{program}-{flavour}", "-w", *words)
        _user_first(run, f"{program}-{flavour}")
        run(f"{program}-{flavour}", "-w", "-P", "FORWARD", "DROP")


def reload(run: Run, version: str, flavour: str) -> None:
    """Its chains are made again, and those that must come first are put first."""
    for program in (f"{name}-{flavour}" for name in PROGRAMS):
        run(program, "-w", "-F", "FORWARD")
        for chain in (word for word in _RULES[version].split() if word.startswith("DOCKER")):
            run(program, "-w", "-F", chain)
        for line in _RULES[version].split("\n"):
            if (words := line.split()) and words[0] != "-N":
                run(program, "-w", *words)
        _user_first(run, program)


def _user_first(run: Run, program: str) -> None:
    """After every change of its networks DOCKER-USER is made the first chain again."""
    if "-j DOCKER-USER" in run(program, "-w", "-S", "FORWARD"):
        run(program, "-w", "-D", "FORWARD", "-j", "DOCKER-USER")
    else:
        run(program, "-w", "-A", "DOCKER-USER", "-j", "RETURN")
    run(program, "-w", "-I", "FORWARD", "-j", "DOCKER-USER")
