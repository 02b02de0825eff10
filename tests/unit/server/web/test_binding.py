"""Where a service listens: at an address, or at this machine's own in a network and on the loopback."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Any

import pytest

from server.settings import Settings
from server.web.binding import CannotListen, addresses_of, bind_admin
from server.web.settings_sources import InvalidSettings, load_settings
from tests.support.server import free_port
from trainer.service.settings import TrainerSettings


def has_ipv6() -> bool:
    """Whether this machine has the other loopback."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        return sock.connect_ex((address, port)) == 0


@pytest.mark.parametrize(
    ("host", "open_at"),
    [
        ("127.0.0.0/8", {"127.0.0.1"}),
        pytest.param("::1/128", {"127.0.0.1", "::1"}, marks=needs_ipv6),
        ("127.0.0.2", {"127.0.0.2"}),
        ("0.0.0.0", {"127.0.0.1", "127.0.0.2"}),
    ],
)
def test_a_network_is_listened_on_at_the_own_address_in_it_and_on_the_loopback(host: str, open_at: set[str]) -> None:
    with ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in bind_admin(host, 0)]
        for sock in sockets:
            sock.listen()
        (port,) = {sock.getsockname()[1] for sock in sockets}
        assert {address for address in ("127.0.0.1", "127.0.0.2", "::1") if answers(address, port)} == open_at


def test_an_address_or_a_name_is_itself() -> None:
    for host in ("127.0.0.1", "0.0.0.0", "::", "localhost", "prefixd.internal"):
        assert addresses_of(host) == (host,)


@pytest.mark.parametrize(("network", "got"), [("127.0.0.2/32", "127.0.0.1"), ("240.0.0.0/24", "")])
def test_a_network_in_which_this_machine_has_no_address_is_refused(network: str, got: str) -> None:
    with pytest.raises(CannotListen) as refused:
        bind_admin(network, 0)
    where, _, why = refused.value.message.partition(": ")
    assert where == f"cannot listen in {network} (--admin-host)"
    assert why.startswith(f"expected this machine to have an address in that network, got {got}")


@needs_ipv6
def test_a_port_that_is_taken_at_one_of_the_addresses_leaves_nothing_bound_at_the_other() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(CannotListen, match=r"127\.0\.0\.1 port \d+ \(--admin-port\)"):
            bind_admin("::1/128", port)
        with socket.create_server(("::1", port), family=socket.AF_INET6):
            pass


@pytest.mark.parametrize("kind", [Settings, TrainerSettings])
@pytest.mark.parametrize("text", ["10.117.44.7/24", "10.117.44.0/99", "monitoring/24", "/"])
def test_what_is_no_network_is_refused_with_the_settings(kind: Any, text: str) -> None:
    with pytest.raises(InvalidSettings, match=r"--admin-host: expected an address, or a network such as .*, got '"):
        load_settings(kind, {"admin_host": text})
