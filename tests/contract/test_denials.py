"""What every store promises of denials: a bounded number for each tenant, and apart from the others'."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from prefixes.errors import InvalidName, RegistryUnavailable
from prefixes.files.folder import TEMPORARY
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.tenancy.denial import DENIALS_KEPT, MAX_TEXT, Denial


def denial(number: int) -> Denial:
    at = f"2026-01-01T00:{number // 60:02}:{number % 60:02}.000Z"
    return Denial(at, "AAAAAAAAAAAA", "generate", "POST /generate", "acme/e2e", "no scope", f"r{number}")


def test_the_latest_are_kept_and_one_tenants_push_out_no_others(url: str, registry: Store) -> None:
    kept = registry.tenancy
    kept.note_denials("globex", [denial(0)])
    kept.note_denials(None, [replace(denial(1), key=None)])
    for begin in range(0, 3 * DENIALS_KEPT, 50):
        kept.note_denials("acme", [denial(number) for number in range(begin, begin + 50)])
    with closing(open_registry(url)) as again:
        found = again.tenancy.denials("acme")
        assert found == [denial(number) for number in reversed(range(2 * DENIALS_KEPT, 3 * DENIALS_KEPT))]
        assert again.tenancy.denials("globex") == [denial(0)]
        assert again.tenancy.denials(None) == [replace(denial(1), key=None)]
        assert again.tenancy.denials("unknown") == again.tenancy.denials("initech") == []
        assert again.tenants() == []


def test_a_callers_text_is_cut_and_stays_one_record(registry: Store) -> None:
    for text in ("x" * 5000, 'a"\n\r\u2028b', "ü\x00"):
        registry.tenancy.note_denials("acme", [replace(denial(0), reason=text)])
        assert registry.tenancy.denials("acme")[0].reason == text[:MAX_TEXT]
    assert len(registry.tenancy.denials("acme")) == 3


def test_no_name_leads_out_of_the_registry(registry: Store) -> None:
    with pytest.raises(InvalidName):
        registry.tenancy.note_denials("../x", [denial(0)])
    with pytest.raises(InvalidName):
        registry.tenancy.denials("a:b")


def test_a_registry_that_is_gone_keeps_nothing_and_is_not_made_anew(tmp_path: Path) -> None:
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        (tmp_path / "registry").rename(tmp_path / "away")
        for note in (
            lambda: registry.tenancy.note_denials("acme", [denial(0)]),
            lambda: registry.tenancy.note_used({"a": "2026-01-02T00:00:00.000Z"}),
            lambda: registry.tenancy.forget_used(["a"]),
            lambda: registry.tenancy.replace(b"{}", ""),
        ):
            with pytest.raises(RegistryUnavailable):
                note()
    assert not (tmp_path / "registry").exists()


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        registry.tenancy.note_denials("acme", [denial(0)])
        left = [folder / f"{TEMPORARY}x" for folder in (tmp_path / "registry", tmp_path / "registry/denials/tenants")]
        for file in left:
            file.touch()
        registry.tenancy.note_denials("acme", [denial(1)])
        registry.tenancy.note_used({"a": "2026-01-02T00:00:00.000Z"})
        assert not any(file.exists() for file in left)
