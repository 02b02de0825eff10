"""Loading: in the order of asking, few at a time, no more than fits in the bound of what lies between, never stuck."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from prefixes.artifact import Prefix
from prefixes.errors import InvalidArtifact, PrefixdError, RegistryUnavailable
from server.engine.observer import SilentObserver
from server.engine.prefixes import loader as prefix_loader
from server.engine.prefixes.entry import LoadStatus
from server.engine.prefixes.loader import PrefixLoader
from server.engine.types import PrefixKey
from tests.support.prefixes import make_prefix
from tests.support.scheduling import Machine
from tests.unit.server.engine.prefixes.test_store import SIZE, Shelf, key

PREFIX = make_prefix()
BYTES = sum(tensor.nbytes for tensor in PREFIX.tensors.values())


class Bench(SilentObserver):
    """A loader whose loads are noted when they begin and, where they are held, wait to be let go."""

    def __init__(self, *, workers: int = 1, staged: int = 1 << 30) -> None:
        self.begun: list[str] = []
        self.failing: set[str] = set()
        self.held: dict[str, threading.Event] = {}
        self._moved = threading.Condition()
        self.loader = PrefixLoader(
            self._load, workers=workers, max_staged_bytes=staged, observer=self, wake=self._wake
        )

    def _load(self, wanted: PrefixKey) -> Prefix:
        self.begun.append(wanted.version)
        self._wake()
        if gate := self.held.get(wanted.version):
            assert gate.wait(30)
        if wanted.version in self.failing:
            raise InvalidArtifact("broken")
        return PREFIX

    def _wake(self) -> None:
        with self._moved:
            self._moved.notify_all()

    def hold(self, *names: str) -> None:
        self.held |= {name: threading.Event() for name in names}

    def ask(self, *names: str, urgent: bool = True) -> None:
        for name in names:
            self.loader.ask(key(name), urgent=urgent)

    def drop(self, *names: str) -> None:
        for name in names:
            self.loader.drop(key(name))

    def done(self, name: str) -> Prefix | PrefixdError:
        """What its load brought, once it is there."""
        with self._moved:
            assert self._moved.wait_for(lambda: self.loader.outcome(key(name)) is not None, 30)
        outcome = self.loader.outcome(key(name))
        assert outcome is not None
        return outcome

    def settle(self) -> list[str]:
        """What has begun once nothing may begin any more and nothing that is not held is under way."""
        deadline = time.monotonic() + 30
        while not self._settled():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self.begun

    def _settled(self) -> bool:
        loader = self.loader
        with loader._lock:
            running = {wanted.version for wanted in loader._running}
            stuck = all(name in self.held and not self.held[name].is_set() for name in running)
            full = len(running) == loader._workers or not loader._startable()
            return stuck and full and running <= set(self.begun)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    finish(made)


def finish(bench: Bench) -> None:
    bench.loader.close()
    for gate in bench.held.values():
        gate.set()


def test_no_load_begins_while_what_was_loaded_waits_for_room_and_the_next_does_when_it_has_found_it() -> None:
    bench = Bench(staged=2 * BYTES)
    bench.ask(*"abcde")
    assert bench.settle() == ["a", "b"]
    assert bench.loader.staged_bytes == 2 * BYTES
    bench.drop("a")
    assert bench.settle() == ["a", "b", "c"]
    bench.drop("b", "c")
    assert bench.settle() == ["a", "b", "c", "d", "e"]
    bench.drop("d", "e")
    assert bench.loader.staged_bytes == 0
    finish(bench)


def test_one_prefix_is_loaded_however_small_the_bound() -> None:
    bench = Bench(staged=1, workers=4)
    bench.ask("a")
    bench.done("a")
    bench.ask("b")
    assert bench.settle() == ["a"]
    bench.drop("a")
    bench.done("b")
    finish(bench)


def test_loads_begin_in_the_order_of_asking(bench: Bench) -> None:
    bench.hold("a")
    bench.ask(*"afbdc")
    bench.ask("c")  # asking again changes no place
    bench.held["a"].set()
    bench.done("c")
    assert bench.begun == list("afbdc")


def test_one_owners_many_loads_make_anothers_wait_for_one_of_them_each(bench: Bench) -> None:
    """All of the many were loaded before another tenant's one."""
    bench.hold("f0")
    for index in range(30):
        bench.loader.ask(PrefixKey("flood", f"f{index}"), urgent=True)
    bench.settle()
    for name in ("q0", "q1"):
        bench.loader.ask(PrefixKey("quiet", name), urgent=True)
    bench.loader.ask(PrefixKey("third", "t0"), urgent=True)
    bench.held["f0"].set()
    begun = bench.settle()
    assert begun[:8] == ["f0", "f1", "q0", "t0", "f2", "q1", "f3", "f4"]
    assert len(begun) == 33


