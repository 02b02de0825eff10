"""The dataset store: named by content, each tenant's own, whole or not there, and taken in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixes.errors import InvalidName
from tests.support.datasets import LIMIT, files, line, lines, pieces, upload
from trainer.data.dataset import InvalidData, read_dataset
from trainer.data.files import UPLOAD, DatasetsUnavailable, DatasetTooLarge
from trainer.data.store import DatasetInfo, DatasetNotFound, DatasetStore, Upload

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


def test_an_upload_is_a_dataset_named_by_its_content(store: DatasetStore, root: Path) -> None:
    content = CONTENT + b"\r\n\n" + line(4).strip()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    info = upload(store, pieces(content, 10), name="e2e-small")
    assert (info.tenant, info.digest, info.lines, info.bytes, info.name) == (
        "acme", digest, 4, len(content), "e2e-small",
    )  # fmt: skip
    assert info.created_at.endswith("Z")
    assert DatasetStore(root).info("acme", digest) == info
    assert store.list("acme") == [info]
    assert store.path("acme", digest).read_bytes() == content
    assert read_dataset(store.path("acme", digest)).digest == digest
    assert sorted(info.as_dict()) == ["bytes", "created_at", "digest", "lines", "name"]
    assert files(root) == [f"{FOLDER}/{digest[7:]}.json", f"{FOLDER}/{digest[7:]}.jsonl"]


def test_the_same_content_again_is_the_same_dataset(store: DatasetStore, root: Path) -> None:
    first = upload(store, CONTENT, name="first")
    before = {name: (root / name).stat().st_mtime_ns for name in files(root)}
    assert upload(store, pieces(CONTENT, 7), name="again") == first
    assert {name: (root / name).stat().st_mtime_ns for name in files(root)} == before


def test_what_is_damaged_is_told_and_mended_by_the_same_content(store: DatasetStore, root: Path) -> None:
    info = upload(store, CONTENT)
    for damage in (
        lambda: (root / FOLDER / f"{HEX}.jsonl").write_bytes(CONTENT[:-1]),
        lambda: (root / FOLDER / f"{HEX}.jsonl").unlink(),
    ):
        damage()
        with pytest.raises(DatasetsUnavailable, match=f"expected {len(CONTENT)} bytes, found") as caught:
            store.path("acme", DIGEST)
        assert str(root) not in caught.value.message
        assert upload(store, CONTENT).digest == info.digest
        assert store.path("acme", DIGEST).read_bytes() == CONTENT
    for text in ("{", "[]", '{"digest": 1}', json.dumps({**info.as_dict(), "lines": "3"}), "[" * 100_000):
        (root / FOLDER / f"{HEX}.json").write_text(text)
        with pytest.raises(DatasetsUnavailable, match="tells of no dataset"):
            store.info("acme", DIGEST)
        assert upload(store, CONTENT).digest == store.info("acme", DIGEST).digest


def test_the_newest_is_listed_first(store: DatasetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(["2026-01-02T00:00:00.000Z", "2026-01-03T00:00:00.000Z", "2026-01-01T00:00:00.000Z"])
    monkeypatch.setattr("trainer.data.store.now", lambda: next(times))
    made = [upload(store, lines(count)) for count in (1, 2, 3)]
    assert store.list("acme") == [made[1], made[0], made[2]]
    assert store.list("globex") == []


def test_a_foreign_dataset_is_as_little_there_as_none(store: DatasetStore, root: Path) -> None:
    upload(store, CONTENT)
    calls: list[Callable[[str, str], object]] = [store.info, store.path, store.delete]
    for call in calls:
        told = []
        for digest in (DIGEST, "sha256:" + "0" * 64):
            with pytest.raises(DatasetNotFound) as caught:
                call("globex", digest)
            told.append((caught.value.message.replace(digest, ""), sorted(caught.value.detail)))
        assert told[0] == told[1]
    assert not (root / "tenants/globex").exists()
    assert upload(store, CONTENT, "globex").tenant == "globex"
    store.delete("globex", DIGEST)
    assert store.path("acme", DIGEST).read_bytes() == CONTENT


def test_a_deleted_dataset_is_gone_and_may_come_back(store: DatasetStore, root: Path) -> None:
    upload(store, CONTENT)
    other = upload(store, lines(5))
    with store.path("acme", DIGEST).open("rb") as reader:
        store.delete("acme", DIGEST)
        assert reader.read() == CONTENT  # of a job that has begun to read
    for call in (store.info, store.path, store.delete):
        with pytest.raises(DatasetNotFound):
            call("acme", DIGEST)
    assert store.list("acme") == [other]
    assert all(HEX not in name for name in files(root))
    assert upload(store, CONTENT).digest == DIGEST


BAD = ["", ".", "..", "../acme", "/etc", "a/b", "A", "acme\0", "acme\n", "x" * 65, "é"]


@pytest.mark.parametrize("bad", BAD, ids=ascii)
def test_no_name_leads_anywhere_else(store: DatasetStore, root: Path, bad: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.begin(bad, max_bytes=LIMIT),
        lambda: store.list(bad),
        *(lambda call=call: call(bad, DIGEST) for call in (store.info, store.path, store.delete)),
        *(lambda call=call: call("acme", bad) for call in (store.info, store.path, store.delete)),
        *(lambda call=call: call("acme", f"sha256:{bad}") for call in (store.info, store.path)),
        lambda: store.begin("acme", max_bytes=LIMIT, name=bad),
    ]
    for call in calls:
        with pytest.raises(InvalidName):
            call()
    assert not root.exists()


@pytest.mark.parametrize("link", ["tenants", "tenants/acme", FOLDER, f"{FOLDER}/{HEX}.json", f"{FOLDER}/{HEX}.jsonl"])
def test_symbolic_links_are_refused_and_nothing_outside_is_touched(
    store: DatasetStore, root: Path, tmp_path: Path, link: str
) -> None:
    upload(store, CONTENT)
    outside = tmp_path / "outside"
    shutil.move(root / link, outside)
    (root / link).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]}
    folder = not link.endswith((".json", ".jsonl"))
    calls: list[Callable[[], object]] = [lambda: store.path("acme", DIGEST), lambda: store.delete("acme", DIGEST)]
    if folder:
        calls += [lambda: store.begin("acme", max_bytes=LIMIT), lambda: store.list("acme")]
    for call in calls[: 1 if link.endswith(".jsonl") else None]:
        with pytest.raises(DatasetsUnavailable, match="symbolic link"):
            call()
    assert {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]} == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "dataset: expected at least one line, got none"),
        (b"\n \n", "dataset: expected at least one line, got none"),
        (lines(1000) + b'{"input": "a"}\n' + lines(1000), "dataset line 1001: expected an object"),
        (lines(1000) + b'{"input": "a", "target": 7}', "dataset line 1001, field 'target': expected a text, got int"),
    ],
    ids=["nothing", "blank lines", "in the middle", "at the end"],
)
@pytest.mark.parametrize("size", [100, 1 << 20])
def test_a_bad_line_ends_the_upload_with_its_number_and_leaves_nothing(
    store: DatasetStore, root: Path, content: bytes, said: str, size: int
) -> None:
    begun = store.begin("acme", max_bytes=LIMIT)
    with pytest.raises(InvalidData) as caught:
        for chunk in pieces(content, size):
            begun.write(chunk)
        begun.finish()
    assert caught.value.message.startswith(said)
    assert files(root) == []
    for call in (lambda: begun.write(b"x"), begun.finish):
        with pytest.raises(ValueError, match="the upload has ended"):
            call()
    begun.abort()
    assert store.list("acme") == []


def test_a_bad_line_shows_before_the_rest_has_come(store: DatasetStore) -> None:
    begun = store.begin("acme", max_bytes=LIMIT)
    begun.write(lines(10) + b"{")
    with pytest.raises(InvalidData, match="line 11"):
        begun.write(b"\n")


def test_an_upload_that_is_too_large_ends_and_leaves_nothing(store: DatasetStore, root: Path) -> None:
    begun = store.begin("acme", max_bytes=len(CONTENT))
    begun.write(CONTENT)
    assert (begun.bytes, begun.lines) == (len(CONTENT), 3)
    with pytest.raises(DatasetTooLarge, match=f"expected at most {len(CONTENT)} bytes"):
        begun.write(b"\n")
    assert files(root) == []
    exact = store.begin("acme", max_bytes=len(CONTENT))
    exact.write(CONTENT)
    assert exact.finish().digest == DIGEST


def test_an_aborted_upload_leaves_nothing_and_a_finished_one_stays(store: DatasetStore, root: Path) -> None:
    begun = store.begin("acme", max_bytes=LIMIT)
    begun.write(CONTENT)
    assert [name.startswith(f"{FOLDER}/{UPLOAD}") for name in files(root)] == [True]
    begun.abort()
    begun.abort()
    assert files(root) == []
    with pytest.raises(RuntimeError, match="the caller left"), store.begin("acme", max_bytes=LIMIT) as begun:
        begun.write(CONTENT)
        raise RuntimeError("the caller left")
    assert files(root) == []
    with store.begin("acme", max_bytes=LIMIT) as begun:
        begun.write(CONTENT)
        begun.finish()
    begun.abort()
    assert store.path("acme", DIGEST).read_bytes() == CONTENT


def _write_for_ever(begun: Upload, ended: list[BaseException]) -> None:
    try:
        while True:
            begun.write(CONTENT)
    except BaseException as error:
        ended.append(error)


def test_an_abort_from_another_thread_waits_for_the_write(store: DatasetStore, root: Path) -> None:
    for _ in range(20):
        begun = store.begin("acme", max_bytes=LIMIT)
        ended: list[BaseException] = []

        writer = threading.Thread(target=_write_for_ever, args=(begun, ended))
        writer.start()
        time.sleep(0.002)
        begun.abort()
        writer.join(10)
        assert [str(error) for error in ended] == ["the upload has ended"]
        assert files(root) == []


def test_uploads_that_nobody_goes_on_with_are_removed_after_a_day(store: DatasetStore, root: Path) -> None:
    old, young = store.begin("acme", max_bytes=LIMIT), store.begin("acme", max_bytes=LIMIT)
    old.write(lines(7))
    young.write(CONTENT)
    (stale,) = [root / name for name in files(root) if name.endswith(old._parts[-1])]
    day_ago = time.time() - 86401
    os.utime(stale, (day_ago, day_ago))
    upload(store, lines(1), "globex")
    assert stale.exists()  # another tenant's upload looks into its own folder
    upload(store, lines(1))
    assert not stale.exists()
    assert young.finish().digest == DIGEST
    with pytest.raises(DatasetsUnavailable, match="No such file"):
        old.finish()


MEASURED = """
import re, sys
from pathlib import Path
from tests.support.datasets import LIMIT, line
from trainer.data.store import DatasetStore

def peak():  # KiB that this process ever had; getrusage would tell of its parent's as well
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

begun = DatasetStore(Path(sys.argv[1])).begin("acme", max_bytes=LIMIT)
for number in range(0, 200_000, 20):
    begun.write(b"".join(line(number + more) for more in range(20)))
    if number == 2000:
        before = peak()
info = begun.finish()
print(info.lines, info.bytes, peak() - before)
"""


def test_200_000_lines_take_no_more_memory_than_2000(store: DatasetStore, root: Path) -> None:
    """A process of its own, whose memory the system measures."""
    done = subprocess.run([sys.executable, "-c", MEASURED, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, size, grown_kib = map(int, done.stdout.split())
    assert count == 200_000
    assert store.list("acme")[0].bytes == size > 15 << 20
    assert grown_kib < 1024


def test_a_dataset_is_known_without_torch(tmp_path: Path) -> None:
    """The service that takes uploads trains nothing."""
    script = "import sys, trainer.data.store, trainer.data.dataset; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_known_is_what_is_written(store: DatasetStore, root: Path) -> None:
    info = upload(store, CONTENT)
    assert json.loads((root / FOLDER / f"{HEX}.json").read_text()) == info.as_dict()
    assert isinstance(info, DatasetInfo)
