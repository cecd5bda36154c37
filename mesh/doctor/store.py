"""Checks of etcd and of what it knows: reachable, new enough, this node in it, agents alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mesh import __version__
from mesh.doctor import check

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mesh.doctor.check import Check
    from mesh.doctor.subject import Known, Subject
    from mesh.store.etcd_version import Server

_OLDEST: Final = (3, 4)
_SOUND: Final = ((3, 4, 22), (3, 5, 6))
"""The first release of each line that is fit for production (kubernetes/website#40816)."""

_SKEW_SECONDS: Final = 5.0
"""More than a slow answer explains; certificates and logs are read with clocks."""


def of_etcd(known: Known | None, error: str, servers: Sequence[Server]) -> Iterator[Check]:
    """Whether etcd answers, and with what.  `error` says why nothing is known."""
    if known is None:
        what = "start etcd, or name it with --etcd, MESH_ETCD or in agent.toml"
        yield check.fail("etcd", error, what)
        return
    answered = [server for server in servers if server.version is not None]
    shown = ", ".join(f"{s.endpoint} {s.version}" for s in answered) or "version not told"
    evidence = f"{shown}, revision {known.revision}"
    silent = [f"{s.endpoint} ({s.error})" for s in servers if s.version is None]
    old = [s for s in answered if _age(s.version or "") < _OLDEST]
    unsound = [s for s in answered if not _is_sound(s.version or "")]
    if old:
        yield check.fail("etcd", evidence, "upgrade etcd to 3.4.22 or newer")
    elif unsound:
        fix = "upgrade etcd to 3.4.22, 3.5.6 or newer: earlier releases may lose or mix data"
        yield check.warn("etcd", evidence, fix)
    elif silent and len(servers) > 1:
        text = f"{evidence}; no answer: {', '.join(silent)}"
        yield check.warn("etcd", text, "start these members, or take them out of the endpoints")
    else:
        yield check.ok("etcd", evidence)
    yield from _of_clock(answered)


def _age(version: str) -> tuple[int, ...]:
    return check.numbers(version)[:2]


def _is_sound(version: str) -> bool:
    found = check.numbers(version)
    return all(found >= least for least in _SOUND if found[:2] == least[:2])


def _of_clock(servers: Sequence[Server]) -> Iterator[Check]:
    told = [server.ahead for server in servers if server.ahead is not None]
    if not told:
        return
    worst = max(told, key=abs)
    if abs(worst) > _SKEW_SECONDS:
        where = "ahead of" if worst > 0 else "behind"
        text = f"etcd's clock is {abs(worst):.0f} s {where} this host's"
        yield check.warn("clock", text, "let NTP keep both clocks (timedatectl set-ntp true)")
    else:
        yield check.ok("clock", f"within {_SKEW_SECONDS:g} s of etcd's")


def of_cluster(subject: Subject) -> Iterator[Check]:
    """Whether there is a cluster, whether this node is in it, and how old its agents are."""
    known, node = subject.known, subject.config.node
    if known is None:
        return
    if known.cluster is None:
        fix = "run `mesh cluster init`, or choose the cluster's keys with --prefix"
        status = check.fail if subject.joined else check.warn
        yield status("cluster", f"none under {subject.config.etcd.prefix}", fix)
        return
    yield check.ok("cluster", known.cluster.id)
    if not subject.joined:
        fix = "run `mesh node join NAME`, or name its agent.toml with --config"
        yield check.warn("node", "this host has no configuration, so it is no node", fix)
        return
    yield _of_node(subject, known)
    others = {r.version: name for name, r in known.reports.items() if r.version != __version__}
    if others:
        shown = ", ".join(f"{name} has {version}" for version, name in others.items())
        fix = "upgrade all nodes to one version"
        yield check.warn("version", f"{__version__} here, {shown}", fix)
    else:
        yield check.ok("version", f"{__version__} everywhere")
    for problem in subject.reported.problems if subject.reported is not None else ():
        yield check.warn("agent", f"{node} reports {problem.about}", problem.message)


def _of_node(subject: Subject, known: Known) -> Check:
    node = subject.config.node
    if not known.registered:
        return check.warn("node", f"{node} has not registered", "start `mesh agent` here")
    if known.network is None:
        fix = "start an agent with role manager: it gives numbers"
        return check.fail("node", f"{node} has no number", fix)
    number = known.network.number
    if not known.alive:
        fix = "start `mesh agent` here: other nodes send no connections to a dead one"
        return check.warn("node", f"{node}, number {number}, has no living agent", fix)
    return check.ok("node", f"{node}, number {number}, its agent is alive")