def test_an_owner_whose_load_is_dropped_keeps_its_turn_and_its_order(bench: Bench) -> None:
    bench.hold("a0")
    keys = [PrefixKey(tenant, f"{tenant}{index}") for tenant in "ab" for index in range(3)]
    for one in keys:
        bench.loader.ask(one, urgent=one.version != "a1")  # a pin first, then a row's
        bench.settle()
    bench.loader.drop(PrefixKey("b", "b0"))
    bench.loader.ask(PrefixKey("a", "a1"), urgent=True)
    bench.held["a0"].set()
    assert bench.settle() == ["a0", "a1", "b1", "a2", "b2"]


def test_a_failed_load_takes_no_room_and_can_be_asked_for_again() -> None:
    bench = Bench(staged=1)
    bench.failing = {"bad"}
    bench.ask("bad", "good")
    bench.done("good")
    outcome = bench.done("bad")
    assert isinstance(outcome, InvalidArtifact)
    assert bench.loader.staged_bytes == BYTES
    bench.failing.clear()
    bench.drop("bad", "good")
    bench.ask("bad")
    assert bench.done("bad") is PREFIX
    finish(bench)


def test_what_nobody_wants_any_more_is_not_begun_and_takes_no_room(bench: Bench) -> None:
    bench.hold("running")
    bench.ask("running", "given up", "next")
    assert bench.settle() == ["running"]
    bench.drop("given up", "running")
    bench.held["running"].set()
    bench.done("next")
    assert bench.begun == ["running", "next"]
    assert bench.loader.staged_bytes == BYTES, "what came for nobody is not kept"


def test_a_load_under_way_is_taken_over_by_whoever_asks_again(bench: Bench) -> None:
    bench.hold("a")
    bench.ask("a")
    bench.settle()
    bench.drop("a")
    bench.ask("a")
    bench.held["a"].set()
    assert bench.done("a") is PREFIX
    assert bench.begun == ["a"]


def test_pins_without_room_do_not_keep_rows_from_loading_and_a_row_takes_its_pin_along() -> None:
    bench = Bench(staged=BYTES)
    bench.ask("pin", "another pin", urgent=False)
    assert bench.settle() == ["pin"], "pins have their own bound"
    bench.ask("row")
    assert bench.settle() == ["pin", "row"]
    bench.drop("row")
    bench.ask("another pin")  # a row wants it now
    assert bench.settle() == ["pin", "row", "another pin"]
    bench.ask("last", urgent=False)
    bench.ask("another pin", urgent=False)
    bench.drop("pin", "another pin")
    assert bench.settle()[-1] == "last"
    finish(bench)


def test_a_hung_load_holds_up_neither_the_caller_nor_the_other_threads() -> None:
    bench = Bench(workers=2)
    bench.hold("hung")
    bench.ask("hung", *"abc")
    for name in "abc":
        bench.done(name)
    assert bench.loader.outcome(key("hung")) is None
    finish(bench)


def test_as_many_load_at_once_as_there_are_threads_for() -> None:
    bench = Bench(workers=3)
    bench.hold(*"abcd")
    bench.ask(*"abcd")
    assert sorted(bench.settle()) == list("abc")
    bench.held["b"].set()
    bench.done("b")
    assert sorted(bench.settle()) == list("abcd")
    finish(bench)


