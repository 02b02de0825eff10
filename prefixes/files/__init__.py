"""Files and folders that appear at a path whole or not at all; the way there is ``prefixes.files.folder``.

Owns what a writer does that has a path. The folder of the path is opened once, and all is done in what was opened, but
for the last step: it names the path again. So a writer whose folder was moved away meanwhile, however long it was
stopped, gets FileNotFoundError and has changed nothing where the folder is now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from prefixes.files.folder import Folder, LeadsElsewhere

_MODE: Final = 0o644


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """``content`` to ``path``, whatever is there, readable for all; not ``durable`` is what a power cut may take.

    FileNotFoundError where the folder is not there: a run whose folder was taken away must not make it anew.
    """
    with (
        _named(path),
        Folder.at(path.parent, durable=durable) as folder,
        folder.temporary(content, mode=_MODE) as temporary,
    ):
        os.replace(temporary, path, src_dir_fd=folder.descriptor)
        folder.sync()


def write_text(path: Path, text: str) -> None:
    """``text`` as UTF-8 to ``path``, as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any, *, durable: bool = True) -> None:
    """``document`` as indented JSON, as ``write_bytes`` does."""
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(), durable=durable)


def write_new(path: Path, content: bytes) -> None:
    """``content`` to ``path``, with the umask's mode. FileExistsError where something is there, which stays."""
    with _named(path), Folder.at(path.parent) as folder, folder.temporary(content) as temporary:
        os.link(temporary, path, src_dir_fd=folder.descriptor)  # unlike a rename, it fails where the file exists
        folder.sync()


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """A folder with ``files`` at ``path``, readable for all; missing ones above it are made.

    FileExistsError for a file, a link, or a folder with something in it.
    """
    path = path.absolute()
    with _named(path), Folder.at(path.parent, make=0o777) as parent:
        _check_free(path, parent)
        with parent.temporary_folder(files, mode=0o755) as temporary:
            os.replace(temporary, path, src_dir_fd=parent.descriptor)
            parent.sync()


def sync_folder(path: Path) -> None:
    """Make the names in the folder survive a power cut."""
    with Folder.at(path) as folder:
        folder.sync()


def _check_free(path: Path, parent: Folder) -> None:
    try:
        with parent.folder(path.name) as folder:
            if not folder.entries():
                return
    except FileNotFoundError:
        return
    except (NotADirectoryError, LeadsElsewhere):
        pass
    raise FileExistsError(f"{path}: expected a new or empty folder")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's errors name ``path``, and not what stands beside it for a moment."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
