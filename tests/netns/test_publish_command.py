"""`mesh publish`, `unpublish` and `published`: what scripts see, without etcd."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from mesh.cli import main
from tests.support import drivers, rules

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

pytestmark = pytest.mark.netns


class Shell:
    """Runs verbs in a namespace of its own."""

    def __init__(self, state: Path, backend: str) -> None:
        self._env = {"MESH_HOSTPORTS_DIR": str(state), "MESH_BACKEND": backend}

    def run(self, *words: str) -> Result:
        return CliRunner(env=self._env).invoke(main.mesh, words)

    def ok(self, *words: str) -> str:
        done = self.run(*words)
        assert done.exit_code == 0, done.output
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.ok(*words, "--json"))


@pytest.fixture(params=drivers.KERNEL)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    with rules.namespace():
        yield Shell(tmp_path / "state", request.param)


def test_ports_come_and_go(shell: Shell) -> None:
    words = ("publish", "web", "172.17.0.2", "fd17::2", "-p", "8080:80", "-p", "80", "-p",
             "target=53,published=53,protocol=udp", "-p", "9000-9002:9000-9002")  # fmt: skip
    shown = "*:8080->80/tcp, *:9000-9002->9000-9002/tcp, *:32000->80/tcp, *:53->53/udp"

    assert shell.ok(*words).strip().endswith(f"Published: web: {shown}")
    assert shell.ok(*words).strip().endswith(f"Published: web: {shown}")
    assert shell.ok("published", "web").splitlines()[1].split(maxsplit=3) == [
        "web", "172.17.0.2,", "fd17::2", shown
    ]  # fmt: skip
    document = shell.json("published")
    assert [each["task"] for each in document] == ["web"]
    assert document[0]["ports"][1] == {
        "hostPort": 32000,
        "containerPort": 80,
        "protocol": "tcp",
        "podName": "web",
        "podIP": "172.17.0.2",
    }
    rules.nft("flush", "ruleset")
    assert "as they should be again" in shell.run("published", "--check").stderr
    assert "as they should be again" not in shell.run("published", "--check").stderr

    assert shell.json("unpublish", "web") == {"unpublished": ["web"]}
    assert shell.json("published") == []
    shell.ok("publish", "web", "172.17.0.2", "-p", "8080:80")
    assert shell.json("published", "--restore")[0]["task"] == "web"
    assert shell.json("unpublish", "--all") == {"unpublished": ["web"]}
    assert rules.nft("list", "ruleset") == ""


@pytest.mark.parametrize("shell", ["nftables"], indirect=True)
def test_what_goes_wrong_is_told_by_a_line_and_an_exit_code(shell: Shell) -> None:
    shell.ok("publish", "web", "172.17.0.2", "-p", "8080:80")
    for words, code, said in (
        ("publish api 172.17.0.3 -p 8080:80", 4, "published by task web"),
        ("publish ssh 172.17.0.3 -p 22:22", 4, "protected"),
        ("publish api 172.17.0 -p 80", 2, "not an IP address"),
        ("publish api 172.17.0.3 -p 99999:80", 2, "99999"),
        ("publish api 172.17.0.3 -p target=80,mode=ingress", 2, "mesh service create"),
        ("publish api 172.17.0.3 -p 80 --dynamic 5", 2, "FIRST-LAST"),
        ("publish api 172.17.0.3 -p 80 --backend pf", 2, "is not one of"),
        ("publish api 172.17.0.3", 2, "--publish"),
        ("published api", 3, "mesh published"),
        ("unpublish api", 3, "mesh published"),
        ("unpublish", 2, "--all"),
        ("unpublish web --force", 2, "--all"),
        ("published --state-dir /proc/none", 0, ""),
        ("publish api 172.17.0.3 -p 80 --state-dir /proc/none", 1, "choose another"),
    ):
        done = shell.run(*words.split())
        assert (done.exit_code, said in done.output) == (code, True), (words, done.output)
        assert len(done.stderr.splitlines()) == (1 if code else 0)
    shell.ok("publish", "ssh", "172.17.0.3", "-p", "22:22", "--force")
    shell.ok("unpublish", "--all")
