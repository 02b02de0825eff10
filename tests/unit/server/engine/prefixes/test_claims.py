"""Claims: a prefix that admitted groups need may leave its blocks, but not this machine; copied only where it must."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from prefixes.errors import RegistryUnavailable
from server.engine.prefixes.entry import LoadStatus
from tests.support.prefixes import make_prefix
from tests.unit.server.engine.prefixes.test_store import BYTES, SIZE, Shelf, key

COPY = sum(tensor.nbytes for tensor in make_prefix(length=SIZE).tensors.values())


@contextmanager
def made(claimed: int | None = None) -> Iterator[Shelf]:
    shelf = Shelf(claimed=claimed)
    try:
        yield shelf
    finally:
        shelf.store.close()


def preempted(shelf: Shelf, name: str) -> None:
    """A group was admitted with the prefix, and waits again."""
    assert shelf.acquire(key(name)) is not None
    shelf.store.claim(key(name))
    shelf.store.release(key(name))
    shelf.want(key(name))


def test_a_claimed_prefix_comes_back_from_a_copy_without_being_loaded() -> None:
    with made() as shelf:
        preempted(shelf, "a")
        held = shelf.ledger.allocate(10)
        shelf.failures[key("a")] = RegistryUnavailable("away")
        assert shelf.store.residents() == frozenset(), "it waits without blocks"
        assert shelf.store.status(key("a")) is LoadStatus.READY
        assert shelf.store.copy_bytes == COPY
        shelf.ledger.release(held)
        assert shelf.store.try_acquire(key("a"), 0) is not None
        assert shelf.store.copy_bytes == 0
        assert shelf.loaded == [key("a")]
        shelf.store.unwant(key("a"))
        shelf.store.release(key("a"))
        shelf.store.unclaim(key("a"))
        assert shelf.store.idle()
        shelf.check()


def test_nothing_is_copied_that_nobody_claims_or_that_stays_in_its_blocks() -> None:
    with made() as shelf:
        preempted(shelf, "stays")
        shelf.store.try_acquire(key("stays"), 0)
        preempted(shelf, "ended")
        shelf.store.unwant(key("ended"))
        shelf.store.unclaim(key("ended"))
        shelf.acquire(key("unclaimed"))
        shelf.store.release(key("unclaimed"))
        shelf.ledger.allocate(9)
        assert shelf.store.residents() == {key("stays")}
        assert shelf.read == []


def test_a_copy_goes_with_the_last_claim_and_who_waits_still_loads_anew() -> None:
    with made() as shelf:
        preempted(shelf, "a")
        shelf.store.claim(key("a"))
        held = shelf.ledger.allocate(10)
        shelf.want(key("a"))  # a newcomer
        shelf.store.unwant(key("a"))
        shelf.store.unclaim(key("a"))
        assert shelf.store.copy_bytes == COPY
        shelf.store.unclaim(key("a"))
        assert shelf.store.copy_bytes == 0
        assert shelf.settled(key("a")) is LoadStatus.READY
        assert shelf.loaded == [key("a")] * 2
        shelf.ledger.release(held)
        shelf.store.unwant(key("a"))
        assert shelf.store.idle()
        assert shelf.store.staged_bytes == 0


def test_a_copy_without_waiters_is_gone_when_the_last_group_gives_up() -> None:
    with made() as shelf:
        preempted(shelf, "a")
        shelf.ledger.allocate(10)
        shelf.store.unwant(key("a"))
        shelf.store.unclaim(key("a"))
        assert shelf.store.idle()
        assert not shelf.store._entries
        assert shelf.loaded == [key("a")]


def test_claims_of_one_prefix_are_charged_once_and_those_of_others_wait() -> None:
    with made(claimed=2 * BYTES + 50) as shelf:
        for name in "aab":
            assert shelf.acquire(key(name)) is not None
            assert shelf.store.may_claim(key(name))
            shelf.store.claim(key(name))
        shelf.want(key("c"))
        assert not shelf.store.may_claim(key("c"))
        assert shelf.store.may_claim(key("a"))
        shelf.store.unclaim(key("a"))
        assert not shelf.store.may_claim(key("c"))
        shelf.store.unclaim(key("a"))
        assert shelf.store.may_claim(key("c"))


def test_a_pin_asked_for_a_copy_takes_it_into_blocks_without_a_load() -> None:
    with made() as shelf:
        preempted(shelf, "a")
        held = shelf.ledger.allocate(10)
        shelf.pin(key("a"))
        shelf.store.unwant(key("a"))
        shelf.ledger.release(held)
        shelf.store.settle()
        assert shelf.store.residents() == {key("a")}
        shelf.store.unclaim(key("a"))
        assert shelf.loaded == [key("a")]
        assert shelf.store.idle()


def test_a_pin_whose_copy_goes_with_the_last_claim_is_loaded() -> None:
    with made() as shelf:
        preempted(shelf, "a")
        held = shelf.ledger.allocate(10)
        shelf.pin(key("a"))
        shelf.store.unwant(key("a"))
        shelf.store.unclaim(key("a"))
        assert shelf.settled(key("a")) is LoadStatus.READY
        shelf.ledger.release(held)
        shelf.store.settle()
        assert shelf.store.residents() == {key("a")}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a secret")], ids=repr)
def test_a_prefix_that_cannot_be_copied_is_loaded_again(error: Exception) -> None:
    """The eviction must not fail: it makes room for somebody else."""
    with made() as shelf:
        shelf.read_failure = error
        preempted(shelf, "a")
        held = shelf.ledger.allocate(10)
        assert shelf.store.copy_bytes == 0
        assert shelf.settled(key("a")) is LoadStatus.READY
        assert shelf.loaded == [key("a")] * 2
        shelf.check(held)
