"""Compiled kernels are kept on disk, in a folder of their own for each content of their sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from server.engine.kernels.numba import jit


def test_a_change_in_any_kernel_file_gives_another_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba would go on running the old code of a function that another file's kernel calls."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    copy = tmp_path / "sources"
    shutil.copytree(Path(jit.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    folder = jit.cache_folder()
    assert folder is not None and folder == jit.cache_folder(copy)
    for name in ("attention", "jit", "linear", "math", "norm", "pool", "tiles", "top"):
        source = copy / f"{name}.py"
        before = source.read_text()
        source.write_text(f"{before}\n# changed\n")
        assert jit.cache_folder(copy) not in (None, folder), name
        source.write_text(before)


def test_where_the_folder_cannot_be_made_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert jit.cache_folder() is None
