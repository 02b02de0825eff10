"""Reused prompts: the right blocks for the right tokens, never across tenants, versions or the bare backbone."""

from __future__ import annotations

import itertools

import pytest

from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse, chain, chain_root
from server.engine.types import GenerationRequest, PrefixKey, SamplingParams

SIZE = 4


def request(tenant: str = "default", prefix: PrefixKey | None = None) -> GenerationRequest:
    return GenerationRequest("r", tenant, (1,), SamplingParams(), prefix)


def remember(reuse: PromptReuse, ledger: BlockLedger, root: bytes, tokens: list[int]) -> list[int]:
    """Blocks with ``tokens``' content, held by the caller."""
    blocks, parent = ledger.allocate(len(tokens) // SIZE), root
    for index, block in enumerate(blocks):
        parent = chain(parent, tokens[index * SIZE : (index + 1) * SIZE])
        reuse.remember(parent, block, "default")
    return blocks


@pytest.fixture
def ledger() -> BlockLedger:
    return BlockLedger(20, SIZE)


def test_every_tenant_prefix_and_version_has_a_root_of_its_own() -> None:
    requests = [
        request(),
        request("other"),
        request(prefix=PrefixKey("default", "sha256:a")),
        request(prefix=PrefixKey("default", "sha256:b")),
        request(prefix=PrefixKey("shared", "sha256:a")),
        request("other", PrefixKey("default", "sha256:a")),
        request("other", PrefixKey("shared", "sha256:a")),
    ]
    for one, another in itertools.combinations(requests, 2):
        assert chain_root(one) != chain_root(another), (one, another)


def test_a_root_does_not_depend_on_the_request_or_its_tokens() -> None:
    key = PrefixKey("default", "sha256:a")
    one = GenerationRequest("one", "default", (1, 2), SamplingParams(), key)
    another = GenerationRequest("another", "default", (3,), SamplingParams(do_sample=True), key)
    assert chain_root(one) == chain_root(another)


def test_the_longest_known_chain_is_found_and_held_for_the_caller(ledger: BlockLedger) -> None:
    reuse, root = PromptReuse(ledger), chain_root(request())
    tokens = list(range(12))
    blocks = remember(reuse, ledger, root, tokens)
    found, digests = reuse.match(root, [*tokens[:8], 99, 98, 97, 96, 95])
    assert found == blocks[:2]
    assert len(digests) == 2
    ledger.check([blocks, found])


@pytest.mark.parametrize(("length", "matched"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_a_match_leaves_at_least_one_token_to_compute(ledger: BlockLedger, length: int, matched: int) -> None:
    reuse, root = PromptReuse(ledger), chain_root(request())
    remember(reuse, ledger, root, list(range(16)))
    assert len(reuse.match(root, list(range(length)))[0]) == matched


def test_the_same_tokens_behind_another_beginning_are_another_chain(ledger: BlockLedger) -> None:
    reuse, root = PromptReuse(ledger), chain_root(request())
    remember(reuse, ledger, root, [1, 2, 3, 4, 5, 6, 7, 8])
    assert reuse.match(root, [5, 6, 7, 8, 5, 6, 7, 8, 0]) == ([], [])


def test_another_root_finds_nothing(ledger: BlockLedger) -> None:
    reuse = PromptReuse(ledger)
    remember(reuse, ledger, chain_root(request()), [1, 2, 3, 4])
    assert reuse.match(chain_root(request("other")), [1, 2, 3, 4, 5]) == ([], [])


def test_content_that_is_known_already_is_not_kept_twice(ledger: BlockLedger) -> None:
    reuse, root = PromptReuse(ledger), chain_root(request())
    first = remember(reuse, ledger, root, [1, 2, 3, 4])
    second = remember(reuse, ledger, root, [1, 2, 3, 4])
    assert reuse.match(root, [1, 2, 3, 4, 5])[0] == first
    ledger.release(second)
    assert not ledger.shared(ledger.allocate(1)[0])


def test_a_block_that_was_taken_for_something_else_is_forgotten(ledger: BlockLedger) -> None:
    reuse, root = PromptReuse(ledger), chain_root(request())
    blocks = remember(reuse, ledger, root, list(range(12)))
    ledger.release(blocks)
    ledger.allocate(ledger.available - 2)
    found, _ = reuse.match(root, list(range(13)))
    assert found == blocks[:2]
    ledger.release(found)
    ledger.allocate(2)
    assert reuse.match(root, list(range(13))) == ([], [])


def test_a_forgotten_chain_can_be_remembered_again(ledger: BlockLedger) -> None:
    reuse, root = PromptReuse(ledger), chain_root(request())
    ledger.release(remember(reuse, ledger, root, [1, 2, 3, 4]))
    ledger.release(ledger.allocate(ledger.available))
    again = remember(reuse, ledger, root, [1, 2, 3, 4])
    assert reuse.match(root, [1, 2, 3, 4, 5])[0] == again
