"""Keys that ended with a lease while etcd could not be trusted are not taken for gone at once."""

from __future__ import annotations

from msgspec import structs

from mesh.agent.state import State
from mesh.store.protocol import Change, Changes
from tests.support import records
from tests.support.records import KEYS

NODE = KEYS.alive("n2")
TASK = KEYS.task("web", "leased")


def _state() -> State:
    state = State(KEYS, "n1")
    state.apply(records.snapshot(records.cluster() | records.service("web")))
    for key, record in ((NODE, {}), *records.task("web", "leased", 2, 2).items()):
        state.apply(_leased(key, record, 2))
    state.apply(records.put(*_only(records.task("web", "kept", 2, 3)), 3))
    return state


def _leased(key: str, record: records.Record, revision: int) -> Changes:
    item = structs.replace(records.item(key, record, revision), lease=7)
    return Changes((Change(key, item, revision),), revision)


def _only(record: dict[str, records.Record]) -> tuple[str, records.Record]:
    ((key, value),) = record.items()
    return key, value


def _tasks(state: State) -> set[str]:
    view = state.service_view("web")
    assert view is not None
    return {task.id for task in view.tasks}


def _alive(state: State) -> frozenset[str]:
    view = state.node_view()
    assert view is not None
    return view.live


def _lose(state: State, *keys: str) -> frozenset[str]:
    return frozenset().union(*(state.apply(records.delete(key, 9)).services for key in keys))


def test_what_ends_with_a_lease_in_doubt_stays() -> None:
    state = _state()

    state.doubting = True
    touched = _lose(state, NODE, TASK)

    assert touched == frozenset()
    assert "n2" in _alive(state)
    assert _tasks(state) == {"leased", "kept"}


def test_what_was_written_for_good_goes_in_doubt_too() -> None:
    state = _state()

    state.doubting = True
    touched = _lose(state, KEYS.task("web", "kept"))

    assert touched == {"web"}
    assert _tasks(state) == {"leased"}


def test_what_came_back_is_doubted_no_longer() -> None:
    state = _state()

    state.doubting = True
    _lose(state, NODE, TASK)
    state.apply(_leased(NODE, {}, 10))
    believed = state.believe()

    assert "n2" in _alive(state)
    assert _tasks(state) == {"kept"}
    assert believed.services == {"web"}


def test_what_did_not_come_back_is_gone_in_the_end() -> None:
    state = _state()

    state.doubting = True
    _lose(state, NODE, TASK)
    believed = state.believe()

    assert "n2" not in _alive(state)
    assert believed == (frozenset({"web"}), True, False)
    assert state.doubted == set()


def test_a_node_knows_whether_its_own_sign_of_life_is_there() -> None:
    state = _state()
    own = KEYS.alive("n1")
    told = [state.is_announced]

    state.apply(_leased(own, {}, 4))
    told.append(state.is_announced)
    state.apply(records.delete(own, 5))
    told.append(state.is_announced)
    state.apply(_leased(own, {}, 6))
    state.doubting = True
    state.apply(records.delete(own, 7))
    told.append(state.is_announced)

    assert told == [True, True, False, False]
