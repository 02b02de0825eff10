"""Host memory and disk in front of the registry: bounded, verified, per tenant, and never the cause of an error."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import Prefix, read_prefix, version_of, write_prefix
from prefixes.errors import InvalidArtifact, InvalidName, RegistryUnavailable, TaskNotFound
from server.engine.memory.shares import ACTIVE_S, Shares
from server.tiers import disk_cache
from server.tiers.disk_cache import MARKER, DiskCache
from server.tiers.tiers import HostCache, PrefixTiers
from tests.support.prefixes import make_prefix

PREFIXES = [make_prefix(seed=seed) for seed in range(4)]
DATA = [write_prefix(prefix) for prefix in PREFIXES]
A, B, C, D = (version_of(prefix) for prefix in PREFIXES)
SIZE = len(DATA[0])


class Source:
    """A registry's ``fetch`` that counts."""

    def __init__(self) -> None:
        self.blobs = {("default", version): data for version, data in zip((A, B, C, D), DATA, strict=True)}
        self.fetched: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.go = threading.Event()
        self.go.set()

    def fetch(self, tenant: str, version: str) -> bytes:
        self.fetched.append((tenant, version))
        assert self.go.wait(30)
        if self.error:
            raise self.error
        try:
            return self.blobs[tenant, version]
        except KeyError:
            raise TaskNotFound(version) from None


def load(tiers: PrefixTiers, version: str = A, tenant: str = "default") -> Prefix:
    """As the catalog does."""
    return tiers.load(tenant, version, lambda data: read_prefix(data, expected_version=version))


def disk(tmp_path: Path, copies: float = 10, registry_id: str = "registry-1") -> DiskCache:
    return DiskCache(tmp_path / "cache", registry_id, int(copies * SIZE))


def file_of(tmp_path: Path, version: str, tenant: str = "default", registry_id: str = "registry-1") -> Path:
    return tmp_path / "cache" / registry_id / tenant / f"{version.removeprefix('sha256:')}.safetensors"


def both(tmp_path: Path, source: Source, host_copies: float = 10) -> PrefixTiers:
    return PrefixTiers(source.fetch, (HostCache(int(host_copies * SIZE)), disk(tmp_path)))


def reads(tiers: PrefixTiers) -> Mapping[str, int]:
    return tiers.stats().reads


def kept(tiers: PrefixTiers, tier: str) -> list[str]:
    return [version for _, version, _ in tiers.entries()[tier]]


# --- the order of the tiers ---


def test_a_load_is_answered_by_the_nearest_tier_that_has_it(tmp_path: Path) -> None:
    source = Source()
    tiers = both(tmp_path, source)
    assert version_of(load(tiers)) == A
    load(tiers)
    assert reads(tiers) == {"host": 1, "disk": 0, "registry": 1}
    restarted = both(tmp_path, source)
    assert version_of(load(restarted)) == A
    load(restarted)
    assert reads(restarted) == {"host": 1, "disk": 1, "registry": 0}
    assert source.fetched == [("default", A)]


def test_without_tiers_every_load_is_the_registrys() -> None:
    source = Source()
    tiers = PrefixTiers(source.fetch, ())
    load(tiers)
    load(tiers)
    assert reads(tiers) == {"registry": 2}


def test_another_tenants_copy_is_no_hit(tmp_path: Path) -> None:
    source = Source()
    tiers = both(tmp_path, source)
    load(tiers)
    with pytest.raises(TaskNotFound):
        load(tiers, tenant="acme")
    assert source.fetched == [("default", A), ("acme", A)]
    source.blobs["acme", A] = DATA[0]
    load(tiers, tenant="acme")
    assert tiers.stats().tiers[1].entries == 2


@pytest.mark.parametrize("spoil", [
    lambda data: data[:-1], lambda data: b"", lambda data: DATA[1], lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    lambda data: os.urandom(200),
], ids=["cut", "empty", "another's", "one bit", "foreign"])  # fmt: skip
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_spoiled_copy_is_thrown_away_and_the_next_tier_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tier: str, spoil: Callable[[bytes], bytes]
) -> None:
    source, host, cache = Source(), HostCache(10 * SIZE), disk(tmp_path)
    tiers = PrefixTiers(source.fetch, (host, cache))
    load(tiers)
    if tier == "host":
        host.put("default", A, spoil(DATA[0]))
    else:
        host.drop("default", A)
        file_of(tmp_path, A).write_bytes(spoil(DATA[0]))
    with caplog.at_level(logging.WARNING):
        assert version_of(load(tiers)) == A
    assert reads(tiers) == {"host": 0, "disk": int(tier == "host"), "registry": 1 + int(tier == "disk")}
    assert tiers.stats().damaged == {"host": int(tier == "host"), "disk": int(tier == "disk")}
    assert "damaged" in caplog.text
    assert host.get("default", A) == DATA[0]
    assert file_of(tmp_path, A).read_bytes() == DATA[0], "the good bytes have taken its place"


