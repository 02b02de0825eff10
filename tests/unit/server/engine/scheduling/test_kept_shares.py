"""One tenant cannot push out what the others keep: resident prefixes and reused prompts, whatever it floods with."""

from __future__ import annotations

import random
from functools import partial

import pytest

from server.engine.memory.shares import ACTIVE_S, Kept, Shares
from server.engine.prefixes.entry import Entry
from server.engine.types import PrefixKey
from tests.support.scheduling import Machine, Make


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, early_end=0.0)


def tasks(owner: str, count: int) -> list[PrefixKey]:
    return [PrefixKey(owner, f"v{index}") for index in range(count)]


def add(machine: Machine, name: str, key: PrefixKey | None, caller: str, tokens: int = 3, prompt: int = 2) -> None:
    machine.add(machine.request(name, range(prompt), key, caller=caller, max_new_tokens=tokens))


def resident(machine: Machine, *keys: PrefixKey) -> None:
    """Let all of ``keys`` be used once by their owners."""
    for key in keys:
        add(machine, f"{key.tenant} {key.version} {machine.steps}", key, key.tenant, tokens=1)
        machine.run()


# --- prefixes ---


@pytest.mark.parametrize("cache", [6, 20], ids=["fewer than rows", "more than rows"])
def test_a_flood_of_a_thousand_tasks_leaves_another_tenants_three_resident(make: Make, cache: int) -> None:
    """Each of the flood's took the place of the least recently used, whosever that was, and theirs loaded anew."""
    flood, quiet = tasks("flood", 1_000), tasks("quiet", 3)
    machine = make(
        200, lengths=dict.fromkeys([*flood, *quiet], 4), max_prefix_bytes=cache, max_rows=8, preempted_prefix_bytes=50
    )
    for index, key in enumerate(flood):
        add(machine, f"flood{index}", key, "flood")
    sent = 0
    while sum(name.startswith("flood") for name in machine.ended) < 1_000:
        machine.wait()
        machine.step()
        if machine.steps % 7 == 0 and machine.scheduler.waiting.count("quiet") == 0:
            add(machine, f"quiet{sent}", quiet[sent % 3], "quiet")
            sent += 1
    machine.run(limit=20_000)
    assert sent > 40
    assert {key: machine.loads.count(key) for key in quiet} == dict.fromkeys(quiet, 1)
    assert set(quiet) <= machine.store.residents()


def test_a_prefix_waits_for_its_owners_own_rows_rather_than_push_out_who_keeps_less(make: Make) -> None:
    flood, quiet = tasks("flood", 5), tasks("quiet", 2)
    machine = make(100, lengths=dict.fromkeys([*flood, *quiet], 4), max_prefix_bytes=4)
    resident(machine, *quiet)
    for index in range(3):
        add(machine, f"flood{index}", flood[index], "flood", tokens=20)
        machine.wait_for(flood[index])
    machine.step()
    assert len(machine.scheduler.running) == 2
    assert set(quiet) <= machine.store.residents()
    machine.run()
    assert machine.ended["flood2"] == "finished"
    assert machine.loads.count(quiet[0]) == 1


def test_what_a_tenant_needs_alone_it_gets_although_that_is_more_than_its_share(make: Make) -> None:
    """What must be evicted can be: nothing of it is in use that it could wait for."""
    large, quiet = PrefixKey("large", "v"), tasks("quiet", 3)
    machine = make(100, lengths={large: 16, **dict.fromkeys(quiet, 4)}, max_prefix_bytes=5)
    resident(machine, *quiet)
    add(machine, "needs", large, "large")
    add(machine, "runs", quiet[2], "quiet", tokens=30)
    machine.wait_for(large)
    machine.step()
    assert machine.store.residents() == {large, quiet[2]}
    machine.run()
    assert machine.ended["needs"] == "finished"


def test_a_tenant_alone_has_all_of_the_cache_least_recently_used_out_first(make: Make) -> None:
    keys = tasks("t", 5)
    machine = make(100, lengths=dict.fromkeys(keys, 4), max_prefix_bytes=4)
    resident(machine, *keys[:4])
    add(machine, "again", keys[0], "t")
    machine.run()
    resident(machine, keys[4])
    assert machine.store.residents() == {keys[0], *keys[2:]}


def test_what_inactive_tenants_keep_is_there_for_those_who_ask(make: Make) -> None:
    """A hundred tenants that came once would leave one that works all day a hundredth of the cache."""
    now = [0.0]
    gone, busy = [PrefixKey(f"t{index}", "v") for index in range(6)], tasks("busy", 6)
    machine = make(
        100, lengths=dict.fromkeys([*gone, *busy], 4), max_prefix_bytes=6, shares=Shares(clock=lambda: now[0])
    )
    resident(machine, *gone)
    resident(machine, *busy[:3])
    assert len(machine.store.residents() & set(gone)) == 5, "while they are active"
    now[0] = ACTIVE_S + 1
    resident(machine, *busy)
    assert machine.store.residents() == set(busy)


