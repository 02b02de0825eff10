"""DiskUsage: what tenants used, beside a registry in a folder.

    usage/<day>.json     the day's sums and the last batch of each writer, see ``prefixes.usage.records``

Owns these files. A batch is of one day, so that one file, put in place whole, has both its counts and its number.
Writers hold a lock of their own; readers hold none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prefixes.errors import InvalidParameter
from prefixes.registry.disk.files import Files
from prefixes.registry.identity import Mark
from prefixes.usage.model import Batch, DayOfUsage, Row, add_to, check_day, first_kept
from prefixes.usage.records import day_from_json, day_to_json

_FOLDER = "usage"


class DiskUsage:
    """See ``store.UsageStore``. ``mark`` reads and checks what the registry says of itself."""

    def __init__(self, files: Files, mark: Callable[[], Mark]) -> None:
        self._files, self._mark = files, mark

    def add(self, batch: Batch) -> bool:
        if batch.day < first_kept():
            return False
        self._mark()  # before the lock, whose folder is made: a registry that is gone leaves none
        with self._files.lock(_FOLDER):
            self._mark()
            before = self._read(batch.day)
            if before.batches.get(batch.writer, 0) >= batch.number:
                return False
            sums, rows = dict(before.counts), Counter(subject.tenant for subject in before.counts)
            for subject, counts in batch.counts.items():
                add_to(sums, rows, subject, counts)
            self._write(DayOfUsage(batch.day, {**before.batches, batch.writer: batch.number}, sums))
            if not before.batches:
                self._prune()
        return True

    def read(self, first: str, last: str, tenant: str | None = None) -> Iterator[Row]:
        for day in self.days():
            if first <= day <= last:
                for subject, counts in self._read(day).counts.items():
                    if tenant in (None, subject.tenant):
                        yield Row(day, subject, counts)
        self._mark()

    def days(self) -> list[str]:
        found, kept = self._stored(), first_kept()
        self._mark()
        return [day for day in found if day >= kept]

    def day(self, day: str) -> DayOfUsage:
        found = self._read(day)
        self._mark()
        return found

    def put(self, found: DayOfUsage) -> None:
        self._mark()
        with self._files.lock(_FOLDER):
            self._mark()
            self._write(found)

    def _read(self, day: str) -> DayOfUsage:
        try:
            return day_from_json(day, self._files.read(_FOLDER, f"{day}.json"))
        except FileNotFoundError:
            return DayOfUsage(day, {}, {})

    def _write(self, found: DayOfUsage) -> None:
        self._files.sweep(_FOLDER)
        self._files.write(day_to_json(found), _FOLDER, f"{found.day}.json")

    def _prune(self) -> None:
        kept = first_kept()
        for day in self._stored():
            if day < kept:
                self._files.remove(_FOLDER, f"{day}.json")

    def _stored(self) -> list[str]:
        names = [name.removesuffix(".json") for name in self._files.names(_FOLDER) if name.endswith(".json")]
        return [name for name in names if _is_day(name)]


def _is_day(name: str) -> bool:
    try:
        return bool(check_day("day", name))
    except InvalidParameter:
        return False