def test_only_the_registrys_own_damage_is_an_error_and_it_is_kept_nowhere(tmp_path: Path) -> None:
    source = Source()
    source.blobs["default", A] = DATA[0][:-1]
    tiers = both(tmp_path, source)
    with pytest.raises(InvalidArtifact):
        load(tiers)
    assert tiers.entries() == {"host": [], "disk": []}
    source.blobs["default", A] = DATA[0]
    assert version_of(load(tiers)) == A


def test_what_is_kept_is_served_while_the_registry_is_away_and_a_spoiled_copy_is_its_error(tmp_path: Path) -> None:
    source = Source()
    tiers = both(tmp_path, source, host_copies=0)
    load(tiers)
    source.error = RegistryUnavailable("away")
    load(tiers)
    file_of(tmp_path, A).write_bytes(b"x")
    with pytest.raises(RegistryUnavailable):
        load(tiers)
    assert not file_of(tmp_path, A).exists()


# --- one load at a time ---


@pytest.mark.parametrize("fails", [False, True])
def test_all_who_ask_for_an_artifact_meanwhile_share_one_load_and_its_error(tmp_path: Path, fails: bool) -> None:
    source = Source()
    source.go.clear()
    source.error = RegistryUnavailable("away") if fails else None
    tiers = both(tmp_path, source)
    asking: list[None] = []

    def ask() -> Prefix:
        asking.append(None)
        return load(tiers)

    with ThreadPoolExecutor(8) as pool:
        askers = [pool.submit(ask) for _ in range(7)]
        other = pool.submit(load, tiers, B)
        while len(source.fetched) < 2 or len(asking) < 7:
            time.sleep(0.001)
        time.sleep(0.1)  # from the mark to the wait it is a step
        source.go.set()
        for one in askers:
            if fails:
                assert isinstance(one.exception(), RegistryUnavailable)
            else:
                assert version_of(one.result()) == A
        assert (other.exception() is not None) is fails
    assert sorted(source.fetched) == sorted([("default", A), ("default", B)])
    source.error = None
    assert version_of(load(tiers)) == A, "an error is not remembered"


# --- bounds ---


def test_host_memory_stays_within_its_bytes_and_the_least_recently_used_yields() -> None:
    host = HostCache(int(2.5 * SIZE))
    for version, data in ((A, DATA[0]), (B, DATA[1])):
        host.put("default", version, data)
    assert host.get("default", A) == DATA[0]
    host.put("default", C, DATA[2])
    assert [version for _, version, _ in host.entries()] == [A, C]
    assert host.nbytes == 2 * SIZE
    host.put("default", A, DATA[0])
    assert host.nbytes == 2 * SIZE
    host.put("default", D, b"x" * (3 * SIZE))
    assert host.get("default", D) is None, "what does not fit at all evicts nothing"
    assert len(host.entries()) == 2
    host.drop("default", A)
    host.drop("default", C)
    assert host.nbytes == 0


def test_a_tenants_flood_leaves_what_others_have_in_host_memory() -> None:
    """A thousand artifacts of one tenant pushed out everybody else's."""
    host = HostCache(6 * SIZE)
    for version, data in ((A, DATA[0]), (B, DATA[1])):
        host.put("quiet", version, data)
    for index in range(1_000):
        host.put("flood", f"v{index}", DATA[2])
    assert [entry[:2] for entry in host.entries()] == [
        ("quiet", A), ("quiet", B), *(("flood", f"v{index}") for index in range(996, 1_000))
    ]  # fmt: skip
    host.put("large", C, b"x" * (6 * SIZE))
    assert [entry[:2] for entry in host.entries()] == [("large", C)], "what must be evicted can be"
    assert host.nbytes == 6 * SIZE