def test_idle_threads_end_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stayed would keep the engine, its weights and its memory, alive."""
    monkeypatch.setattr(prefix_loader, "LINGER_S", 0.01)
    bench = Bench(workers=2)
    for name in ("a", "b"):
        bench.ask(name)
        bench.done(name)
        deadline = time.monotonic() + 30
        while bench.loader._threads:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_the_process_ends_although_a_load_hangs() -> None:
    """The threads of an executor are joined at exit: a registry that hung held the exit up for as long."""
    code = (
        "import threading\n"
        "from server.engine.observer import SilentObserver\n"
        "from server.engine.prefixes.loader import PrefixLoader\n"
        "from server.engine.types import PrefixKey\n"
        "begun = threading.Event()\n"
        "def load(key):\n"
        "    begun.set()\n"
        "    threading.Event().wait()\n"
        "loader = PrefixLoader(load, workers=1, max_staged_bytes=1, observer=SilentObserver(), wake=print)\n"
        "loader.ask(PrefixKey('default', 'x'), urgent=True)\n"
        "assert begun.wait(30)\n"
        "loader.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- behind the store ---


def test_the_store_frees_the_room_of_what_got_its_blocks_failed_to_be_written_or_is_wanted_no_more() -> None:
    shelf = Shelf(workers=1, staged=1)
    shelf.lengths[key("bad")] = 2 * SIZE
    shelf.write_failures.add(2 * SIZE)
    for name in ("placed", "bad", "given up", "last"):
        shelf.want(key(name))
    assert shelf.settled(key("placed")) is LoadStatus.READY
    assert shelf.store.staged_bytes > 0
    assert shelf.store.try_acquire(key("placed"), 0) is not None
    assert shelf.settled(key("bad")) is LoadStatus.READY
    assert shelf.loaded == [key("placed"), key("bad")]
    assert shelf.store.try_acquire(key("bad"), 0) is None
    assert shelf.settled(key("given up")) is LoadStatus.READY
    assert shelf.loaded == [key("placed"), key("bad"), key("given up")]
    shelf.store.unwant(key("given up"))
    assert shelf.settled(key("last")) is LoadStatus.READY
    for name in ("placed", "bad", "last"):
        shelf.store.unwant(key(name))
    assert shelf.store.staged_bytes == 0
    shelf.store.close()


def test_a_pin_that_finds_no_room_does_not_keep_a_row_from_its_prefix() -> None:
    shelf = Shelf(blocks=2, workers=1, staged=1)
    held = shelf.ledger.allocate(1)
    shelf.lengths[key("large")] = 2 * SIZE
    shelf.pin(key("large"))
    shelf.pin(key("behind"))
    assert shelf.settled(key("large")) is LoadStatus.READY
    shelf.store.settle()
    assert shelf.acquire(key("small")) is not None
    assert shelf.acquire(key("behind")) is None, "loaded for its row; the room is taken"
    assert shelf.store.status(key("behind")) is LoadStatus.READY
    shelf.store.unwant(key("behind"))
    shelf.store.unpin(key("large"))
    shelf.store.release(key("small"))
    shelf.store.settle()
    assert key("behind") in shelf.store.residents()
    shelf.check(held)
    shelf.store.close()


@pytest.mark.parametrize("seed", range(12))
def test_everybody_ends_with_the_smallest_bound(seed: int) -> None:
    """Random arrivals, aborts, failures, preemptions, pins: one staged prefix at a time is enough for all to end."""
    rng = random.Random(seed)
    keys = [PrefixKey("default", f"p{n}") for n in range(8)]
    machine = Machine(
        14, seed=seed, lengths={k: rng.choice([1, 4, 7, 12]) for k in keys}, max_staged_bytes=1,
        max_prefix_bytes=rng.choice([None, 4, 6]), max_rows=rng.choice([2, 4, 16]),
    )  # fmt: skip
    machine.failures = {keys[0]: RegistryUnavailable("away")}
    groups = []
    for number in range(60):
        wanted = rng.choice([None, *keys])
        request = machine.request(f"r{number}", [number] * rng.randint(1, 9), wanted, max_new_tokens=rng.randint(1, 6))
        needed, room = machine.fits_alone(request)
        if needed <= room:
            groups.append(machine.add(request, at=rng.choice([float(number), 0.0])))
        if rng.random() < 0.2:
            machine.pin(rng.choice(keys[1:3]))
        if rng.random() < 0.2:
            machine.store.unpin(rng.choice(keys[1:3]))
        if rng.random() < 0.15 and machine.scheduler.running:
            machine.scheduler.preempt(rng.choice(machine.scheduler.running))
        if rng.random() < 0.15 and machine.scheduler.waiting:
            machine.abort(rng.choice(list(machine.scheduler.waiting)))
        if rng.random() < 0.5 and machine.scheduler.runnable():
            machine.step()
    machine.run()
    assert machine.ended.keys() == {group.request.request_id for group in groups}
    for pinned in keys[1:3]:
        machine.store.unpin(pinned)
    assert machine.store.staged_bytes == 0
    assert machine.store.idle()
    machine.store.close()
