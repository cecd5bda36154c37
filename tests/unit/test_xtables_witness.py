"""Two readers of one table: when they agree, and how a disagreement is told."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.rules import xtables, xtables_witness

CHAIN = "MESH-P-00001"
TEXT = (
    "! -p sctp -m comment --comment 10402:0 -m statistic --mode random "
    "--probability 0.50000000000 -j DNAT --to-destination 10.0.1.2:80"
)
TOLD: dict[str, Any] = {
    "protocol": "!sctp",
    "comment": {"comment": "10402:0"},
    "statistic": {"mode": "random", "probability": "0.50000000000"},
    "target": {"DNAT": {"to-destination": "10.0.1.2:80"}},
    "counters": [3, 180],
}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TEXT, TOLD),
        ("-j MESH-RAW", {"target": "MESH-RAW"}),
        ("-s 10.0.0.0/15 -i wg0 -g MESH-RAW-REPLY",
         {"src": "10.0.0.0/15", "in-interface": "wg0", "target": {"goto": "MESH-RAW-REPLY"}}),
        ("-p ipv6-icmp -m icmp6 --icmpv6-type 128 -j REDIRECT",
         {"protocol": "icmpv6", "icmp6": {"icmpv6-type": "128"}, "target": "REDIRECT"}),
        ("-m set --match-set a src -m set ! --match-set b dst,dst -j DROP",
         {"set": [{"match-set": ["a", "src"]}, {"match-set": ["!", "b", "dst,dst"]}],
          "target": "DROP"}),
        ('-m bpf --bytecode "1,6 0 0 0" -j CT --notrack',
         {"bpf": {"bytecode": "1,6 0 0 0"}, "target": {"CT": {"notrack": ""}}}),
    ],
)  # fmt: skip
def test_the_same_rule_in_both_languages_is_the_same(text: str, told: dict[str, Any]) -> None:
    assert xtables_witness.words(told) == xtables_witness.words_of_text(text)


def differences(text: str | None, told: list[dict[str, Any]] | None) -> str:
    saved = {"nat": xtables.Saved({} if text is None else {CHAIN: (text,)})}
    seen = {"nat": {} if told is None else {CHAIN: told}}
    ours = {"nat": set[str]() if text is None else {CHAIN}}
    return "\n".join(xtables_witness.disagreements(ours, saved, seen))


@pytest.mark.parametrize(
    ("text", "told", "words"),
    [
        (TEXT, None, "does not see it"),
        (None, [TOLD], "only python-iptables"),
        (TEXT, [TOLD, TOLD], "1 rules, python-iptables 2"),
        (TEXT, [TOLD | {"protocol": "sctp"}], "!-p / -p"),
        (TEXT, [TOLD | {"target": "ACCEPT"}], "10.0.1.2:80"),
    ],
)
def test_a_disagreement_is_told_with_the_words_that_differ(
    text: str | None, told: list[dict[str, Any]] | None, words: str
) -> None:
    found = differences(text, told)

    assert found.startswith(f"nat {CHAIN}")
    assert words in found
    assert "\n" not in found


def test_those_who_agree_have_nothing_to_tell() -> None:
    assert differences(TEXT, [TOLD]) == ""
