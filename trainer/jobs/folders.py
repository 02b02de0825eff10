"""The folder in which a delivery of a job works, and the fence around it.

    <root>/tenants/<tenant>/jobs/<job id>/run-<token>/

A worker that takes a job over renames the earlier delivery's folder to its own, in one step of the file system. The
earlier worker, stopped or slow, then finds no folder at its path: the last step of every write names the whole path
(``prefixes.files``). Owns these names; does not know what is in a folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Final

from prefixes.files import sync_folder
from prefixes.spec import check_name
from trainer.jobs.errors import Fenced
from trainer.jobs.record import Job

_RUN: Final = re.compile(r"run-([1-9][0-9]{0,8})")


class JobFolders:
    """The folders under ``root``, which all workers share."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def of(self, job: Job) -> Path:
        """The job's folder; it need not exist."""
        return self._root / "tenants" / check_name("tenant", job.tenant) / "jobs" / job.id

    def enter(self, job: Job) -> Path:
        """The folder of the job's present delivery, with what the earlier one left in it. Raises Fenced, OSError."""
        folder = self.of(job)
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f"run-{job.token}"
        while True:
            newest = _newest(folder)
            if newest > job.token:
                raise Fenced(job.id, job.token, newest, job.state)
            if newest == job.token:
                return mine
            try:
                if newest:
                    (folder / f"run-{newest}").rename(mine)
                else:
                    mine.mkdir()
            except (FileNotFoundError, FileExistsError):
                continue  # another worker has just entered: look who
            sync_folder(folder)

    def result(self, job: Job) -> Path | None:
        """The last delivery's folder, or None if there is none."""
        newest = _newest(self.of(job))
        return self.of(job) / f"run-{newest}" if newest else None

    def remove_empty(self, job: Job) -> None:
        """Delete the folder that ``enter`` made, and the job's, if nothing is in them."""
        with contextlib.suppress(OSError):
            (self.of(job) / f"run-{job.token}").rmdir()
            self.of(job).rmdir()

    def remove(self, job: Job) -> None:
        """Delete everything of the job. A delivery that still runs finds nothing to write to."""
        folder = self.of(job)
        gone = folder.with_name(f".deleted-{folder.name}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _newest(folder: Path) -> int:
    """The highest token that has a folder; 0 for none."""
    with contextlib.suppress(FileNotFoundError):
        matches = (_RUN.fullmatch(entry.name) for entry in os.scandir(folder))
        return max((int(match[1]) for match in matches if match), default=0)
    return 0
