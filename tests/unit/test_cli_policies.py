"""`mesh policy` on an in-memory store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.agent import config
from mesh.store.memory import MemoryStore
from tests.support.commands import KEYS, CommandLine, add_web, start_cluster

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = """
apiVersion: warren.io/v1
kind: NetworkPolicy
metadata:
  name: api-policy
spec:
  podSelector:
    matchLabels:
      app: api
  ingress:
    - from:
      - podSelector:
          matchLabels:
            app: frontend
      - ipBlock:
          cidr: 192.0.2.0/24
          except: [192.0.2.1/32]
      ports:
        - protocol: TCP
          port: 8080
"""

RECORD = {
    "name": "api-policy",
    "podSelector": {"matchLabels": {"app": "api"}},
    "ingress": [
        {
            "from": [
                {"podSelector": {"matchLabels": {"app": "frontend"}}},
                {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.1/32"]}},
            ],
            "ports": [{"port": 8080}],
        }
    ],
}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "agent.toml")
    monkeypatch.chdir(tmp_path)
    command_line = CommandLine(MemoryStore())
    start_cluster(command_line)
    return command_line


def write(path: Path, text: str) -> str:
    (path / "policy.yaml").write_text(text)
    return "policy.yaml"


def test_a_manifest_is_stored_as_a_record(cli: CommandLine, tmp_path: Path) -> None:
    cli.ok("policy", "apply", "-f", write(tmp_path, MANIFEST))

    assert cli.get(KEYS.policy("api-policy")) == RECORD


def test_a_record_is_stored_as_it_is(cli: CommandLine, tmp_path: Path) -> None:
    text = '{"name": "shut", "podSelector": {}}'

    cli.ok("policy", "apply", "-f", write(tmp_path, text))

    assert cli.get(KEYS.policy("shut")) == {"name": "shut", "podSelector": {}}


def test_a_file_may_have_several_policies(cli: CommandLine, tmp_path: Path) -> None:
    other = MANIFEST.replace("api-policy", "other")

    cli.ok("policy", "apply", "-f", write(tmp_path, f"{MANIFEST}---{other}"))

    assert [each["name"] for each in cli.json("policy", "ls")] == ["api-policy", "other"]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("kind: NetworkPolicy", "kind: Service", "kind 'Service'"),
        ("name: api-policy", "title: x", "metadata.name"),
        ("port: 8080", "port: 80800", "80800"),
        ("port: 8080", "port: http", "$.ingress[0].ports[0].port"),
        ("protocol: TCP", "protocol: ICMP", "ICMP"),
        ("except: [192.0.2.1/32]", "except: [192.0.3.1/32]", "not within"),
        ("cidr: 192.0.2.0/24", "cidr: 192.0.2.1/24", "192.0.2.1/24"),
        ("      - podSelector:", "      - namespaceSelector:", "namespaceSelector"),
        ("  ingress:", "  policyTypes: [Egress]\n  ingress:", "Egress"),
        ("matchLabels:", "matchLabels: {", "not YAML"),
    ],
)
def test_what_cannot_be_is_refused(
    cli: CommandLine, tmp_path: Path, before: str, after: str, told: str
) -> None:
    failed = cli.run("policy", "apply", "-f", write(tmp_path, MANIFEST.replace(before, after, 1)))

    assert (failed.exit_code, told in failed.stderr) == (2, True), failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_a_policy_tells_which_tasks_it_selects(cli: CommandLine, tmp_path: Path) -> None:
    add_web(cli)
    text = '{"name": "web", "podSelector": {"matchLabels": {"service": "web"}}}'
    cli.ok("policy", "apply", "-f", write(tmp_path, text))

    tasks = cli.json("policy", "inspect", "web")["tasks"]

    assert tasks
    assert all(task.startswith("web/") for task in tasks)


def test_a_policy_is_removed(cli: CommandLine, tmp_path: Path) -> None:
    cli.ok("policy", "apply", "-f", write(tmp_path, MANIFEST))

    cli.ok("policy", "rm", "api-policy")

    assert cli.json("policy", "ls") == []
    assert cli.run("policy", "rm", "api-policy").exit_code == 3
    assert cli.run("policy", "inspect", "api-policy").exit_code == 3
