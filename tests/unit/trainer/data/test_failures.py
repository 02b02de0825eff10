"""The dataset store under writers at once, killed ones and failing disks: whole datasets, and nothing beside them."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefixes.errors import DiskFull, PrefixdError
from tests.support.datasets import files, lines, pieces, upload
from tests.support.processes import FORK
from trainer.data.dataset import read_dataset
from trainer.data.files import UPLOAD, DatasetsUnavailable
from trainer.data.store import DatasetNotFound, DatasetStore

CONTENT = lines(3)
HEX = hashlib.sha256(CONTENT).hexdigest()
DIGEST = f"sha256:{HEX}"
FOLDER = "tenants/acme/datasets"


@pytest.fixture
def store(tmp_path: Path) -> DatasetStore:
    return DatasetStore(tmp_path / "data")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_several_uploads_of_one_content_and_deletes_at_once_leave_it_whole_or_gone(
    store: DatasetStore, root: Path
) -> None:
    faults: list[BaseException] = []

    def work(index: int) -> None:
        own = DatasetStore(root)
        try:
            for _ in range(15):
                if index:
                    assert upload(own, CONTENT).digest == DIGEST
                else:
                    try:
                        own.delete("acme", DIGEST)
                    except DatasetNotFound:
                        time.sleep(0.001)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert files(root) in ([], [f"{FOLDER}/{HEX}.json", f"{FOLDER}/{HEX}.jsonl"])
    assert upload(store, CONTENT) == store.info("acme", DIGEST)


def _upload_and_delete_for_ever(root: Path) -> None:
    store = DatasetStore(root)
    while True:
        for count in (1, 2, 3):
            info = upload(store, pieces(lines(count), 50))
        store.delete("acme", info.digest)


def test_a_process_killed_at_any_moment_leaves_whole_datasets(store: DatasetStore, root: Path) -> None:
    generator = random.Random(0)
    for _ in range(15):
        process = FORK.Process(target=_upload_and_delete_for_ever, args=(root,))
        process.start()
        assert process.pid is not None
        time.sleep(generator.uniform(0.01, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for info in store.list("acme"):
            assert read_dataset(store.path("acme", info.digest)).digest == info.digest
        whole = upload(store, lines(4))  # the dead one's lock is free, and what it left half-done is removed
        left = [name for name in files(root) if UPLOAD not in name]
        stems = {info.digest.removeprefix("sha256:") for info in store.list("acme")}
        assert left == sorted(f"{FOLDER}/{stem}.{end}" for stem in stems for end in ("json", "jsonl"))
        store.delete("acme", whole.digest)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, DiskFull, "expected room on the disk for the dataset, got: No space left on device"),
        (errno.EDQUOT, DiskFull, "expected room on the disk for the dataset, got: Disk quota exceeded"),
        (errno.EIO, DatasetsUnavailable, "datasets: cannot "),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open", "mkdir"])
def test_a_failing_disk_is_a_named_error_and_leaves_nothing(
    store: DatasetStore, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int,
    kind: type[PrefixdError], said: str,
) -> None:  # fmt: skip
    """Each system call of an upload fails, one after the other."""
    real = getattr(os, call)
    for failing in range(300):
        shutil.rmtree(root, ignore_errors=True)
        count = 0

        def fail(*args: object, nth: int = failing, **options: object) -> object:
            nonlocal count
            if call == "open" and str(args[0]).endswith(".lock"):
                return real(*args, **options)
            count += 1
            if count == nth + 1:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                upload(store, pieces(CONTENT, 100))
            except PrefixdError as error:
                assert isinstance(error, kind)
                assert error.message.startswith(said)
                assert str(root) not in error.message
        if count <= failing:
            assert failing
            break
        # A file that is in its place and whose folder could not be synced is whole all the same.
        assert files(root) in ([], [f"{FOLDER}/{HEX}.json", f"{FOLDER}/{HEX}.jsonl"])
        assert upload(store, CONTENT).digest == DIGEST
        assert store.path("acme", DIGEST).read_bytes() == CONTENT
    else:
        pytest.fail("the upload never got through")


FULL = """
import sys
from pathlib import Path
from tests.support.datasets import LIMIT, lines, upload
from trainer.data.store import DatasetStore
from prefixes.errors import DiskFull

root = Path(sys.argv[1])
store = DatasetStore(root)
kept = upload(store, lines(10))
begun = store.begin("acme", max_bytes=LIMIT)
try:
    for _ in range(100):
        begun.write(lines(100))
except DiskFull as error:
    assert begun.bytes > 100_000, begun.bytes
    left = [path.name for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(left) == 2, left
    assert store.list("acme") == [kept]
    assert upload(store, lines(20)).lines == 20
    print("full:", error.message)
"""


def test_a_disk_that_is_full_ends_the_upload_and_the_room_comes_back(tmp_path: Path) -> None:
    """A file system of 256 KiB, in a namespace of its own."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    script = 'mount -t tmpfs -o size=256k none "$1"; shift; exec "$@"'
    tried = subprocess.run([*mount, script, "sh", tmp_path, "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace of its own")
    done = subprocess.run(
        [*mount, script, "sh", tmp_path, sys.executable, "-c", FULL, tmp_path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "full: expected room on the disk for the dataset, got: No space left on device\n"
