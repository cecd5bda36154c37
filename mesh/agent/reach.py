"""Which of the other nodes this one reaches over the overlay: the loop, and who is told.

Owns the standings of the peers.  Decides nothing (mesh.reach.judge), and what it finds is this
node's own view: it is reported, and no other node acts on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.agent.http import Reply
from mesh.engine.desired import Touched
from mesh.errors import CommandFailed
from mesh.model.address import FAMILIES
from mesh.model.report import Peer, Peers, Problem
from mesh.reach import judge, memory
from mesh.reach.judge import Reach
from mesh.reach.sockets import Echoes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mesh.agent.config import AgentConfig
    from mesh.agent.network import Network
    from mesh.agent.state import State
    from mesh.agent.tally import Tally
    from mesh.model.view import PeerNode
    from mesh.reach.judge import Pace, Standing
    from mesh.wg.conf import Interface

log = logging.getLogger(__name__)

_OPEN_SECONDS: Final = 1.0
"""Between two tries to open what could not be opened."""


class Watched:
    """One peer: its standing, and the probes by each IP family since it answered one."""

    def __init__(self, peer: PeerNode, standing: Standing) -> None:
        self.peer = peer
        self.standing = standing
        self.misses = [0] * len(FAMILIES)


class Reachability:
    """The peers of one node.  `touch` is told of services that may be planned otherwise now."""

    def __init__(
        self,
        config: AgentConfig,
        state: State,
        network: Network,
        touch: Callable[[Touched], None],
        tally: Tally,
    ) -> None:
        self._own = config.node
        self._pace: Pace | None = config.reach.pace
        self._device = config.overlay_device
        self._directory = Path(config.state_dir)
        self._state = state
        self._network = network
        self._touch = touch
        self._tally = tally
        self._watched: dict[str, Watched] = {}
        self._by_number: dict[int, Watched] = {}
        self._nodes: object = None
        self._seen: Interface | None = None
        self._adopted: frozenset[str] = frozenset()
        self._unsaved = asyncio.Event()
        self._now = 0.0
        self._turn = 0
        self.left_out: frozenset[str] = frozenset()
        self.problems: tuple[Problem, ...] = ()

    def standings(self) -> Iterator[tuple[str, Standing]]:
        """Every peer and its standing."""
        for name, watched in self._watched.items():
            yield name, watched.standing

    def adopt(self) -> None:
        """Leave out whom the agent before this one did, before anything is planned."""
        if self._pace is None:
            memory.forget(self._directory)
            return
        self.left_out = self._adopted = memory.load(self._directory)
        self._state.nodes.lack(self.left_out)

    def look_after(self, tasks: asyncio.TaskGroup) -> None:
        """Probe from now on."""
        if self._pace is not None:
            tasks.create_task(self._keep_probing(self._pace), name="reach")
            tasks.create_task(self._keep_saved(), name="reach file")

    async def _keep_probing(self, pace: Pace) -> None:
        view = self._state.node_view()
        assert view is not None  # who has no number has no rules yet
        echoes = Echoes(self._device, dict(zip(FAMILIES, view.network.overlay, strict=True)))
        due = looked = time.monotonic()
        reopened = -_OPEN_SECONDS
        try:
            while True:
                now = time.monotonic()
                elapsed, looked = now - looked, now
                if now - reopened >= _OPEN_SECONDS:
                    self._tell(echoes.open())
                    reopened = now
                self.look(echoes, pace, elapsed)
                due = max(due + pace.interval, now)
                await asyncio.sleep(due - time.monotonic())
        finally:
            echoes.close()

    def look(self, echoes: Echoes, pace: Pace, elapsed: float) -> None:
        """Take in what came back, judge, and send the next probes, `elapsed` seconds after the
        last look.
        """
        self._follow_nodes()
        self._now += judge.heeded(elapsed, pace)
        now, before = self._now, {n: w.standing.reach for n, w in self._watched.items()}
        for answer in echoes.receive():
            watched = self._by_number.get(answer.number)
            if watched is not None:
                watched.misses[FAMILIES.index(answer.family)] = 0
                watched.standing = judge.answered(watched.standing, pace, now, answer.trip)
        slept = judge.slept(elapsed, pace)
        for watched in self._watched.values():
            if slept:
                watched.standing = judge.excused(watched.standing)
            watched.standing = judge.looked(watched.standing, pace, now)
        self._follow_sessions()
        for name, watched in self._watched.items():
            if watched.standing.reach is not before[name]:
                self._changed(name, watched.standing)
        self._leave_out(pace)
        self._turn += 1
        for number, watched in self._by_number.items():
            self._probe(echoes, number, watched, pace)

    def _probe(self, echoes: Echoes, number: int, watched: Watched, pace: Pace) -> None:
        ways = [FAMILIES.index(family) for family in echoes.families]
        if not ways:
            return
        # Peers take their turns by different families, so that no look is all of one.
        turn = self._turn + number
        way = ways[judge.way([watched.misses[each] for each in ways], turn)]
        if echoes.send(FAMILIES[way], watched.peer.network.overlay[way], number):
            watched.misses[way] += 1
            watched.standing = judge.probed(watched.standing, pace, self._now)

    def _follow_nodes(self) -> None:
        """Watch the peers that there are now; one with another key or number is another node."""
        nodes = self._network.nodes
        if nodes is self._nodes:
            return
        self._nodes, before = nodes, self._watched
        self._watched = {}
        for name, peer in nodes.items():
            if name == self._own:
                continue
            known = before.get(name)
            if known is None or _identity(known.peer) != _identity(peer):
                lost = name in self._adopted
                known = Watched(peer, (judge.adopted if lost else judge.fresh)(self._now))
            known.peer = peer
            self._watched[name] = known
        if self._watched:
            self._adopted = frozenset()
        self._by_number = {each.peer.network.number: each for each in self._watched.values()}

    def _follow_sessions(self) -> None:
        """WireGuard's word, each time it was asked."""
        seen = self._network.overlay.seen
        if seen is None or seen is self._seen:
            return
        self._seen, now = seen, time.time()
        for watched in self._watched.values():
            session = seen.sessions.get(watched.peer.node.public_key)
            if session is not None:
                age = now - session.handshake if session.handshake else None
                watched.standing = judge.shaken(watched.standing, self._now, age)

    def _leave_out(self, pace: Pace) -> None:
        standings = dict(self.standings())
        live = self._state.nodes.others_alive
        found = judge.left_out(self.left_out, standings, live, pace, self._now)
        if found == self.left_out:
            return
        self.left_out = found
        changed = self._state.nodes.lack(found)
        for name in sorted(changed):
            log.warning("node=%s %s", name, "left out" if name in found else "taken in again")
        self._touch(Touched(self._state.services_on(changed), nodes=False))
        self._unsaved.set()

    def _changed(self, name: str, standing: Standing) -> None:
        self._tally.peer_changes[name, standing.reach.value] += 1
        level = logging.WARNING if standing.reach is Reach.UNREACHABLE else logging.INFO
        log.log(level, "node=%s reach=%s", name, standing.reach.value)

    def _tell(self, reason: str) -> None:
        before, self.problems = self.problems, ()
        if reason:
            message = f"no node can be probed over {self._device}: {reason}; none is left out"
            self.problems = (Problem(about="reach", message=message),)
        if self.problems != before:
            for problem in self.problems:
                log.warning("%s: %s", problem.about, problem.message)
            self._touch(Touched(frozenset(), nodes=False))

    async def _keep_saved(self) -> None:
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            try:
                await asyncio.to_thread(memory.save, self._directory, self.left_out)
            except OSError as error:
                log.warning("reachability not kept for the next agent: %s", error)

    # ---- what is told to who asks

    async def page(self, _accept: str) -> Reply:
        """The peers as JSON."""
        with suppress(CommandFailed):  # then it is what was read last
            await self._network.overlay.read()
        seen = self._network.overlay.seen
        told = Peers(node=self._own, peers=tuple(self._told(seen, time.time())))
        return Reply(msgspec.json.encode(told), "application/json")

    def _told(self, seen: Interface | None, now: float) -> Iterator[Peer]:
        for name, watched in sorted(self._watched.items()):
            key, standing = watched.peer.node.public_key, watched.standing
            session = seen.sessions.get(key) if seen is not None else None
            known = seen.peers.get(key) if seen is not None else None
            handshake = session.handshake if session is not None else 0
            yield Peer(
                name=name,
                reach=standing.reach.value,
                since=round(self._now - standing.since, 3),
                left_out=name in self.left_out,
                rtt=standing.trip,
                heard=round(self._now - standing.heard, 3) if standing.heard is not None else None,
                endpoint=known.endpoint if known is not None else None,
                handshake=round(max(now - handshake, 0), 3) if handshake else None,
                received=session.received if session is not None else 0,
                sent=session.sent if session is not None else 0,
            )


def _identity(peer: PeerNode) -> tuple[str, int]:
    return peer.node.public_key, peer.network.number
