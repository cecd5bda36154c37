"""What is counted of healings, and when somebody is said to struggle with the agent."""

from __future__ import annotations

from mesh.engine.healing import SOMEBODY, WINDOW, History, Repair
from mesh.model.report import Healed, Healings

NOW = 1_767_323_045.0  # 2026-01-02T03:04:05Z


def test_kinds_are_counted_by_healing_and_the_last_one_is_kept() -> None:
    history = History()

    history.add(NOW - 2, Repair(elements=12, program=True), "del table mesh", "nft(4711)")
    history.add(NOW - 1, Repair(elements=1), "del element in ports4", "nft(4712)")
    history.add(NOW, Repair(lines=1), "our line in iptables-legacy FORWARD removed", "")

    last = Healed(
        at="2026-01-02T03:04:05Z", what="our line in iptables-legacy FORWARD removed", by=SOMEBODY
    )
    assert history.report() == Healings(total=3, elements=2, program=1, firewall=1, last=last)


def test_nothing_healed_is_nothing_told() -> None:
    history = History()

    assert history.report() == Healings()
    assert history.problem(NOW) is None


def test_a_program_that_comes_again_and_again_is_named_until_it_is_quiet() -> None:
    history = History()
    for number in range(37):
        history.add(NOW + number, Repair(program=True), "del table mesh", f"nft({4711 + number})")
    history.add(NOW + 40, Repair(elements=1), "del element in ports4", "python3(9)")

    told = history.problem(NOW + 41)

    assert told is not None
    assert told.about == "healing"
    assert "nft(4747) keeps" in told.message
    assert "del table mesh" in told.message
    assert "37 times" in told.message
    assert history.problem(NOW + 41 + WINDOW) is None


def test_a_few_changes_by_different_programs_are_no_struggle() -> None:
    history = History()
    for number, program in enumerate(("nft", "iptables", "firewalld", "ufw", "python3", "nft")):
        history.add(NOW + number, Repair(program=True), "del table mesh", f"{program}(1)")

    assert history.problem(NOW + 7) is None


def test_a_struggle_is_logged_now_and_then_only() -> None:
    history = History()

    logged = [history.add(NOW + n, Repair(program=True), "x", "nft(1)") for n in range(100)]

    assert all(logged[:10])
    assert 10 < sum(logged) < 30
