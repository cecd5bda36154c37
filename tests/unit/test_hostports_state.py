"""The state directory: what is written is read, alone, whatever became of the writer."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

from mesh.errors import HostNotReady, InvalidRecord
from mesh.hostports.publications import Publication
from mesh.hostports.statedir import Header, StateDirectory
from mesh.model.mapping import Cursors
from mesh.model.publish import Protocol, PublishedPort

if TYPE_CHECKING:
    from pathlib import Path

    from pytest import MonkeyPatch  # noqa: PT013 - the annotation alone

WEB = Publication(
    task="web",
    addresses=("172.17.0.2", "fd17::2"),
    ports=(PublishedPort(target=80, published=8080, protocol=Protocol.UDP, host_ip="192.0.2.1"),),
)
API = msgspec.structs.replace(WEB, task="a" * 64)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "hostports")


def test_what_is_written_is_read(state: StateDirectory, tmp_path: Path) -> None:
    assert list(state.tasks()) == []
    with state.locked():
        state.write(WEB)
        state.write(API)
        state.write(WEB)
        state.sync()

    again = StateDirectory(tmp_path / "hostports")
    assert again.read("web") == WEB
    assert {each.task for each in again.tasks()} == {"web", API.task}
    with again.locked():
        again.remove("web")
        again.remove("web")
        again.sync()
    assert state.read("web") is None
    assert state.read("../web") is None


def test_the_header_is_kept_and_the_owner_drawn_once(state: StateDirectory) -> None:
    with state.locked():
        first = state.header
        assert first.owner != 0
        state.save(msgspec.structs.replace(first, generation=1, cursors=Cursors(tcp=32005)))
        long = msgspec.structs.replace(state.header, unfinished=True, namespace="b" * 60)
        state.save(long)
        state.save(Header(owner=first.owner, generation=2))

    with state.locked():
        assert state.header == Header(owner=first.owner, generation=2)


def test_one_at_a_time(state: StateDirectory, tmp_path: Path) -> None:
    other, entered = StateDirectory(tmp_path / "hostports"), threading.Event()

    def enter() -> None:
        with other.locked():
            entered.set()

    thread = threading.Thread(target=enter)
    with state.locked():
        thread.start()
        assert not entered.wait(0.05)
    thread.join(10)
    assert entered.is_set()


def test_what_a_power_cut_left_is_nothing(state: StateDirectory, tmp_path: Path) -> None:
    with state.locked():
        state.write(WEB)
    tasks = tmp_path / "hostports" / "tasks"
    (tasks / "web.json").write_bytes(b"")
    (tasks / ".api.json").write_bytes(b"{")
    (tmp_path / "hostports" / "header").write_bytes(b"\0" * 512)

    assert list(state.tasks()) == []
    with state.locked():
        assert state.header.generation == 0


@pytest.mark.parametrize(
    "damage", [b"{", b"{}", b'{"task": "web"}', b'{"task": "other", "addresses": ["10.0.0.1"], '
               b'"ports": []}']
)  # fmt: skip
def test_what_cannot_be_read_is_told(state: StateDirectory, tmp_path: Path, damage: bytes) -> None:
    with state.locked():
        state.write(WEB)
    (tmp_path / "hostports" / "tasks" / "web.json").write_bytes(damage)

    with pytest.raises(InvalidRecord, match=r"web\.json.*remove"):
        list(state.tasks())


def test_a_full_disk_leaves_the_file_as_it_was(
    state: StateDirectory, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    with state.locked():
        state.write(WEB)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(HostNotReady, match=r"web\.json: No space"):
            state.write(msgspec.structs.replace(WEB, addresses=("172.17.0.9",)))

    assert state.read("web") == WEB
    assert os.listdir(tmp_path / "hostports" / "tasks") == ["web.json"]


def test_clear_leaves_nothing_of_ours(state: StateDirectory, tmp_path: Path) -> None:
    path = tmp_path / "hostports"
    with state.locked():
        state.write(WEB)
        (path / "note").write_text("somebody else's")
        state.clear()
    assert os.listdir(path) == ["note"]
    (path / "note").unlink()
    with state.locked():
        state.clear()
    assert not path.exists()
    with state.locked():
        state.write(WEB)
