"""Addresses as text: canonical or refused, and packed as the standard library packs them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model import address
from mesh.model.address import FAMILIES, Family

_TEXTS = st.one_of(
    st.ip_addresses().map(str),
    st.ip_addresses(v=6).map(lambda one: one.exploded),
    st.text("0123456789abcdefABCDEF:.%/ ", max_size=20),
    st.sampled_from(["::ffff:192.0.2.1", "::192.0.2.1", "192.0.2.01", "1.2.3", "fe80::1%eth0", ""]),
)


@given(_TEXTS)
def test_an_address_is_read_as_the_standard_library_reads_it(text: str) -> None:
    try:
        wanted = ipaddress.ip_address(text)
    except ValueError:
        with pytest.raises(ValueError, match="is not an IP address"):
            address.parse_address(text)
        return
    if isinstance(wanted, ipaddress.IPv6Address) and wanted.scope_id is not None:
        with pytest.raises(ValueError, match="scope"):
            address.parse_address(text)
        return
    assert address.parse_address(text) == str(wanted)
    assert address.packed(str(wanted)) == wanted.packed


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 128))
def test_a_prefix_contains_what_the_standard_library_says(
    one: ipaddress.IPv4Address | ipaddress.IPv6Address,
    other: ipaddress.IPv4Address | ipaddress.IPv6Address,
    length: int,
) -> None:
    prefix = ipaddress.ip_network(f"{one}/{min(length, one.max_prefixlen)}", strict=False)

    assert address.contains(str(prefix), str(one))
    assert address.contains(str(prefix), str(other)) == (other in prefix)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_a_prefix_is_cut_into_parts_that_make_it_up(family: Family, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, family.bits))
    start = data.draw(st.integers(0, 2**length - 1)) << (family.bits - length)
    prefix = f"{ipaddress.ip_address(start.to_bytes(family.bits // 8, 'big'))}/{length}"

    parts = address.cut(prefix, range(0, family.bits + 1, 4))

    assert address.collapse(parts, family) == (prefix,)
    assert all(address.prefix_length(part) % 4 == 0 for part in parts)
    assert len(parts) <= 8