def test_a_tenants_weight_is_its_share_of_host_memory_and_one_that_is_gone_has_none() -> None:
    now = [0.0]
    host = HostCache(6 * SIZE, Shares(lambda tenant: 2.0 if tenant == "heavy" else 1.0, lambda: now[0]))
    for index in range(6):
        host.put("heavy", f"h{index}", DATA[0])
    for index in range(6):
        host.put("light", f"l{index}", DATA[0])
    assert [tenant for tenant, _, _ in host.entries()] == ["heavy"] * 4 + ["light"] * 2
    now[0] = ACTIVE_S + 1
    assert host.get("light", "l5") is not None
    for index in range(6, 10):
        host.put("light", f"l{index}", DATA[0])
    assert [tenant for tenant, _, _ in host.entries()] == ["light"] * 6


def test_no_host_memory_keeps_nothing() -> None:
    host = HostCache(0)
    host.put("default", A, DATA[0])
    assert host.entries() == []


def test_the_folder_stays_within_its_bytes_and_the_least_recently_used_yields_over_restarts(tmp_path: Path) -> None:
    cache = disk(tmp_path, 2.5)
    for age, (version, data) in enumerate(((A, DATA[0]), (B, DATA[1]))):
        cache.put("default", version, data)
        os.utime(file_of(tmp_path, version), (1000 + age, 1000 + age))
    cache = disk(tmp_path, 2.5)
    assert [version for _, version, _ in cache.entries()] == [A, B]
    assert cache.get("default", A) == DATA[0]
    cache = disk(tmp_path, 2.5)
    cache.put("default", C, DATA[2])
    assert sorted(path.name for path in file_of(tmp_path, A).parent.iterdir()) == sorted(
        file_of(tmp_path, version).name for version in (A, C)
    )
    assert cache.nbytes == 2 * SIZE
    cache.put("default", D, b"x" * (3 * SIZE))
    assert not file_of(tmp_path, D).exists()
    assert cache.nbytes == 2 * SIZE


def test_copies_of_a_registry_that_is_gone_count_and_yield_and_are_never_this_ones(tmp_path: Path) -> None:
    old = disk(tmp_path, 2.5, registry_id="gone")
    for version, data in ((A, DATA[0]), (B, DATA[1])):
        old.put("default", version, data)
    new = disk(tmp_path, 2.5)
    assert (new.get("default", A), new.entries(), new.nbytes) == (None, [], 2 * SIZE)
    new.put("default", C, DATA[2])
    new.put("default", D, DATA[3])
    assert new.nbytes == 2 * SIZE
    assert not file_of(tmp_path, A, registry_id="gone").exists()


def test_what_another_process_has_written_is_found_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = disk(tmp_path, 2.5), disk(tmp_path, 2.5)
    other.put("default", A, DATA[0])
    assert one.get("default", A) == DATA[0]
    other.put("default", B, DATA[1])
    monkeypatch.setattr(disk_cache, "RESCAN_S", 0)
    one.put("default", C, DATA[2])
    assert len(list(file_of(tmp_path, A).parent.iterdir())) == 2
    other_view = other.get("default", A), other.get("default", B), other.get("default", C)
    assert [data is not None for data in other_view].count(True) == 2


# --- a bad disk ---


def test_a_full_disk_costs_the_cache_and_not_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = Source()
    tiers = both(tmp_path, source)
    real = os.replace
    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.INFO):
        for version in (A, B):
            assert version_of(load(tiers, version)) == version
    assert tiers.stats().failures == {"host": 0, "disk": 2}
    assert caplog.text.count("the disk cache cannot be used") == 1, "said once, not at every load"
    assert list(file_of(tmp_path, A).parent.iterdir()) == [], "nothing half-written stays"
    assert kept(tiers, "disk") == []
    monkeypatch.setattr(os, "replace", real)
    with caplog.at_level(logging.INFO):
        load(tiers, C)
    assert kept(tiers, "disk") == [C]
    assert "can be used again" in caplog.text


