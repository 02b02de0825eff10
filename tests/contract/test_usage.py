"""What every store promises of usage: sums are exact, and no batch counts twice."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

import pytest

from prefixes.errors import RegistryUnavailable
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.transfer import transfer
from prefixes.usage.model import DAYS_KEPT, MAX_ROWS, OTHER, Batch, Counts, DayOfUsage, Kind, Outcome, Subject, today
from tests.support.paths import ROOT
from tests.support.usage import Reference, batch, kept, random_counts, subject

YESTERDAY = (date.fromisoformat(today()) - timedelta(days=1)).isoformat()


def test_a_batch_that_is_repeated_counts_once(url: str, registry: Store) -> None:
    first, second = batch(1, {subject(): Counts(requests=1)}), batch(2, {subject(): Counts(requests=10)})
    assert registry.usage.add(first) and registry.usage.add(second)
    with closing(open_registry(url)) as other:
        for again in (second, first, second):
            assert not other.usage.add(again)
    assert kept(registry.usage) == {(today(), subject()): Counts(requests=11)}


def test_writers_and_days_have_numbers_of_their_own(registry: Store) -> None:
    one = {subject(): Counts(requests=1)}
    assert registry.usage.add(batch(7, one))
    assert registry.usage.add(batch(7, one, writer="v"))
    assert registry.usage.add(batch(7, one, day=YESTERDAY))
    assert not registry.usage.add(batch(7, one, writer="v"))
    assert kept(registry.usage) == {
        (today(), subject()): Counts(requests=2), (YESTERDAY, subject()): Counts(requests=1)
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_sums_are_those_of_a_plain_reference(url: str, registry: Store, seed: int) -> None:
    """Random batches of several writers, each repeated now and then, through two handles."""
    noise, reference = random.Random(seed), Reference()
    subjects = [
        Subject(kind, tenant, key, task, version, outcome)
        for kind in Kind
        for tenant in ("acme", "globex", "a-b.c_d")
        for key in (None, "AAAAAAAAAAAA")
        for task, version in ((None, None), ("acme/e2e", "sha256:" + "a" * 64), ('o/"x', "v"))
        for outcome in Outcome
    ]
    numbers = {(writer, day): 0 for writer in ("u", "v", "w:1") for day in (YESTERDAY, today())}
    last: dict[tuple[str, str], Batch] = {}
    with closing(open_registry(url)) as other:
        for _ in range(60):
            writer, day = noise.choice(sorted(numbers))
            if last and noise.random() < 0.3:
                chosen = last[noise.choice(sorted(last))]
            else:
                numbers[writer, day] += noise.choice((1, 1, 5))
                counts = {noise.choice(subjects): random_counts(noise) for _ in range(noise.randrange(1, 9))}
                chosen = last[writer, day] = batch(numbers[writer, day], counts, writer=writer, day=day)
            store = noise.choice((registry, other)).usage
            assert store.add(chosen) == reference.add(chosen)
    assert kept(registry.usage) == reference.sums
    only = {row.subject.tenant for row in registry.usage.read(today(), today(), "globex")}
    assert only == {"globex"}
    assert {day for day, _ in kept(registry.usage, YESTERDAY, YESTERDAY)} == {YESTERDAY}
    assert registry.usage.days() == sorted({day for day, _ in reference.sums})


def test_writers_at_the_same_time_lose_and_double_nothing(url: str, registry: Store) -> None:
    def write(writer: int) -> int:
        added = 0
        with closing(open_registry(url)) as own:
            for number in range(1, 9):
                one = batch(number, {subject(): Counts(requests=1, output_tokens=number)}, writer=f"w{writer % 3}")
                added += own.usage.add(one)  # three writers, each twice at the same time
        return added

    with ThreadPoolExecutor(6) as pool:
        added = sum(pool.map(write, range(6)))
    assert added == 3 * 8
    assert kept(registry.usage) == {(today(), subject()): Counts(requests=24, output_tokens=3 * 36)}


WRITER = """
import sys
from prefixes.registry import open_registry
from prefixes.usage.model import Batch, Counts, Kind, Outcome, Subject
url, day = sys.argv[1:]
usage = open_registry(url).usage
row = Subject(Kind.GENERATION, "acme", None, None, None, Outcome.FINISHED)
for number in range(1, 10**6):
    usage.add(Batch("w", number, day, {row: Counts(requests=1)}))
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [1, 17, 40])
def test_a_writer_that_is_killed_leaves_whole_batches(url: str, registry: Store, after: int) -> None:
    """Whether the batch in hand was added or not, sending it again makes the sum right."""
    day, row = today(), subject(task=None, key=None)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, url, day], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        known = 0
        for line in writer.stdout:
            known = int(line)
            if known == after:
                writer.kill()
                break
        known = int((writer.stdout.read().split() or [str(known)])[-1])
    assert kept(registry.usage)[day, row].requests in (known, known + 1)
    registry.usage.add(batch(known + 1, {row: Counts(requests=1)}, day=day))
    assert kept(registry.usage)[day, row] == Counts(requests=known + 1)


