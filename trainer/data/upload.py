"""One upload of a dataset. Its bytes are checked line by line as they come, and become a dataset once all are there.

Owns the unfinished file and what becomes of it. Holds one chunk and one line in memory, whatever the upload's size.
Knows no HTTP: a route calls ``write`` with each chunk, off its event loop.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from types import TracebackType

from prefixes.errors import PrefixdError
from prefixes.files.folder import write_all
from trainer.data.files import UPLOAD, DatasetFiles, DatasetInfo, DatasetTooLarge, folder
from trainer.data.lines import LineReader
from trainer.data.quota import ByteQuota

Keep = Callable[[tuple[str, ...], str, int, int], DatasetInfo]
"""``(parts of the written file, its digest, lines, bytes)`` -> the dataset."""


class Upload:
    """Made by ``DatasetStore.begin``. As a context manager it aborts an upload that was not finished.

    Calls may come from different threads. An abort during a write waits for it. A call that raises or aborts leaves no
    file behind. A killed process leaves one, which a later upload of the tenant removes after a day.
    """

    def __init__(self, files: DatasetFiles, tenant: str, *, max_bytes: int, quota: ByteQuota, keep: Keep) -> None:
        """Make the file. Raises InvalidName, DiskFull, DatasetsUnavailable."""
        self.bytes = 0
        self._files, self._keep, self._max_bytes, self._quota = files, keep, max_bytes, quota
        self._reader = LineReader("dataset")
        self._digest = hashlib.sha256()
        self._parts = (*folder(tenant), f"{UPLOAD}{secrets.token_hex(16)}")
        self._lock = Lock()
        self._descriptor: int | None = files.create(*self._parts)

    @property
    def lines(self) -> int:
        """Examples so far."""
        return self._reader.examples

    def write(self, chunk: bytes) -> None:
        """Take the next bytes, cut anywhere.

        Raises InvalidData for a bad line that ends in them, DatasetTooLarge, QuotaExceeded for more than all that the
        tenant or key may have, DiskFull, DatasetsUnavailable; each ends the upload.
        """
        with self._lock:
            descriptor = self._open()
            try:
                self.bytes += len(chunk)
                if self.bytes > self._max_bytes:
                    raise DatasetTooLarge(
                        f"dataset: expected at most {self._max_bytes} bytes, got more", limit_bytes=self._max_bytes
                    )
                self._quota.check(self.bytes)
                for _ in self._reader.feed(chunk):
                    pass
                self._digest.update(chunk)
                with self._named_errors():
                    write_all(descriptor, chunk)
            except BaseException:
                self._discard()
                raise

    def finish(self) -> DatasetInfo:
        """Make the upload a dataset that survives a power cut, or return the dataset that already has this content.

        Raises as ``write`` does, and InvalidData if there was no line.
        """
        with self._lock:
            descriptor = self._open()
            try:
                for _ in self._reader.finish():
                    pass
                with self._named_errors():
                    os.fsync(descriptor)
                return self._keep(self._parts, f"sha256:{self._digest.hexdigest()}", self.lines, self.bytes)
            finally:
                self._discard()

    def abort(self) -> None:
        """Forget everything. Does nothing after ``finish``, or twice."""
        with self._lock:
            self._discard()

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn errors into named ones as ``Files`` does, for a file that is open."""
        try:
            yield
        except OSError as error:
            message = f"cannot write {'/'.join(self._parts)}: {error.strerror or type(error).__name__}"
            raise self._files.failed(message, error) from error

    def _open(self) -> int:
        if self._descriptor is None:
            raise ValueError("the upload has ended")
        return self._descriptor

    def _discard(self) -> None:
        """Close the file, and remove it unless it was moved to its place. If that fails, a later sweep removes it."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
            with suppress(PrefixdError):
                self._files.remove(*self._parts)