def test_a_really_full_disk_costs_the_cache_and_not_the_load(tmp_path: Path) -> None:
    """The kernel's own refusal: a limit on the size of files, in a process of its own."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from server.tiers.disk_cache import DiskCache\n"
        "cache = DiskCache(Path(sys.argv[1]), 'registry-1', 1 << 20)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "cache.put('default', 'sha256:' + '0' * 64, b'x' * 5000)\n"
        "print(cache.failures, cache.nbytes, cache.get('default', 'sha256:' + '0' * 64))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["1", "0", "None"]
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != MARKER] == []


@pytest.mark.parametrize("obstacle", ["a file for the folder", "a file for the registry", "a folder for the file"])
def test_a_folder_that_cannot_be_used_costs_the_cache_and_not_the_load(tmp_path: Path, obstacle: str) -> None:
    path = {
        "a file for the folder": tmp_path / "cache",
        "a file for the registry": tmp_path / "cache" / "registry-1",
        "a folder for the file": file_of(tmp_path, A) / "x",
    }[obstacle]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"in the way")
    source = Source()
    tiers = both(tmp_path, source, host_copies=0)
    for _ in range(2):
        assert version_of(load(tiers)) == A
    assert reads(tiers)["registry"] == 2
    assert tiers.stats().failures["disk"] > 0
    assert path.read_bytes() == b"in the way"


def test_the_folder_may_vanish_under_the_cache(tmp_path: Path) -> None:
    source = Source()
    tiers = both(tmp_path, source, host_copies=0)
    load(tiers)
    (tmp_path / "cache").rename(tmp_path / "gone")
    load(tiers)
    load(tiers)
    assert reads(tiers) == {"host": 0, "disk": 1, "registry": 2}


# --- what stands in the folder ---


def test_folders_and_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        disk(tmp_path).put("default", A, DATA[0])
    finally:
        os.umask(before)
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    (tmp_path / "cache" / "registry-1").chmod(0o755)
    assert disk(tmp_path).get("default", A) == DATA[0]
    assert stat.S_IMODE((tmp_path / "cache" / "registry-1").stat().st_mode) == 0o700


@pytest.mark.parametrize("link", ["file", "tenant", "registry"])
def test_a_symbolic_link_is_not_followed_out_of_the_folder(tmp_path: Path, link: str) -> None:
    disk(tmp_path).put("default", A, DATA[0])
    inside = {"file": file_of(tmp_path, A), "tenant": file_of(tmp_path, A).parent,
              "registry": tmp_path / "cache" / "registry-1"}[link]  # fmt: skip
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    content = {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}
    cache = disk(tmp_path, 1.5)
    assert cache.nbytes == 0
    assert cache.get("default", A) is None
    cache.put("default", B, DATA[1])
    cache.put("default", A, DATA[0])
    cache.drop("default", A)
    assert {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()} == content


def test_other_peoples_files_are_neither_counted_nor_touched(tmp_path: Path) -> None:
    name = f"{hashlib.sha256(b'').hexdigest()}.safetensors"
    others = [
        tmp_path / "cache" / "tenants" / "default" / name,  # looks like ours, but nobody has marked its folder
        tmp_path / "cache" / "registry-1" / "default" / "notes.txt",
        tmp_path / "cache" / "registry-1" / "Default" / name,  # no tenant has this name
        tmp_path / "cache" / "a.txt",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * SIZE)
    cache = disk(tmp_path, 1.5)
    cache.put("default", A, DATA[0])
    cache = disk(tmp_path, 1.5)
    assert cache.nbytes == SIZE
    cache.put("default", B, DATA[1])
    assert all(path.read_bytes() == b"x" * SIZE for path in others)
    assert not file_of(tmp_path, A).exists()


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    cache = disk(tmp_path)
    cache.put("default", A, DATA[0])
    file_of(tmp_path, A).unlink()
    os.mkfifo(file_of(tmp_path, A))
    assert cache.get("default", A) is None
    cache.put("default", A, DATA[0])
    assert cache.get("default", A) == DATA[0]


def test_what_a_killed_writer_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    disk(tmp_path).put("default", A, DATA[0])
    old, new = (file_of(tmp_path, A).with_name(f".tmp-{name}") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    disk(tmp_path)
    assert (old.exists(), new.exists()) == (False, True), "the new one may be another process's work"


@pytest.mark.parametrize(("tenant", "version"), [("../x", A), ("default", "sha256:../../x"), ("", A), ("a/b", A)])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, tenant: str, version: str) -> None:
    cache = disk(tmp_path)
    for call in (lambda: cache.get(tenant, version), lambda: cache.put(tenant, version, b"x")):
        with pytest.raises(InvalidName):
            call()


@pytest.mark.parametrize("registry_id", ["", ".", "..", "a/b", "../x", "a..b", "x" * 65])
def test_an_id_that_is_no_safe_name_is_refused(tmp_path: Path, registry_id: str) -> None:
    with pytest.raises(InvalidName):
        disk(tmp_path, registry_id=registry_id)
