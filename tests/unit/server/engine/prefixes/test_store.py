"""Resident prefixes: bound by bytes, least recently used first out, never under a user or a pin; failures contained."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping

import pytest

from prefixes.artifact import Prefix
from prefixes.errors import InvalidArtifact, PrefixdError
from prefixes.spec import PrefixSpec, Site
from server.engine.memory.blocks import BlockLedger
from server.engine.observer import SilentObserver
from server.engine.prefixes.entry import LoadStatus
from server.engine.prefixes.placement import Placement
from server.engine.prefixes.store import PrefixStore
from server.engine.types import PrefixKey
from tests.support.prefixes import make_prefix

SIZE, BYTES = 4, 100


def key(name: str, tenant: str = "default") -> PrefixKey:
    return PrefixKey(tenant, name)


class Shelf(SilentObserver):
    """A store over a real ledger; loads wait at a gate while it is shut, and fail where they are told to."""

    def __init__(
        self, blocks: int = 10, max_bytes: int | None = None, workers: int = 2, staged: int = 1 << 30,
        claimed: int | None = None,
    ) -> None:
        self.ledger = BlockLedger(blocks + 1, SIZE)
        self.lengths: dict[PrefixKey, int] = {}
        self.failures: dict[PrefixKey, Exception] = {}
        self.write_failures: set[int] = set()  # lengths of prefixes that cannot be written
        self.loaded: list[PrefixKey] = []
        self.written: list[tuple[int, tuple[int, ...]]] = []
        self.read: list[tuple[int, ...]] = []
        self.read_failure: Exception | None = None
        self.evicted: list[int] = []
        self.reported: list[bool] = []
        self.gate = threading.Event()
        self.gate.set()
        self._woken: queue.Queue[None] = queue.Queue()
        self.store = PrefixStore(
            self.ledger, self._load, Placement(self.ledger, self._write, self._read), bytes_per_block=BYTES,
            max_bytes=max_bytes, max_claimed_bytes=claimed, workers=workers, max_staged_bytes=staged, observer=self,
            wake=lambda: self._woken.put(None),
        )

    def _load(self, wanted: PrefixKey) -> Prefix:
        assert self.gate.wait(30)
        self.loaded.append(wanted)
        if wanted in self.failures:
            raise self.failures[wanted]
        return make_prefix(length=self.lengths.get(wanted, SIZE))

    def _write(self, prefix: Prefix, blocks: Mapping[Site, tuple[int, ...]]) -> None:
        length = prefix.spec.length("decoder")
        if length in self.write_failures:
            raise RuntimeError("a secret that no user may see")
        self.written.append((length, blocks["decoder"]))

    def _read(self, spec: PrefixSpec, blocks: Mapping[Site, tuple[int, ...]]) -> Prefix:
        self.read.append(blocks["decoder"])
        if self.read_failure:
            raise self.read_failure
        return make_prefix(length=spec.length("decoder"))

    def want(self, wanted: PrefixKey) -> None:
        self.store.want(wanted, make_prefix(length=self.lengths.get(wanted, SIZE)).spec)

    def pin(self, wanted: PrefixKey) -> None:
        self.store.pin(wanted, make_prefix(length=self.lengths.get(wanted, SIZE)).spec)

    def on_prefix_evicted(self, nbytes: int) -> None:
        self.evicted.append(nbytes)

    def on_prefix_load(self, seconds: float, nbytes: int, ok: bool) -> None:
        self.reported.append(ok)

    def settled(self, wanted: PrefixKey) -> LoadStatus:
        """The status once loading has ended."""
        while (status := self.store.status(wanted)) is LoadStatus.LOADING:
            self._woken.get(timeout=30)
            self.store.settle()
        return status

    def acquire(self, wanted: PrefixKey, extra: int = 0) -> Mapping[Site, tuple[int, ...]] | None:
        """Want, wait, acquire, as the scheduler does; the key stays wanted where there is no room."""
        self.want(wanted)
        assert self.settled(wanted) is LoadStatus.READY
        blocks = self.store.try_acquire(wanted, extra)
        if blocks is not None:
            self.store.unwant(wanted)
        return blocks

    def check(self, *rows: list[int]) -> None:
        self.ledger.check([*self.store.holdings(), *rows])


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    yield made
    made.gate.set()
    made.store.close()


def test_a_wanted_prefix_loads_once_and_is_shared_by_all_its_users(shelf: Shelf) -> None:
    first, second = shelf.acquire(key("a")), shelf.acquire(key("a"))
    assert first == second
    assert shelf.loaded == [key("a")]
    assert shelf.written == [(SIZE, first["decoder"])] if first else False
    assert shelf.store.residents() == {key("a")}
    assert shelf.store.resident_bytes == BYTES
    shelf.check()


def test_the_same_version_of_two_tenants_is_two_prefixes(shelf: Shelf) -> None:
    one, another = shelf.acquire(key("a", "one")), shelf.acquire(key("a", "another"))
    assert one is not None
    assert another is not None
    assert one["decoder"] != another["decoder"]
    assert len(shelf.loaded) == 2


def test_a_released_prefix_stays_resident_until_room_is_needed(shelf: Shelf) -> None:
    shelf.acquire(key("a"))
    shelf.store.release(key("a"))
    assert shelf.store.residents() == {key("a")}
    assert shelf.ledger.available == 10
    shelf.ledger.allocate(10)
    assert shelf.store.residents() == frozenset()
    assert shelf.store.resident_bytes == 0
    assert shelf.evicted == [BYTES]


def test_the_least_recently_used_yields_first(shelf: Shelf) -> None:
    for name in "abc":
        shelf.acquire(key(name))
    for name in "bac":
        shelf.store.release(key(name))
    shelf.acquire(key("b"))
    shelf.store.release(key("b"))
    held = shelf.ledger.allocate(8)
    assert shelf.store.residents() == {key("c"), key("b")}
    held += shelf.ledger.allocate(1)
    assert shelf.store.residents() == {key("b")}
    shelf.check(held)


def test_a_used_prefix_never_yields(shelf: Shelf) -> None:
    shelf.acquire(key("a"))
    shelf.acquire(key("a"))
    shelf.store.release(key("a"))
    assert shelf.ledger.available == 9
    shelf.ledger.allocate(9)
    assert shelf.store.residents() == {key("a")}


def test_a_prefix_and_its_first_blocks_fit_together_or_not_at_all(shelf: Shelf) -> None:
    shelf.lengths[key("a")] = 4 * SIZE
    assert shelf.acquire(key("a"), extra=7) is None
    assert shelf.store.residents() == frozenset()
    assert shelf.ledger.available == 10
    assert shelf.store.try_acquire(key("a"), 6) is not None
    assert shelf.ledger.available == 6
    assert shelf.store.try_acquire(key("a"), 7) is None  # resident now, and still no room for so many more
    shelf.store.unwant(key("a"))
    shelf.store.release(key("a"))
    assert shelf.store.idle()
    shelf.check()


def test_resident_prefixes_stay_within_their_bytes() -> None:
    shelf = Shelf(blocks=20, max_bytes=3 * BYTES + 50)
    for name in "abc":
        assert shelf.acquire(key(name)) is not None
    assert shelf.acquire(key("d")) is None, "all three are in use"
    shelf.store.release(key("b"))
    assert shelf.store.try_acquire(key("d"), 0) is not None
    assert shelf.store.residents() == {key("a"), key("c"), key("d")}
    assert shelf.store.resident_bytes == 3 * BYTES
    shelf.check()
    shelf.store.close()


def test_an_evicted_prefix_is_loaded_again_for_those_who_wait(shelf: Shelf) -> None:
    shelf.acquire(key("a"))
    shelf.want(key("a"))
    shelf.store.release(key("a"))
    held = shelf.ledger.allocate(10)
    assert shelf.store.residents() == frozenset()
    assert shelf.settled(key("a")) is LoadStatus.READY
    assert shelf.loaded == [key("a"), key("a")]
    assert shelf.store.try_acquire(key("a"), 0) is None
    shelf.ledger.release(held)
    assert shelf.store.try_acquire(key("a"), 0) is not None
    shelf.check()


def test_loading_blocks_neither_the_caller_nor_what_is_here(shelf: Shelf) -> None:
    shelf.acquire(key("here"))
    shelf.gate.clear()
    shelf.want(key("slow"))
    assert shelf.store.status(key("slow")) is LoadStatus.LOADING
    assert shelf.acquire(key("here")) is not None
    shelf.gate.set()
    assert shelf.settled(key("slow")) is LoadStatus.READY


def test_a_failed_load_is_told_to_those_who_waited_and_the_next_one_tries_again(shelf: Shelf) -> None:
    shelf.failures[key("a")] = InvalidArtifact("digest: expected x, got y")
    shelf.want(key("a"))
    shelf.want(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.FAILED
    assert shelf.store.error(key("a")).code == "invalid_artifact"
    assert shelf.reported == [False]
    shelf.store.unwant(key("a"))
    assert shelf.store.status(key("a")) is LoadStatus.FAILED
    shelf.store.unwant(key("a"))
    shelf.failures.clear()
    assert shelf.acquire(key("a")) is not None
    assert shelf.reported == [False, True]


def test_a_newcomer_does_not_keep_those_who_waited_from_hearing_of_the_failure(shelf: Shelf) -> None:
    """A want after a failure restarted the load and set the failure aside: under steady arrivals nobody ever failed."""
    shelf.failures[key("a")] = InvalidArtifact("broken")
    shelf.want(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.FAILED
    shelf.want(key("a"))
    assert shelf.store.status(key("a")) is LoadStatus.FAILED


def test_an_unexpected_error_is_named_by_kind_and_not_by_text(shelf: Shelf) -> None:
    shelf.failures[key("a")] = KeyError("a secret that no user may see")
    shelf.want(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.FAILED
    error: PrefixdError = shelf.store.error(key("a"))
    assert error.code == "engine_failure"
    assert "KeyError" in error.message
    assert "secret" not in error.message


def test_a_prefix_that_cannot_be_written_fails_those_who_wait_and_takes_nothing(shelf: Shelf) -> None:
    """The error used to leave the scheduler and stop the engine's thread, and the prefix stayed in use for ever."""
    shelf.write_failures.add(SIZE)
    shelf.want(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.READY
    assert shelf.store.try_acquire(key("a"), 0) is None
    assert shelf.store.status(key("a")) is LoadStatus.FAILED
    assert "secret" not in shelf.store.error(key("a")).message
    shelf.store.unwant(key("a"))
    assert shelf.store.idle()
    assert shelf.ledger.available == 10
    shelf.check()
    shelf.write_failures.clear()
    assert shelf.acquire(key("a")) is not None


def test_a_load_that_nobody_waits_for_any_more_is_not_begun() -> None:
    shelf = Shelf(workers=1)
    shelf.gate.clear()
    shelf.want(key("running"))
    shelf.want(key("given up"))
    shelf.store.unwant(key("given up"))
    shelf.want(key("next"))
    shelf.gate.set()
    assert shelf.settled(key("next")) is LoadStatus.READY
    assert shelf.loaded == [key("running"), key("next")]
    shelf.store.close()


def test_giving_up_while_it_loads_leaves_nothing_behind(shelf: Shelf) -> None:
    shelf.gate.clear()
    shelf.want(key("a"))
    shelf.store.unwant(key("a"))
    assert shelf.store.idle()
    shelf.gate.set()
    assert shelf.acquire(key("a")) is not None
    shelf.check()


def test_a_pinned_prefix_becomes_resident_without_a_request_and_never_yields(shelf: Shelf) -> None:
    shelf.pin(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.READY
    shelf.store.settle()
    assert shelf.store.residents() == {key("a")}
    assert shelf.store.pinned_blocks == 1
    assert shelf.store.pinned_blocks_beside(key("a")) == 0
    assert shelf.ledger.available == 9
    shelf.ledger.allocate(9)
    assert shelf.store.residents() == {key("a")}
    shelf.store.unpin(key("a"))
    assert shelf.ledger.available == 1


def test_a_pin_may_evict_an_idle_prefix_when_it_settles(shelf: Shelf) -> None:
    """Evicting dropped the entry while all entries were walked: 'dictionary changed size', and the engine stopped."""
    shelf.lengths[key("pinned")] = 10 * SIZE
    shelf.acquire(key("idle"))
    shelf.store.release(key("idle"))
    shelf.pin(key("pinned"))
    assert shelf.settled(key("pinned")) is LoadStatus.READY
    shelf.store.settle()
    assert shelf.store.residents() == {key("pinned")}
    shelf.check()


def test_a_pin_waits_while_rows_take_the_room(shelf: Shelf) -> None:
    held = shelf.ledger.allocate(10)
    shelf.pin(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.READY
    shelf.store.settle()
    assert shelf.store.residents() == frozenset()
    shelf.ledger.release(held)
    shelf.store.settle()
    assert shelf.store.residents() == {key("a")}


def test_a_pin_that_fails_to_load_can_be_tried_again(shelf: Shelf) -> None:
    shelf.failures[key("a")] = InvalidArtifact("broken")
    shelf.pin(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.FAILED
    shelf.failures.clear()
    shelf.pin(key("a"))
    assert shelf.settled(key("a")) is LoadStatus.READY


def test_block_counts_are_per_site(shelf: Shelf) -> None:
    prefix = make_prefix(length=5, sites=("decoder", "encoder", "cross"))
    assert shelf.store.block_count(prefix.spec) == 6
    assert shelf.store.block_count(PrefixSpec("", {})) == 0


def test_snapshots_may_be_taken_while_the_engine_changes_the_entries() -> None:
    """Copying an OrderedDict's items calls the keys' Python hashes; a thread switch there raised RuntimeError."""
    shelf = Shelf(blocks=50)
    stop, errors = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            try:
                shelf.store.residents()
                assert shelf.store.pinned_blocks == 0
            except RuntimeError as error:
                errors.append(error)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    for round_ in range(20):
        for index in range(20):
            shelf.acquire(key(f"{round_}-{index}"))
            shelf.store.release(key(f"{round_}-{index}"))
    stop.set()
    watcher.join()
    shelf.store.close()
    assert errors == []
