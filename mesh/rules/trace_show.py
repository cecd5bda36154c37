"""A walk as lines for people and as a document for programs.  Pure; decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from fractions import Fraction

    from mesh.rules.trace import Answer, Ending, Step, Trace
    from mesh.rules.trace_sets import Target

_WIDTH: Final = 60
"""Columns to which cells of a column are padded at most."""


def lines(trace: Trace) -> list[str]:
    """The walk, its end, and what follows for each kind of backend."""
    found = [*_columns(_step(step) for step in trace.steps)]
    if not trace.answers:
        return [*found, _ending(trace.ending)]
    found += ["to one of:" if len(trace.answers) > 1 else "to:"]
    found += _columns(_answer(answer) for answer in trace.answers)
    for answers in _alike(trace.answers):
        first = answers[0]
        whom = "all of them" if len(answers) == len(trace.answers) else _several(answers)
        found.append(f"for {whom}: {_ending(first.ending)}")
        found += _columns(_step(step) for step in first.steps)
    return found


def _several(answers: list[Answer]) -> str:
    first = str(answers[0].target or "missing slots")
    return first if len(answers) == 1 else f"{first} and {len(answers) - 1} like it"


def _alike(answers: Iterable[Answer]) -> list[list[Answer]]:
    """Answers of which the packet goes the same way."""
    found: dict[tuple[object, ...], list[Answer]] = {}
    for answer in answers:
        way = tuple((step.where, step.rule) for step in answer.steps)
        found.setdefault((answer.ending, way), []).append(answer)
    return list(found.values())


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    kept = list(rows)
    # A rule that is told by its text may be long; it need not move all others.
    widths = [
        max((len(cell) for cell in column if len(cell) <= _WIDTH), default=0)
        for column in zip(*kept, strict=True)
    ]
    for row in kept:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(padded)}".rstrip()


def _step(step: Step) -> tuple[str, ...]:
    return step.where, step.what, f"→ {step.outcome}"


def _answer(answer: Answer) -> tuple[str, ...]:
    ending, chance = answer.ending, answer.probability
    way = ending.path.value if ending.path is not None else ending.verdict.value
    seen = f"sees {ending.seen}" if ending.seen else ""
    target = str(answer.target) if answer.target is not None else "(no such slot)"
    return target, str(chance), f"{float(chance):.2%}", way, seen


def _ending(ending: Ending) -> str:
    parts = [ending.verdict.value]
    if ending.path is not None:
        parts.append(f"path {ending.path.value}")
    if ending.reason:
        parts.append(ending.reason)
    return ", ".join(parts)


def document(trace: Trace) -> dict[str, Any]:
    """The walk with its keys in JSON's style; probabilities are exact fractions as text."""
    packet = trace.packet
    return {
        "packet": {
            "source": packet.source,
            "destination": packet.destination,
            "protocol": packet.protocol.value,
            "port": packet.port,
            "enters": packet.entry.value,
        },
        **_end(trace.ending),
        "steps": [step._asdict() for step in trace.steps],
        "backends": [
            {
                **_target(answer.target),
                "slots": answer.slots,
                **_chance("probability", answer.probability),
                **_end(answer.ending),
                "steps": [step._asdict() for step in answer.steps],
            }
            for answer in trace.answers
        ],
        "pool": [{**_target(target), **_chance("share", share)} for target, share in trace.pool],
    }


def _target(target: Target | None) -> dict[str, Any]:
    if target is None:
        return {"address": None, "port": None}
    return {"address": target.address, "port": target.port}


def _chance(name: str, chance: Fraction) -> dict[str, Any]:
    return {name: str(chance), "percent": round(float(chance) * 100, 4)}


def _end(ending: Ending) -> dict[str, Any]:
    return {
        "verdict": ending.verdict.value,
        "reason": ending.reason or None,
        "path": ending.path.value if ending.path is not None else None,
        "seen": ending.seen or None,
    }