# --- prompts ---


def test_a_flood_of_prompts_leaves_another_tenants_remembered(make: Make) -> None:
    machine = make(40, max_rows=4)
    computed = []
    for index in range(60):
        for part in range(4):
            prompt = [1000 + 4 * index + part] * 13
            machine.add(machine.request(f"f{index} {part}", prompt, caller="flood", max_new_tokens=1))
        machine.run()
        if index % 10 == 0:
            before = machine.computed_tokens
            machine.add(machine.request(f"q{index}", range(13), caller="quiet", max_new_tokens=1))
            machine.run()
            computed.append(machine.computed_tokens - before)
    assert computed == [13, 1, 1, 1, 1, 1]


def test_a_floods_prefixes_yield_before_another_tenants_prompt(make: Make) -> None:
    """All idle prompts went before the first idle prefix, whosever they were."""
    flood = tasks("flood", 12)
    machine = make(10, lengths=dict.fromkeys(flood, 4))
    machine.add(machine.request("q", range(9), caller="quiet", max_new_tokens=1))
    machine.run()
    resident(machine, *flood)
    before = machine.computed_tokens
    machine.add(machine.request("again", range(9), caller="quiet", max_new_tokens=1))
    machine.run()
    assert machine.computed_tokens - before == 1


# --- random mixes ---


class Judge(Shares):
    """Checks each time that something yields that nobody else should have, by the holders and not by the counts."""

    machine: Machine
    moving: tuple[str, bool] | None = None  # owner of the prefix that moves in, and whether others of it are in use

    def kept(self, tenant: str) -> float:
        prefixes = [entry for key, entry in self.machine.store._shared.entries.items() if key.tenant == tenant]
        prompts = len(self.machine.ledger._idle.get(tenant, ()))
        return (sum(entry.block_count for entry in prefixes) + prompts) / self._weight_of(tenant)

    def gone(self, kind: Kept, tenant: str, idle: int) -> None:
        store, ledger = self.machine.store, self.machine.ledger
        mine = self.kept(tenant) + (idle / self._weight_of(tenant))  # it has just been taken off
        others = {key.tenant for key in store._idle.entries}
        if kind is Kept.PROMPTS:
            others |= ledger._idle.keys()
        for other in others - {tenant}:
            assert self.kept(other) <= mine + 1e-9, f"{tenant} yields, although {other} keeps more"
        if self.moving and self.moving[1] and self.moving[0] != tenant:
            assert self.kept(self.moving[0]) <= mine + 1e-9, "pushed out by who keeps more"
        self.yielded += 1
        super().gone(kind, tenant, idle)

    yielded = 0


@pytest.mark.parametrize("seed", range(12))
def test_in_random_mixes_nothing_yields_while_another_tenant_keeps_more(
    make: Make, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    weights = {"a": rng.choice([1.0, 3.0]), "b": 0.5}
    keys = [PrefixKey(rng.choice("aabc"), f"v{index}") for index in range(14)]
    judge = Judge(lambda tenant: weights.get(tenant, 1.0))
    machine = make(
        rng.choice([24, 30]), seed=seed, lengths={key: rng.choice([1, 4, 9]) for key in keys}, shares=judge,
        max_prefix_bytes=rng.choice([None, 8]), max_rows=rng.choice([3, 8]), units=rng.choice([0, 0, 3]),
    )  # fmt: skip
    judge.machine = machine
    move = machine.store._make_resident

    def moving(key: PrefixKey, entry: Entry) -> None:
        judge.moving = None if entry.pinned else (key.tenant, judge.in_use(Kept.PREFIXES, key.tenant) > 0)
        move(key, entry)
        judge.moving = None

    monkeypatch.setattr(machine.store, "_make_resident", moving)
    machine.pin(keys[0])
    count = 0
    for _ in range(250):
        if rng.random() < 0.5 and len(machine.scheduler.waiting) < 10:
            key = rng.choice([None, *keys])
            prompt = [rng.randrange(2) for _ in range(rng.choice([1, 5, 9]))]
            request = machine.request(
                f"r{count}", prompt, key, caller=rng.choice("aabcd"), max_new_tokens=rng.choice([1, 9])
            )
            needed, room = machine.fits_alone(request)
            if needed <= room:
                machine.add(request)
                count += 1
        if machine.scheduler.running and rng.random() < 0.05:
            machine.scheduler.preempt(rng.choice(machine.scheduler.running))
        if machine.scheduler.waiting or machine.scheduler.running:
            machine.wait()
            machine.step()
    machine.run()
    assert len(machine.ended) == count
    assert judge.yielded > 20
