"""No tenant pushes out of the disk cache what another one has there while it has more."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from pathlib import Path

from server.tiers.disk_cache import STALE_S, DiskCache

SIZE = 100
DATA = b"x" * SIZE
DAY_S = 86_400.0


def version(index: int) -> str:
    return f"sha256:{hashlib.sha256(str(index).encode()).hexdigest()}"


def disk(folder: Path, files: int, registry_id: str = "registry") -> DiskCache:
    return DiskCache(folder, registry_id, files * SIZE)


def test_a_flood_of_tasks_leaves_a_tenant_with_three_what_it_has(tmp_path: Path) -> None:
    cache = disk(tmp_path, 10)
    for index in range(3):
        cache.put("small", version(index), DATA)
    for index in range(1000):
        cache.put("flood", version(index), DATA)
    assert Counter(tenant for tenant, _, _ in cache.entries()) == {"flood": 7, "small": 3}
    assert [cache.get("small", version(index)) for index in range(3)] == [DATA] * 3
    assert [kept for tenant, kept, _ in cache.entries() if tenant == "flood"] == [version(i) for i in range(993, 1000)]


def test_who_loses_a_file_had_the_most_bytes_whatever_the_order(tmp_path: Path) -> None:
    for seed in range(20):
        cache, chance = disk(tmp_path / str(seed), 12), random.Random(seed)
        tenants = [f"t{index}" for index in range(chance.randint(2, 6))]
        for _ in range(60):
            before = set(cache.entries())
            comer = chance.choice(tenants)
            if before and chance.random() < 0.3:
                tenant, kept, _ = chance.choice(sorted(before))
                assert cache.get(tenant, kept) == DATA
                continue
            cache.put(comer, version(chance.randrange(30)), DATA)
            after = Counter(tenant for tenant, _, _ in cache.entries())
            lost = Counter(tenant for tenant, _, _ in before - set(cache.entries()))
            assert lost.total() <= 1
            for tenant in lost:
                assert after[tenant] + 1 >= max(after.values()), "another one had more"
            assert cache.nbytes <= cache.limit_bytes


def test_tenants_of_other_registries_in_the_folder_are_others(tmp_path: Path) -> None:
    one, other = disk(tmp_path, 10, "one"), disk(tmp_path, 10, "other")
    for index in range(3):
        one.put("default", version(index), DATA)
    other = disk(tmp_path, 10, "other")
    for index in range(20):
        other.put("default", version(index), DATA)
    assert (len(one.entries()), len(other.entries())) == (3, 7)
    assert all(one.get("default", version(index)) == DATA for index in range(3))


def test_what_nobody_has_read_for_a_week_yields_first_the_oldest_before_the_rest(tmp_path: Path) -> None:
    cache = disk(tmp_path, 10)
    for tenant, index, days in (("gone", 0, 9), ("gone", 1, 8), ("small", 2, 6)):
        cache.put(tenant, version(index), DATA)
        path = tmp_path / "registry" / tenant / f"{version(index).removeprefix('sha256:')}.safetensors"
        at = time.time() - days * DAY_S
        os.utime(path, (at, at))
    cache = disk(tmp_path, 10)
    kept = []
    for index in range(10):
        cache.put("busy", version(index), DATA)
        kept.append(Counter(tenant for tenant, _, _ in cache.entries()))
    assert STALE_S == 7 * DAY_S
    assert kept[6] == {"gone": 2, "small": 1, "busy": 7}
    assert kept[7] == {"gone": 1, "small": 1, "busy": 8}
    assert kept[8] == {"small": 1, "busy": 9}
    assert kept[9] == {"small": 1, "busy": 9}, "not a week old, and less than the other has"
