"""What every store promises of publishing, references, aliases and names; see ``conftest.py`` for the stores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefixes.errors import Conflict, InvalidArtifact, InvalidName, RegistryUnavailable, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import Registry, Store
from prefixes.registry.limits import REPLACED_BYTES, REPLACED_KEPT
from prefixes.spec import TaskRef
from tests.support.redis_registry import DATA, PREFIXES, VERSIONS, publish, resolve


def test_a_published_prefix_is_resolved_fetched_and_listed(registry: Registry) -> None:
    info = registry.publish("acme", "e2e", DATA[0], record={"bleu": 68.2, "by": "ci"})
    assert (info.version, info.size, info.spec) == (VERSIONS[0], len(DATA[0]), PREFIXES[0].spec)
    resolved = registry.resolve(TaskRef.parse("acme/e2e"))
    assert (resolved.tenant, resolved.name, resolved.version) == ("acme", "e2e", VERSIONS[0])
    assert resolved.spec == PREFIXES[0].spec
    assert registry.fetch("acme", VERSIONS[0]) == DATA[0]
    (task,) = registry.tasks()
    assert task == registry.inspect("acme", "e2e")
    assert task.aliases == {"production": VERSIONS[0]}
    assert task.versions == (info,)
    assert info.record == {"bleu": 68.2, "by": "ci"}
    assert info.published_at.endswith("Z")


def test_another_handle_sees_every_change_at_once(registry: Registry, url: str) -> None:
    other = open_registry(url)
    publish(registry, 0, 1)
    assert resolve(other, "e2e") == 1
    registry.promote("default", "e2e", VERSIONS[0])
    assert resolve(other, "e2e") == 0
    other.rollback("default", "e2e")
    assert resolve(registry, "e2e") == 1
    other.delete("default", "e2e")
    with pytest.raises(TaskNotFound):
        registry.inspect("default", "e2e")


def test_references_by_alias_and_by_version(registry: Registry) -> None:
    publish(registry, 0)
    publish(registry, 1, alias="canary")
    publish(registry, 2, alias=None)
    assert resolve(registry, "e2e") == 0
    assert resolve(registry, "default/e2e@canary") == 1
    assert resolve(registry, f"e2e@{VERSIONS[2]}") == 2
    assert set(registry.inspect("default", "e2e").aliases) == {"production", "canary"}
    assert [info.version for info in registry.inspect("default", "e2e").versions] == VERSIONS[2::-1]


@pytest.mark.parametrize("ref", ["nothing", "acme/e2e", "e2e@canary", f"e2e@{VERSIONS[3]}"])
def test_unknown_tasks_tenants_aliases_and_versions_are_not_found(registry: Registry, ref: str) -> None:
    publish(registry, 0)
    publish(registry, 3, name="other")
    with pytest.raises(TaskNotFound):
        registry.resolve(TaskRef.parse(ref))


def test_publishing_the_same_content_twice_is_one_version(registry: Registry) -> None:
    first = registry.publish("default", "e2e", DATA[0], record={"loss": 1.5})
    publish(registry, 1)
    again = registry.publish("default", "e2e", DATA[0], record={"bleu": 68.0})
    task = registry.inspect("default", "e2e")
    assert len(task.versions) == 2
    assert again.published_at == first.published_at
    assert again.record == {"loss": 1.5, "bleu": 68.0}
    assert task.aliases["production"] == VERSIONS[0]
    publish(registry, 0)
    assert len(registry.inspect("default", "e2e").history["production"]) == 3


def test_a_later_publish_of_a_version_loses_nothing_of_its_record(registry: Registry, url: str) -> None:
    """It overwrote who had trained it, and when, with whatever it brought."""
    first = registry.publish("default", "e2e", DATA[0], record={"who": "ci", "scores": {"loss": 1.5}})
    assert first.replaced == ()
    later = {"who": "eve", "scores": {"loss": 1.5}, "job": "job-2"}
    again = registry.publish("default", "e2e", DATA[0], alias=None, record=later)
    assert again.record == later
    assert [(entry.name, entry.value) for entry in again.replaced] == [("who", "ci")]
    assert again.replaced[0].at >= again.published_at == first.published_at
    same = registry.publish("default", "e2e", DATA[0], alias=None, record=later)
    assert same == again, "the same record once more adds nothing"
    registry.publish("default", "e2e", DATA[0], alias=None, record={"scores": {}})
    for handle in (registry, open_registry(url)):
        (info,) = handle.inspect("default", "e2e").versions
        assert info.record == {**later, "scores": {}}
        assert [(entry.name, entry.value) for entry in info.replaced] == [("who", "ci"), ("scores", {"loss": 1.5})]
    registry.delete("default", "e2e")
    assert registry.undelete("default", "e2e").versions == (info,)


def test_what_a_version_keeps_of_replaced_entries_is_bounded_and_the_oldest_stay(registry: Registry) -> None:
    """However often it is published again, and with whatever, every reader of the task reads so much more at most."""
    for number in range(REPLACED_KEPT + 5):
        info = registry.publish("default", "count", DATA[0], record={"number": number})
    assert info.record == {"number": REPLACED_KEPT + 4}
    assert [entry.value for entry in info.replaced] == list(range(REPLACED_KEPT))
    large = "x" * (REPLACED_BYTES // 2)
    for number in range(4):
        info = registry.publish("default", "bytes", DATA[0], record={"text": f"{number}{large}", "number": number})
    assert [entry.value for entry in info.replaced if entry.name == "text"] == [f"0{large}"]
    assert [entry.value for entry in info.replaced if entry.name == "number"] == [0, 1, 2]


def test_history_tells_every_move(registry: Registry) -> None:
    publish(registry, 0, 1)
    registry.promote("default", "e2e", VERSIONS[0])
    task = registry.rollback("default", "e2e")
    history = task.history["production"]
    assert [(VERSIONS.index(entry.version), entry.action) for entry in history] == [
        (0, "publish"),
        (1, "publish"),
        (0, "promote"),
        (1, "rollback"),
    ]
    assert sorted(entry.at for entry in history) == [entry.at for entry in history]
    assert task == registry.inspect("default", "e2e")


def test_rolling_back_twice_goes_two_versions_back(registry: Registry) -> None:
    """A rollback to the previous *entry* would go to and fro between the last two."""
    publish(registry, 0, 1, 2)
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[1]
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]
    with pytest.raises(Conflict, match="expected an earlier version"):
        registry.rollback("default", "e2e")
    assert resolve(registry, "e2e") == 0
    publish(registry, 3)
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]
    registry.promote("default", "e2e", VERSIONS[2])
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]


def test_a_rollback_that_was_made_already_is_recognised_by_the_version_that_was_expected(registry: Registry) -> None:
    """Repeated after a lost answer it went two versions back."""
    publish(registry, 0, 1, 2)
    task = registry.rollback("default", "e2e", expected_current=VERSIONS[2])
    assert task.aliases["production"] == VERSIONS[1]
    with pytest.raises(Conflict, match=f"rollback of .* expected it at {VERSIONS[2]}, got {VERSIONS[1]}") as caught:
        registry.rollback("default", "e2e", expected_current=VERSIONS[2])
    assert caught.value.detail == {"expected": VERSIONS[2], "got": VERSIONS[1]}
    assert registry.inspect("default", "e2e") == task
    registry.rollback("default", "e2e", expected_current=VERSIONS[1])
    with pytest.raises(Conflict, match="expected an earlier version"):
        registry.rollback("default", "e2e", expected_current=VERSIONS[0])
    with pytest.raises(TaskNotFound, match="alias 'nightly'"):
        registry.rollback("default", "e2e", alias="nightly", expected_current=VERSIONS[0])


def test_promoting_where_it_already_points_is_no_move(registry: Registry) -> None:
    publish(registry, 0, 1)
    task = registry.promote("default", "e2e", VERSIONS[1])
    assert len(task.history["production"]) == 2
    assert registry.rollback("default", "e2e").aliases["production"] == VERSIONS[0]


def test_promote_compares_before_it_sets(registry: Registry) -> None:
    publish(registry, 0, 1)
    with pytest.raises(Conflict, match=f"expected it at {VERSIONS[0]}, got {VERSIONS[1]}"):
        registry.promote("default", "e2e", VERSIONS[0], expected_current=VERSIONS[0])
    registry.promote("default", "e2e", VERSIONS[0], expected_current=VERSIONS[1])
    assert resolve(registry, "e2e") == 0
    with pytest.raises(Conflict, match="got no such alias"):
        registry.promote("default", "e2e", VERSIONS[0], alias="canary", expected_current=VERSIONS[0])


def test_promote_makes_an_alias_of_its_own(registry: Registry) -> None:
    publish(registry, 0, 1)
    registry.promote("default", "e2e", VERSIONS[0], alias="stable")
    assert (resolve(registry, "e2e@stable"), resolve(registry, "e2e")) == (0, 1)
    with pytest.raises(Conflict):
        registry.rollback("default", "e2e", alias="stable")
    with pytest.raises(TaskNotFound, match="alias 'nightly'"):
        registry.rollback("default", "e2e", alias="nightly")


def test_promote_of_an_unknown_version_or_task_is_not_found(registry: Registry) -> None:
    publish(registry, 0)
    publish(registry, 1, name="other")
    with pytest.raises(TaskNotFound, match=VERSIONS[1]):
        registry.promote("default", "e2e", VERSIONS[1])
    with pytest.raises(TaskNotFound):
        registry.promote("default", "nothing", VERSIONS[0])
    with pytest.raises(TaskNotFound):
        registry.rollback("default", "nothing")


def test_a_tenant_reaches_only_its_own_digests(registry: Registry) -> None:
    publish(registry, 0, tenant="acme")
    publish(registry, 1, tenant="globex")
    assert registry.fetch("acme", VERSIONS[0]) == DATA[0]
    for tenant, version in (("globex", VERSIONS[0]), ("acme", VERSIONS[1]), ("nobody", VERSIONS[0])):
        with pytest.raises(TaskNotFound):
            registry.fetch(tenant, version)
        with pytest.raises(TaskNotFound):
            registry.resolve(TaskRef(tenant, "e2e", None, version))
        with pytest.raises(TaskNotFound):
            registry.promote(tenant, "e2e", version)
    assert [task.tenant for task in registry.tasks("acme")] == ["acme"]
    assert registry.tasks("nobody") == []


def test_a_registry_is_told_from_every_other_by_its_id(registry: Store, url: str) -> None:
    assert open_registry(url, registry_id=registry.id).id == registry.id
    with pytest.raises(RegistryUnavailable, match=f"expected another, got {registry.id}"):
        open_registry(url, registry_id="another")


def test_tasks_are_sorted_by_tenant_and_name(registry: Registry) -> None:
    for tenant, name in (("b", "x"), ("a", "y"), ("a", "x-1"), ("a", "x"), ("a", "x.json")):
        publish(registry, 0, tenant=tenant, name=name)
    found = [(task.tenant, task.name) for task in registry.tasks()]
    assert found == [("a", "x"), ("a", "x-1"), ("a", "x.json"), ("a", "y"), ("b", "x")]


@pytest.mark.parametrize("data", [b"", b"junk", DATA[0][:-1], DATA[0] + b"\0"])
def test_bad_artifacts_are_refused_and_leave_nothing(registry: Registry, data: bytes) -> None:
    with pytest.raises(InvalidArtifact):
        registry.publish("default", "e2e", data, record={})
    assert registry.tasks() == []


def test_a_record_that_is_no_json_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidArtifact, match=r"record\.loss: expected a finite number"):
        registry.publish("default", "e2e", DATA[0], record={"loss": float("nan")})
    assert registry.tasks() == []


PATH_TRICKS = ["", ".", "..", "a/b", "../a", "/etc", "a\\b", ".a", "a..b", "a\0", "~a", "-a", "x" * 65, "x" * 100_000]
LOOK_ALIKES = ["A", "é", "аcme", "ａcme", "acme\u200b", "acme\u202e", "\u212aelvin", "a\u0301", "ﬁ", "٣", "a\n", "a b"]
SYNTAX = ["a:b", "{a}", "a}b", "a*", "a?", "a[b]", "a@b", "a%2fb", "$a", "a\r\nDEL b"]  # of Redis, a URL or a shell
BAD_NAMES = [*PATH_TRICKS, *LOOK_ALIKES, *SYNTAX]


@pytest.mark.parametrize("bad", BAD_NAMES, ids=ascii)
def test_no_name_leads_anywhere_else(registry: Registry, bad: str) -> None:
    publish(registry, 0)
    calls: list[Callable[[], object]] = [
        lambda: registry.publish(bad, "e2e", DATA[0], record={}),
        lambda: registry.publish("default", bad, DATA[0], record={}),
        lambda: registry.publish("default", "e2e", DATA[0], record={}, alias=bad),
        lambda: registry.promote("default", "e2e", VERSIONS[0], alias=bad),
        lambda: registry.promote("default", "e2e", bad),
        lambda: registry.rollback(bad, "e2e"),
        lambda: registry.delete(bad, "e2e"),
        lambda: registry.delete("default", bad),
        lambda: registry.inspect("default", bad),
        lambda: registry.tasks(bad),
        lambda: registry.fetch(bad, VERSIONS[0]),
        lambda: registry.fetch("default", bad),
        lambda: registry.resolve(TaskRef(bad, "e2e")),
    ]
    for call in calls:
        with pytest.raises(InvalidName):
            call()


def test_a_healthy_registry_checks_and_closes(registry: Registry) -> None:
    publish(registry, 0)
    registry.check()
    registry.close()


@pytest.mark.parametrize(
    "bad", ["redis://:secret@a,b/0", "redis://:secret@h?db=1", "https://h/r", "s3:bucket", "disk://host/path", ""]
)
def test_urls_of_other_stores_are_named_errors_without_their_secrets(bad: str) -> None:
    with pytest.raises(RegistryUnavailable, match="registry URL: expected") as caught:
        open_registry(bad)
    assert "secret" not in caught.value.message
