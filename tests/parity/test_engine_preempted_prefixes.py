"""A prefix that leaves the pool while preempted requests need it comes back to the last bit, without the registry."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import RegistryUnavailable
from prefixes.spec import SITES, PrefixSpec, Site
from server.engine.engine import Engine
from server.engine.prefixes.entry import SiteBlocks
from server.engine.runner import Runner
from server.engine.types import Event, Finished, GenerationRequest, Output, PrefixKey
from tests.support.bart import random_bart_prefix, tiny_bart
from tests.support.engine import KERNELS, Counts, Library, kernels, make_engine, run, tiny_backbone, wait_for_loads

FAMILIES = ("gpt2", "bart")
LENGTHS = (5, 33, 17, 40)


class LeavingLibrary(Library):
    """A load fails while the registry is away, and always for a prefix in ``kept``."""

    away = False
    kept: Collection[PrefixKey] = ()

    def load(self, key: PrefixKey) -> Prefix:
        if self.away or key in self.kept:
            raise RegistryUnavailable("away")
        return super().load(key)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def make_backbone(tmp_path_factory: pytest.TempPathFactory, family: str) -> Callable[[torch.dtype], Backbone]:
    folder: Path = tmp_path_factory.mktemp(family)

    def make(dtype: torch.dtype) -> Backbone:
        if family == "gpt2":
            return tiny_backbone(folder, dtype)
        tiny_bart(folder, window=200)
        return load_backbone(str(folder), dtype=dtype)

    return make


def library_of(backbone: Backbone) -> LeavingLibrary:
    def make(index: int, length: int) -> Prefix:
        lengths: dict[Site, int] = {"decoder": length, "encoder": length // 2 + 1, "cross": length // 3 + 1}
        return random_bart_prefix(backbone.spec, SITES, lengths, dict.fromkeys(SITES, "unshifted"), index)

    return LeavingLibrary(backbone, LENGTHS, make=make if "encoder" in backbone.spec.sites else None)


@pytest.fixture(params=KERNELS)
def engines(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Iterator[Callable[..., Any]]:
    backbone = make_backbone(torch.float64)
    made: list[Engine] = []

    def make(**settings: Any) -> tuple[Engine, LeavingLibrary]:
        library = library_of(backbone)
        made.append(make_engine(backbone, library, kernels=kernels(request.param, torch.float64), **settings))
        return made[-1], library

    yield make
    for engine in made:
        engine.close()


def outputs_of(ended: dict[str, Any]) -> dict[str, tuple[Output, ...]]:
    assert all(isinstance(event, Finished) for event in ended.values()), ended
    return {name: event.outputs for name, event in ended.items()}


def alone(engines: Callable[..., Any], requests: Sequence[GenerationRequest]) -> dict[str, tuple[Output, ...]]:
    """Each request's outputs when nothing else runs."""
    return {name: outputs for request in requests
            for name, outputs in outputs_of(run(engines()[0], [request])).items()}  # fmt: skip


def test_a_request_ends_with_its_solo_answer_although_its_prefix_left_and_the_registry_failed(
    engines: Callable[..., Any],
) -> None:
    """Preempted, it loaded its evicted prefix again, and failed when the registry did not answer."""
    engine, library = engines(blocks=30, observer=(counts := Counts()))
    kinds: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "seed": 3}]
    for number, kind in enumerate(kinds):
        request = library.request(f"r{number}", 1, [5, 6, 7], max_new_tokens=20, min_new_tokens=20, **kind)
        engine.add(request)
        for _ in range(12):
            wait_for_loads(engine)
            engine.step()
        [group] = engine._scheduler.running
        engine._scheduler.preempt(group)
        library.away = True
        evict_all(engine)
        assert engine.residents() == frozenset()
        assert 0 < engine.stats().preempted_prefix_bytes <= engine.stats().resident_prefix_limit_bytes
        assert outputs_of(run(engine, [])) == alone(engines, [request])
        assert engine.stats().preempted_prefix_bytes == 0
        library.away = False
        evict_all(engine)
    assert counts.preemptions == len(kinds)
    assert library.loads == len(kinds)


def evict_all(engine: Engine) -> None:
    """As a row does that needs every block."""
    ledger = engine._ledger
    ledger.release(ledger.allocate(ledger.available))


@pytest.mark.parametrize("seed", range(2))
def test_random_mixes_in_small_pools_keep_their_solo_answers_and_load_nothing_that_an_admitted_request_needs(
    engines: Callable[..., Any], seed: int
) -> None:
    rng = random.Random(seed)
    engine, library = engines(blocks=26, observer=(counts := Counts()), max_rows=16)
    library.kept = engine._prefixes._claimed.entries
    placement, copies = engine._prefixes._placement, list[PrefixSpec]()
    read = placement._read

    def noted(spec: PrefixSpec, blocks: SiteBlocks) -> Prefix:
        copies.append(spec)
        prefix: Prefix = read(spec, blocks)
        return prefix

    placement._read = noted
    step = engine.step

    def press() -> list[Event]:
        if rng.random() < 0.2:
            for group in [group for group in engine._scheduler.running if rng.random() < 0.8]:
                engine._scheduler.preempt(group)
            evict_all(engine)
        events: list[Event] = step()
        return events

    engine.step = press
    requests = [
        library.request(f"r{number}", number % len(LENGTHS), [5 + number] * rng.choice([1, 9, 20]),
                        max_new_tokens=10, min_new_tokens=rng.choice([0, 10]), **rng.choice([{}, {"num_beams": 2}]))
        for number in range(7)
    ]  # fmt: skip
    assert outputs_of(run(engine, requests, rng)) == alone(engines, requests)
    assert counts.preemptions
    assert copies
    assert engine.stats().preempted_prefix_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_prefix_read_back_and_written_elsewhere_has_the_same_bits(
    make_backbone: Callable[..., Backbone], family: str, dtype: torch.dtype
) -> None:
    library = library_of(make_backbone(torch.float32))
    runner: Runner = make_engine(make_backbone(dtype), library, blocks=30)._runner
    for prefix in library.prefixes.values():
        here, there = table(prefix, 1), table(prefix, 15)
        for pool in (runner._cache.keys, runner._cache.values):
            pool.fill_(7.0)
        runner.write_prefix(prefix, here)
        copy = runner.read_prefix(prefix.spec, here)
        runner.write_prefix(copy, there)
        assert copy.tensors.keys() == prefix.tensors.keys()
        for name, tensor in copy.tensors.items():
            assert tensor.device.type == "cpu"
            assert torch.equal(bits(tensor), bits(prefix.tensors[name].to(dtype))), name
        for pool in (runner._cache.keys, runner._cache.values):
            for site in here:
                assert torch.equal(bits(pool[:, list(here[site])]), bits(pool[:, list(there[site])]))


def table(prefix: Prefix, first: int) -> dict[Site, tuple[int, ...]]:
    """Blocks from ``first`` on, not in order."""
    found = {}
    for site, sited in prefix.spec.sites.items():
        count = -(-sited.length // 16)
        found[site] = tuple(reversed(range(first, first + count)))
        first += count
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
