"""Which backend forwards: what the agent reports, the configuration says, the kernel holds."""

from __future__ import annotations

import pytest

from mesh.engine import backend

NFT, LEGACY, XT_NFT = "nftables", "iptables-legacy", "iptables-nft"


@pytest.mark.parametrize(
    ("reported", "configured", "holding", "expected"),
    [
        # The report counts where the kernel bears it out.
        (LEGACY, "auto", (LEGACY,), LEGACY),
        (LEGACY, "nftables", (NFT, LEGACY), LEGACY),
        (NFT, "iptables-nft", (XT_NFT, NFT), NFT),
        # What was reported is gone, and somebody else holds rules.
        (NFT, "auto", (LEGACY,), LEGACY),
        (NFT, "iptables-legacy", (LEGACY, XT_NFT), LEGACY),
        # No report: the configuration, then whoever holds rules.
        (None, "iptables-nft", (NFT, XT_NFT), XT_NFT),
        (None, "iptables", (NFT, LEGACY), LEGACY),
        (None, "auto", (LEGACY,), LEGACY),
        (None, "nftables", (XT_NFT,), XT_NFT),
        # Nobody holds any.
        (LEGACY, "auto", (), LEGACY),
        (None, "iptables-legacy", (), LEGACY),
        (None, "iptables", (), None),
        (None, "auto", (), None),
        # A report that means nothing.
        ("ipchains", "auto", (), None),
        ("ipchains", "nftables", (NFT,), NFT),
    ],
)
def test_the_backend_in_force_is_the_one_that_the_kernel_bears_out(
    reported: str | None, configured: str, holding: tuple[str, ...], expected: str | None
) -> None:
    assert backend.in_force(reported, configured, holding) == expected
