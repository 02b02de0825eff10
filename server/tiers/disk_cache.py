"""Artifacts on a local disk, so that a restart or a new replica need not fetch them again: a cache, never the truth.

    <folder>/<registry id>/.prefixd-cache                    marks a folder as ours
    <folder>/<registry id>/<tenant>/<hex>.safetensors        0600, in folders of 0700

Owns this layout, the bound on its bytes and the order in which files yield, over all registries and all processes that
share the folder: what nobody has read for ``STALE_S`` first, then what is the tenant's that has most bytes there, the
new file's included; of these the least recently used, by modification time. So no tenant pushes out what another one
has while it has more. Knows no format. The reader verifies the digest, so a file that a power cut, a neighbour or a bad
disk has spoiled is a miss, and nothing needs a sync. No method raises because of the disk: a full, broken or read-only
one costs the cache and no load.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from prefixes.errors import InvalidName
from prefixes.files.folder import Folder
from prefixes.spec import check_name, check_version

MARKER: Final = ".prefixd-cache"
RESCAN_S: Final = 60.0
"""Seconds after which ``put`` looks at the folder again before it makes room: other processes may write to it."""
STALE_S: Final = 7 * 86_400.0
"""Seconds after which a file that nobody has read yields first. What is in memory is not read here: hence a week."""
ABANDONED_S: Final = 3600.0
"""Seconds after which a temporary file counts as abandoned."""

_REGISTRY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE = re.compile(r"([0-9a-f]{64})\.safetensors")
_log = logging.getLogger("prefixd.server")

_Key = tuple[str, str, str]  # registry id, tenant, version


class _File(NamedTuple):
    used_ns: int  # since 1970
    size: int


class DiskCache:
    """Thread-safe. Several processes may share a folder; each keeps the bound by what it last saw of the whole."""

    name: Final = "disk"

    def __init__(self, folder: Path, registry_id: str, max_bytes: int) -> None:
        """Raises InvalidName if ``registry_id`` is no safe name of a folder."""
        if not _REGISTRY_ID.fullmatch(registry_id) or ".." in registry_id:
            raise InvalidName(f"registry id: expected 1 to 64 of A-Z a-z 0-9 . _ -, got {registry_id[:80]!r}")
        self.folder, self.registry_id, self.limit_bytes = folder.expanduser(), registry_id, max_bytes
        self.failures = 0  # operations that the disk refused
        self._files: dict[_Key, _File] = {}  # least recently used first
        self._scanned_at: float | None = None
        self._lock = threading.Lock()
        self._failing = False
        with self._lock, self._tolerating("open"):
            self._scan()

    @property
    def nbytes(self) -> int:
        """Bytes of artifacts in the folder, of all registries."""
        with self._lock:
            return sum(file.size for file in self._files.values())

    def entries(self) -> list[tuple[str, str, int]]:
        """(tenant, version, bytes) of this registry's artifacts, the least recently used first."""
        with self._lock:
            return [(tenant, version, file.size) for (owner, tenant, version), file in self._files.items()
                    if owner == self.registry_id]  # fmt: skip

    def holds(self, tenant: str, version: str) -> bool:
        """Whether this process knows of a file; others may have changed the folder since it last looked."""
        with self._lock:
            return self._key(tenant, version) in self._files

    def get(self, tenant: str, version: str) -> bytes | None:
        """The file's bytes, not verified; None if there is no file, or none that can be read."""
        key = self._key(tenant, version)
        data: bytes | None = None
        with self._tolerating("read"), suppress(FileNotFoundError), self._tenant_folder(key, create=False) as folder:
            data = _read(folder, _file(version), self.limit_bytes)
        with self._lock:
            self._files.pop(key, None)
            if data is not None:
                self._files[key] = _File(time.time_ns(), len(data))
        return data

    def put(self, tenant: str, version: str, data: bytes) -> None:
        """Keep ``data`` unless it alone exceeds the bound; other files yield to it, see above."""
        key = self._key(tenant, version)
        if len(data) > self.limit_bytes:
            return
        with self._tolerating("write"):
            with self._lock:
                if self._scanned_at is None or time.monotonic() - self._scanned_at >= RESCAN_S:
                    self._scan()
                self._files.pop(key, None)
                self._make_room(key, len(data))
                # The room is taken; the file itself is written outside the lock.
                self._files[key] = _File(time.time_ns(), len(data))
            try:
                with self._tenant_folder(key, create=True) as folder:
                    folder.write(_file(version), data, mode=0o600)
            except OSError:
                with self._lock:
                    self._files.pop(key, None)
                raise

    def drop(self, tenant: str, version: str) -> None:
        """Remove a file."""
        key = self._key(tenant, version)
        with self._tolerating("remove"), self._lock:
            self._files.pop(key, None)
            self._unlink(key)

    # --- inside ---

    def _key(self, tenant: str, version: str) -> _Key:
        return (self.registry_id, check_name("tenant", tenant), check_version(version))

    def _make_room(self, new: _Key, size: int) -> None:
        held = Counter({new[:2]: size})
        for (owner, tenant, _), file in self._files.items():
            held[owner, tenant] += file.size
        while held.total() > self.limit_bytes:
            key = self._first_to_yield(held)
            self._unlink(key)
            held[key[:2]] -= self._files.pop(key).size

    def _first_to_yield(self, held: Mapping[tuple[str, str], int]) -> _Key:
        oldest = next(iter(self._files))
        if self._files[oldest].used_ns < time.time_ns() - STALE_S * 1e9:
            return oldest
        most = max({key[:2] for key in self._files}, key=held.__getitem__)
        return next(key for key in self._files if key[:2] == most)

    def _unlink(self, key: _Key) -> None:
        with suppress(FileNotFoundError), self._tenant_folder(key, create=False) as folder:
            folder.remove(_file(key[2]))

    def _scan(self) -> None:
        """Look at the files of all registries; other people's files are neither counted nor touched."""
        found: list[tuple[_File, _Key]] = []
        with self._top(create=True) as top:
            for owner in filter(_REGISTRY_ID.fullmatch, _folders(top)):
                with suppress(OSError), top.folder(owner) as registry:
                    if stat.S_ISREG(registry.status(MARKER).st_mode):
                        for tenant in _folders(registry):
                            found += self._scan_tenant(owner, tenant)
        self._files = {key: file for file, key in sorted(found)}
        self._scanned_at = time.monotonic()

    def _scan_tenant(self, owner: str, tenant: str) -> list[tuple[_File, _Key]]:
        with suppress(OSError, InvalidName):
            key = (owner, check_name("tenant", tenant), "")
            with self._tenant_folder(key, create=False) as folder:
                folder.sweep(older_s=ABANDONED_S)
                return [(file, (owner, tenant, version)) for version, file in _files(folder)]
        return []

    def _top(self, *, create: bool) -> Folder:
        return Folder.at(self.folder, make=0o700 if create else None, durable=False)

    @contextmanager
    def _tenant_folder(self, key: _Key, *, create: bool) -> Iterator[Folder]:
        """The folder of the key's tenant. No symbolic link below the cache's own folder is followed."""
        owner, tenant, _ = key
        make = 0o700 if create else None
        with self._top(create=create) as top, top.folder(owner, make=make) as registry:
            registry.narrow(0o700)  # raises PermissionError for somebody else's folder
            if create:
                registry.touch(MARKER, mode=0o600)
            with registry.folder(tenant, make=make) as folder:
                folder.narrow(0o700)
                yield folder

    @contextmanager
    def _tolerating(self, action: str) -> Iterator[None]:
        """Count the disk's errors, and log when they begin and when a write succeeds again."""
        try:
            yield
        except OSError as error:
            self.failures += 1
            if not self._failing:
                reason = error.strerror or type(error).__name__
                _log.warning("the disk cache cannot be used", extra={"facts": {"action": action, "reason": reason}})
            self._failing = True
        else:
            if self._failing and action == "write":
                self._failing = False
                _log.info("the disk cache can be used again")


def _file(version: str) -> str:
    return f"{version.removeprefix('sha256:')}.safetensors"


def _folders(folder: Folder) -> list[str]:
    return [entry.name for entry in folder.entries() if entry.is_dir(follow_symlinks=False)]


def _files(folder: Folder) -> Iterator[tuple[str, _File]]:
    """A tenant's artifacts by version."""
    for entry in folder.entries():
        facts = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(facts.st_mode) and (match := _FILE.fullmatch(entry.name)):
            yield f"sha256:{match[1]}", _File(facts.st_mtime_ns, facts.st_size)


def _read(folder: Folder, name: str, limit: int) -> bytes | None:
    with folder.open(name) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > limit:
            return None
        data = file.read()
        with suppress(OSError):
            os.utime(file.fileno())  # used just now
        return data