def test_a_tenant_with_too_many_rows_loses_names_and_no_counts(registry: Store) -> None:
    made = {subject(task=f"acme/t{number}"): Counts(requests=1) for number in range(MAX_ROWS + 50)}
    assert registry.usage.add(batch(1, made))
    assert registry.usage.add(batch(2, {subject("globex"): Counts(requests=1), subject(task="acme/t0"): Counts(2)}))
    found = kept(registry.usage)
    assert len(found) == MAX_ROWS + 2
    other = Subject(Kind.GENERATION, "acme", None, OTHER, None, Outcome.FINISHED)
    assert found[today(), other] == Counts(requests=50)
    assert found[today(), subject(task="acme/t0")] == Counts(requests=3)
    assert found[today(), subject("globex")] == Counts(requests=1)


def test_days_end_after_their_time(registry: Store) -> None:
    old = (date.fromisoformat(today()) - timedelta(days=DAYS_KEPT)).isoformat()
    oldest = (date.fromisoformat(today()) - timedelta(days=DAYS_KEPT - 1)).isoformat()
    one = {subject(): Counts(requests=1)}
    for day in (old, oldest):
        registry.usage.put(DayOfUsage(day, {"w": 1}, one))
    assert not registry.usage.add(batch(1, one, day=old))
    assert registry.usage.add(batch(1, one))
    assert registry.usage.days() == [oldest, today()]
    assert {day for day, _ in kept(registry.usage)} == {oldest, today()}


def test_another_registry_in_its_place_is_not_written_to(url: str, registry: Store) -> None:
    assert registry.usage.add(batch(1, {subject(): Counts(requests=1)}))
    with closing(open_registry(url, registry_id=registry.id, restoring=True)) as restored:
        restored.begin_restoring()
        with pytest.raises(RegistryUnavailable):
            registry.usage.add(batch(2, {subject(): Counts(requests=1)}))
        assert restored.usage.add(batch(1, {subject(): Counts(requests=1)}, writer="v"))
        restored.finish_restoring()
    assert registry.usage.add(batch(2, {subject(): Counts(requests=1)}))
    assert kept(registry.usage) == {(today(), subject()): Counts(requests=3)}


def test_usage_is_in_a_backup_and_comes_back_once(url: str, registry: Store, tmp_path: Path) -> None:
    one = {subject(): Counts(requests=1), subject("globex", None, key=None): Counts(output_tokens=5)}
    for day in (YESTERDAY, today()):
        registry.usage.add(batch(1, one, day=day))
    before = kept(registry.usage)
    with closing(open_registry(f"disk://{tmp_path}/backup", registry_id=registry.id)) as backup:
        assert transfer(registry, backup, mirror=True, dry_run=True).usage_days == 2
        assert kept(backup.usage) == {}
        assert transfer(registry, backup, mirror=True).usage_days == 2
        assert transfer(registry, backup, mirror=True).usage_days == 0
        assert kept(backup.usage) == before
        registry.usage.put(DayOfUsage(YESTERDAY, {}, {}))  # lost
        registry.usage.add(batch(2, one))  # and gone on
        assert transfer(backup, registry).usage_days == 1
        assert kept(registry.usage) == before | {(today(), who): counts + counts for who, counts in one.items()}
        assert not registry.usage.add(batch(1, one, day=YESTERDAY))
        assert transfer(backup, registry, replace=True).usage_days == 0


def test_a_copy_to_another_registry_takes_no_usage(registry: Store, tmp_path: Path) -> None:
    registry.usage.add(batch(1, {subject(): Counts(requests=1)}))
    with closing(open_registry(f"disk://{tmp_path}/other")) as other:
        assert transfer(registry, other).usage_days == 0
        assert kept(other.usage) == {}
