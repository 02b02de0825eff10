"""The ledger: blocks are never lost, never handed out twice, and idle content yields in the promised order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.memory.blocks import BlockLedger, OutOfBlocks
from server.engine.memory.shares import Kept


class Prefixes:
    """A holder of idle prefixes, each a tenant's list of blocks, that gives a tenant's oldest back first."""

    def __init__(self, ledger: BlockLedger) -> None:
        self.ledger = ledger
        self.owned: list[tuple[str, list[int]]] = []
        ledger.set_reclaimer(self)

    @property
    def resident(self) -> list[list[int]]:
        return [blocks for _, blocks in self.owned]

    def put(self, blocks: list[int], tenant: str = "t") -> None:
        self.owned.append((tenant, blocks))
        self.ledger.shares.used(Kept.PREFIXES, tenant, len(blocks), len(blocks))

    def reclaimable(self) -> int:
        return sum(map(len, self.resident))

    def reclaim(self, tenant: str) -> None:
        oldest = next(owned for owned in self.owned if owned[0] == tenant)
        self.owned.remove(oldest)
        self.ledger.shares.gone(Kept.PREFIXES, tenant, len(oldest[1]))
        self.ledger.release(oldest[1])


def test_block_zero_is_never_handed_out() -> None:
    ledger = BlockLedger(5, 16)
    assert sorted(ledger.allocate(4)) == [1, 2, 3, 4]


def test_a_pool_without_a_usable_block_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        BlockLedger(1, 16)


def test_asking_for_more_than_there_is_takes_nothing() -> None:
    ledger = BlockLedger(5, 16)
    held = ledger.allocate(2)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, 2 available"):
        ledger.allocate(3)
    assert ledger.available == 2
    ledger.check([held])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10)])
def test_a_started_block_counts_whole(tokens: int, blocks: int) -> None:
    assert BlockLedger(5, 16).blocks_for(tokens) == blocks


def test_a_shared_block_returns_with_its_last_holder() -> None:
    ledger = BlockLedger(3, 16)
    [block] = ledger.allocate(1)
    assert not ledger.shared(block)
    ledger.share([block])
    assert ledger.shared(block)
    ledger.release([block])
    assert ledger.available == 1
    ledger.release([block])
    assert ledger.available == 2


def test_kept_content_counts_as_available_and_yields_deepest_first_and_least_recently_used_first() -> None:
    ledger = BlockLedger(8, 16)
    forgotten: list[int] = []
    ledger.on_forget(forgotten.append)
    old, young = ledger.allocate(3), ledger.allocate(2)
    for block in (*old, *young):
        ledger.keep(block, "t")
    ledger.release(old)
    ledger.release(young)
    assert ledger.available == 7
    assert ledger.held == 0
    assert forgotten == []
    ledger.allocate(2)  # the two that are free
    taken = ledger.allocate(4)
    assert forgotten == [*reversed(old), young[1]]
    assert sorted(taken) == sorted(forgotten)


def test_sharing_idle_content_takes_it_out_of_the_queue() -> None:
    ledger = BlockLedger(3, 16)
    first, second = ledger.allocate(2)
    for block in (first, second):
        ledger.keep(block, "t")
        ledger.release([block])
    ledger.share([first])
    assert ledger.allocate(1) == [second]
    with pytest.raises(OutOfBlocks):
        ledger.allocate(1)


def test_writing_into_kept_content_would_spoil_it_even_for_its_only_holder() -> None:
    ledger = BlockLedger(3, 16)
    [block] = ledger.allocate(1)
    ledger.keep(block, "t")
    assert ledger.shared(block)


def test_idle_prompts_yield_before_idle_prefixes() -> None:
    ledger = BlockLedger(5, 16)
    prefixes = Prefixes(ledger)
    prefixes.put(ledger.allocate(2))
    prompt = ledger.allocate(2)
    for block in prompt:
        ledger.keep(block, "t")
    ledger.release(prompt)
    assert sorted(ledger.allocate(2)) == sorted(prompt)
    assert len(prefixes.resident) == 1
    ledger.allocate(1)
    assert prefixes.resident == []


def test_releasing_once_too_often_is_noticed() -> None:
    ledger = BlockLedger(3, 16)
    held = ledger.allocate(1)
    ledger.release(held)
    with pytest.raises(AssertionError, match="released once too often"):
        ledger.release(held)


def test_the_check_names_a_leak_and_an_unknown_holder() -> None:
    ledger = BlockLedger(3, 16)
    [block] = ledger.allocate(1)
    with pytest.raises(AssertionError, match=f"block {block}: 0 holders, 1 references"):
        ledger.check([])
    with pytest.raises(AssertionError, match=f"block {block}: 2 holders, 1 references"):
        ledger.check([[block], [block]])


BLOCKS = 12


class LedgerWalk(RuleBasedStateMachine):
    """Random holders allocate, share, keep and release; the model is the list of what each holds."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(BLOCKS, 16)
        self.prefixes = Prefixes(self.ledger)
        self.kept: set[int] = set()
        self.holders: list[list[int]] = []
        self.ledger.on_forget(self._forget)

    def _forget(self, block: int) -> None:
        assert block in self.kept, "content was given up that nobody kept"
        assert not any(block in held for held in self._holdings()), "content was given up under a holder"
        self.kept.discard(block)

    def _holdings(self) -> list[list[int]]:
        return [*self.holders, *self.prefixes.resident]

    def _held(self) -> set[int]:
        return {block for held in self._holdings() for block in held}

    @rule(count=st.integers(0, BLOCKS))
    def allocate(self, count: int) -> None:
        before, available = self._holdings(), self.ledger.available
        in_use = {block for held in self.holders for block in held}
        try:
            taken = self.ledger.allocate(count)
        except OutOfBlocks:
            assert count > available
            assert self._holdings() == before
            return
        assert count <= available
        assert len(taken) == len(set(taken)) == count
        assert not set(taken) & in_use
        assert 0 not in taken
        assert not set(taken) & self.kept
        self.holders.append(taken)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.holders))
        end = data.draw(st.integers(0, len(held)))
        self.ledger.share(held[:end])
        self.holders.append(list(held[:end]))

    @precondition(lambda self: self.kept - self._held())
    @rule(data=st.data())
    def share_idle_content(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept - self._held())))
        self.ledger.share([block])
        self.holders.append([block])

    @precondition(lambda self: {block for held in self.holders for block in held} - self.kept)
    @rule(data=st.data(), tenant=st.sampled_from(["", "a", "b"]))
    def keep(self, data: st.DataObject, tenant: str) -> None:
        block = data.draw(st.sampled_from(sorted({block for held in self.holders for block in held} - self.kept)))
        self.ledger.keep(block, tenant)
        self.kept.add(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.ledger.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(count=st.integers(1, 3), tenant=st.sampled_from(["a", "b"]))
    def make_a_prefix_resident(self, count: int, tenant: str) -> None:
        if count <= self.ledger.available:
            self.prefixes.put(self.ledger.allocate(count), tenant)

    @invariant()
    def counts_are_those_of_the_holders(self) -> None:
        self.ledger.check(self._holdings())

    @invariant()
    def what_rows_do_not_hold_is_available(self) -> None:
        rows = {block for held in self.holders for block in held}
        assert self.ledger.available == self.ledger.capacity - len(rows)
        assert self.ledger.held == len(self._held())

    @invariant()
    def a_block_is_shared_when_a_write_would_be_seen(self) -> None:
        counts: dict[int, int] = {}
        for held in self._holdings():
            for block in held:
                counts[block] = counts.get(block, 0) + 1
        for block, count in counts.items():
            assert self.ledger.shared(block) == (count > 1 or block in self.kept)


LedgerWalk.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True)
TestLedgerWalk = LedgerWalk.TestCase
