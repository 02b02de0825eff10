"""A job publishes with the rights that its submitter's key has when it publishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prefixes.errors import TaskNotFound
from prefixes.registry import open_registry
from prefixes.spec import TaskRef
from prefixes.tenancy.directory import Directory
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.model import Key
from server.web.errors import Forbidden
from trainer.jobs.job import claimed, failed, new_job, retried
from trainer.jobs.record import Failure
from trainer.service.rights import check_rights

OWN = TaskRef.parse("acme/e2e")
SPEC = {"task": "acme/e2e", "alias": "production"}


@pytest.fixture
def keyring(tmp_path: Path) -> Iterator[Keyring]:
    with closing(open_registry(str(tmp_path / "registry"))) as registry:
        yield Keyring(registry.tenancy, 60)


@pytest.fixture
def directory(keyring: Keyring) -> Directory:
    return Directory(keyring._store)


@pytest.fixture
def key(directory: Directory) -> Key:
    return directory.create_key("acme", "ci", ["train", "publish"], actor="t").key


def check(keyring: Keyring, key_id: str | None, task: TaskRef = OWN) -> None:
    check_rights(keyring, new_job("acme", "me", SPEC, key_id).job, task)


def test_a_working_key_publishes_a_rotated_one_too(keyring: Keyring, directory: Directory, key: Key) -> None:
    check(keyring, key.id)
    directory.rotate(key.id, grace_s=0, actor="t")
    check(keyring, key.id)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda directory, key: directory.revoke(key.id, actor="t"), "works no more"),
        (lambda directory, key: directory.block("acme", True, actor="t"), "blocked"),
    ],
)
def test_a_revoked_key_and_a_blocked_tenant_publish_nothing(
    keyring: Keyring, directory: Directory, key: Key, spoil: Callable[[Directory, Key], object], told: str
) -> None:
    spoil(directory, key)
    with pytest.raises(Forbidden, match=told):
        check(keyring, key.id)


def test_a_key_that_may_not_publish_there_does_not(keyring: Keyring, directory: Directory, key: Key) -> None:
    trains = directory.create_key("acme", "trains", ["train"], actor="t").key
    with pytest.raises(Forbidden, match="scope publish"):
        check(keyring, trains.id)
    with pytest.raises(TaskNotFound):
        check(keyring, key.id, TaskRef.parse("globex/e2e"))


def test_a_job_without_a_key_publishes_while_none_is_needed(keyring: Keyring, directory: Directory) -> None:
    check(keyring, None)
    directory.create_key("acme", "ci", ["publish"], actor="t")
    with pytest.raises(Forbidden, match="without a key"):
        check(keyring, None)


def test_a_retry_takes_over_the_rights_of_whoever_asks_for_it() -> None:
    job = claimed(new_job("acme", "first", SPEC, "A" * 12).job, 1, "w").job
    again = retried(failed(job, 1, Failure("forbidden", "no")).job, "second", "B" * 12).job
    assert (again.actor, again.key_id) == ("second", "B" * 12)
