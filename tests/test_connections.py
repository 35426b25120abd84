"""What counts as a connection to another machine, for the watch over the servers of tests/host."""

import pytest

from pixart_pack.tests.host.audit_hook import leaves_the_machine


@pytest.mark.parametrize(
    "address", [("127.0.0.1", 80), ("::1", 80, 0, 0), "/run/x.sock", "localhost", None, "", "127.0.0.1"]
)
def test_its_own_machine(address):
    assert not leaves_the_machine(address)


@pytest.mark.parametrize(
    "address", [("192.0.2.1", 443), ("2001:db8::1", 443, 0, 0), "example.org", b"example.org", "10.0.0.1"]
)
def test_another_machine(address):
    assert leaves_the_machine(address)
