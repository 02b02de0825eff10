"""``/prefixes``: what is refused at the door, deleted tasks come back, the audit tells who asked for every change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import version_of, write_prefix
from prefixes.errors import RegistryUnavailable
from prefixes.spec import Positions
from tests.support.apps import Served, with_apps
from tests.support.prefixes import make_prefix


def test_a_deleted_task_is_brought_back_by_either_path(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        client, body = served.public, {"task": "e2e", "input": "name", "parameters": {"max_new_tokens": 1}}
        before = (await client.get("/prefixes/e2e")).json()
        for path in ("/prefixes/e2e/undelete", "/prefixes/default/e2e/undelete"):
            assert (await client.post("/generate", json=body)).status_code == 200
            assert (await client.delete("/prefixes/e2e")).status_code == 204
            assert (await client.post("/generate", json=body)).status_code == 404
            back = await client.post(path)
            assert (back.status_code, back.json()) == (200, before)
            assert (await client.post("/generate", json=body)).json()["version"] == before["aliases"]["production"]
        again = await client.post("/prefixes/e2e/undelete")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
        for path, status, code in (
            ("/prefixes/nothing/undelete", 404, "task_not_found"),
            ("/prefixes/acme/e2e/undelete", 404, "task_not_found"),
            ("/prefixes/Bad%20Name/undelete", 422, "invalid_name"),
        ):
            refused = await client.post(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)

    with_apps(tmp_path, test)


def test_a_version_is_deleted_by_either_path_but_not_under_an_alias(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        client = served.public
        first = (await client.get("/prefixes/e2e")).json()["aliases"]["production"]
        for path in ("/prefixes/e2e", "/prefixes/default/e2e"):
            prefix = make_prefix(served.assembled.backbone.spec, seed=1)
            second = version_of(prefix)
            fields, file = {"task": "e2e", "alias": ""}, ("x", write_prefix(prefix))
            assert (await client.post("/prefixes", data=fields, files={"file": file})).status_code == 201
            body = {"task": f"e2e@{second}", "input": "name", "parameters": {"max_new_tokens": 1}}
            assert (await client.post("/generate", json=body)).status_code == 200
            assert (await client.delete(f"{path}/versions/{second}")).status_code == 204
            assert (await client.post("/generate", json=body)).status_code == 404
            for version, status, code in (
                (second, 404, "task_not_found"), (first, 409, "conflict"), ("production", 422, "invalid_name"),
            ):  # fmt: skip
                refused = await client.delete(f"{path}/versions/{version}")
                assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert [info["version"] for info in (await client.get("/prefixes/e2e")).json()["versions"]] == [first]

    with_apps(tmp_path, test)


def test_the_audit_names_the_caller_of_every_change(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        client, registry = served.public, served.assembled.link.registry
        second = make_prefix(served.assembled.backbone.spec, seed=1)
        first = (await client.get("/prefixes/e2e")).json()["aliases"]["production"]
        answers = [
            await client.post("/prefixes", data={"task": "e2e"}, files={"file": ("x", write_prefix(second))}),
            await client.post("/prefixes/e2e/promote", json={"version": first}),
            await client.post("/prefixes/e2e/rollback"),
            await client.delete("/prefixes/e2e"),
            await client.post("/prefixes/e2e/undelete"),
        ]
        assert [answer.status_code for answer in answers] == [201, 200, 200, 204, 200]
        entries = registry.audit("default", limit=5)
        assert [(entry.actor, entry.action) for entry in reversed(entries)] == [
            (f"tenant:default/request:{answer.headers['x-request-id']}", action)
            for answer, action in zip(answers, ("publish", "promote", "rollback", "delete", "undelete"), strict=True)
        ]
        assert entries[0].new == version_of(second)

    with_apps(tmp_path, test)


def test_a_rollback_whose_answer_was_lost_can_be_repeated(tmp_path: Path) -> None:
    """A client that came back after ``Retry-After`` rolled back twice."""

    async def test(served: Served) -> None:
        client, registry = served.public, served.assembled.link.registry
        first = (await client.get("/prefixes/e2e")).json()["aliases"]["production"]
        versions = [first]
        for seed in (1, 2):
            prefix = make_prefix(served.assembled.backbone.spec, seed=seed)
            versions.append(registry.publish("default", "e2e", write_prefix(prefix), record={}).version)
        made = type(registry).rollback

        def lost(*arguments: Any, **options: Any) -> None:
            made(registry, *arguments, **options)
            raise RegistryUnavailable("registry: it did not answer in time")

        registry.rollback = lost  # type: ignore[assignment]
        body = {"expected_current": versions[2]}
        answer = await client.post("/prefixes/e2e/rollback", json=body)
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
        del registry.rollback
        again = await client.post("/prefixes/e2e/rollback", json=body)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
        assert again.json()["error"]["detail"] == {"expected": versions[2], "got": versions[1]}
        assert (await client.get("/prefixes/e2e")).json()["aliases"]["production"] == versions[1]
        back = await client.post("/prefixes/default/e2e/rollback", json={"expected_current": versions[1]})
        assert (back.status_code, back.json()["aliases"]["production"]) == (200, first)

    with_apps(tmp_path, test)


def test_one_tenants_damaged_index_is_nobody_elses_outage_and_tells_nothing_of_it(tmp_path: Path) -> None:
    """What was wrong with it was quoted to every caller once, records and all."""

    async def test(served: Served) -> None:
        served.assembled.link.registry.publish("acme", "secret-plan", served.data, record={"who": "acme"})
        index = tmp_path / "registry/tenants/acme/tasks/secret-plan.json"
        index.write_text(index.read_text().replace('"size": ', '"size": -0.5'))
        for path in ("/prefixes", "/v1/models"):
            response = await served.public.get(path)
            assert response.status_code == 200
            assert "e2e" in response.text
            assert "acme" not in response.text
        damaged = await served.public.get("/prefixes/acme/secret-plan")
        assert damaged.status_code == 503
        assert "who" not in damaged.text
        own = tmp_path / "registry/tenants/default/tasks/e2e.json"
        own.write_text("{}")
        assert (await served.public.get("/prefixes")).status_code == 503

    with_apps(tmp_path, test)


def test_an_upload_that_is_repeated_with_its_key_changes_nothing_and_answers_the_same_version(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        client = served.public
        first = (await client.get("/prefixes/e2e")).json()["aliases"]["production"]
        data = write_prefix(make_prefix(served.assembled.backbone.spec, seed=1))
        form = {"task": "e2e", "once": "job-1"}
        made = await client.post("/prefixes", data=form, files={"file": ("x", data)})
        assert (made.status_code, made.json()["aliases"]) == (201, {"production": made.json()["version"]})
        await client.post("/prefixes/e2e/rollback")
        task = (await client.get("/prefixes/e2e")).json()
        assert task["once"] == [{"key": "job-1", "version": made.json()["version"]}]
        for file in (data, served.data, b"junk"):
            again = await client.post("/prefixes", data={**form, "record": '{"late": 1}'}, files={"file": ("x", file)})
            assert (again.status_code, again.json()) == (201, {**made.json(), "aliases": {"production": first}})
            assert (await client.get("/prefixes/e2e")).json() == task
        for once in ("", "No Key", "x" * 65):
            refused = await client.post("/prefixes", data={**form, "once": once}, files={"file": ("x", data)})
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_name")
            assert "publish key" in refused.json()["error"]["message"]
        refused = await client.post("/prefixes", data={**form, "once": ["a", "b"]}, files={"file": ("x", data)})
        assert "once: expected once, got 2 times" in refused.json()["error"]["message"]
        await client.delete("/prefixes/e2e")
        refused = await client.post("/prefixes", data=form, files={"file": ("x", data)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert (await client.get("/prefixes/e2e")).status_code == 404

    with_apps(tmp_path, test)


def test_an_upload_that_names_what_its_alias_points_at_is_refused_where_it_points_elsewhere(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        client = served.public
        first = (await client.get("/prefixes/e2e")).json()["aliases"]["production"]
        data = write_prefix(make_prefix(served.assembled.backbone.spec, seed=1))

        async def upload(**fields: str) -> Any:
            return await client.post("/prefixes", data={"task": "e2e", **fields}, files={"file": ("x", data)})

        for expected in ("", f"sha256:{'0' * 64}"):
            refused = await upload(expected_current=expected)
            assert (refused.status_code, refused.json()["error"]["detail"]["got"]) == (409, first)
        assert (await upload(expected_current="new")).status_code == 422
        assert (await upload(note="\x1b[2J")).status_code == 422
        made = await upload(expected_current=first, note="gate promoted")
        assert made.json()["aliases"] == {"production": made.json()["version"]}
        assert (await client.get("/audit")).json()["entries"][0]["note"] == "gate promoted"

    with_apps(tmp_path, test)


@pytest.mark.parametrize("record", ['{"who": "a", "who": "b"}', '{"loss": NaN}', "[" * 100_000, "[]", "{"])
def test_a_record_that_is_not_plain_json_is_refused(tmp_path: Path, record: str) -> None:
    async def test(served: Served) -> None:
        data = write_prefix(make_prefix(served.assembled.backbone.spec, seed=1))
        form = {"task": "e2e", "record": record}
        refused = await served.public.post("/prefixes", data=form, files={"file": ("x", data)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request")
        assert "record: expected a JSON object" in refused.json()["error"]["message"]

    with_apps(tmp_path, test)


BLOCK = 8192
"""Bytes of 16 positions of the tiny GPT-2. Its window has 64."""


@pytest.mark.parametrize(
    ("settings", "length", "positions", "problem", "detail"),
    [
        ({"max_prefix_bytes": 4 * BLOCK}, 64, "unshifted", "at most 4 blocks (max_prefix_bytes)", (4, 5)),
        ({"preempted_prefix_bytes": 4 * BLOCK}, 64, "unshifted", "at most 4 blocks (preempted_prefix_bytes)", (4, 5)),
        ({"kv_cache_bytes": 20 * BLOCK}, 18 * 16, "unshifted", "there are 19 (kv_cache_bytes)", (19, 20)),
        ({}, 62, "shifted", "at most 0 tokens (a window of 64, less 63 of the prefix and one to generate)", (0, 1)),
    ],
    ids=["max_prefix_bytes", "preempted_prefix_bytes", "kv_cache_bytes", "window"],
)
def test_a_prefix_with_which_no_request_fits_is_refused_at_the_door(
    tmp_path: Path, settings: dict[str, Any], length: int, positions: Positions, problem: str, detail: tuple[int, int]
) -> None:
    """Each was accepted once, and then failed every request. The largest that serves is one position shorter."""

    async def test(served: Served) -> None:
        client, spec = served.public, served.assembled.backbone.spec
        largest, larger = (
            write_prefix(make_prefix(spec, length=at, positions=positions)) for at in (length, length + 1)
        )
        refused = await client.post("/prefixes", data={"task": "large"}, files={"file": ("x", larger)})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (422, "invalid_artifact")
        assert problem in error["message"]
        assert error["detail"] == {"expected": detail[0], "got": detail[1]}
        assert (await client.get("/prefixes/large")).status_code == 404
        assert len(list((tmp_path / "registry/tenants/default/blobs").iterdir())) == 1, "only that of e2e"
        taken = await client.post("/prefixes", data={"task": "large"}, files={"file": ("x", largest)})
        assert taken.status_code == 201
        body = {"task": "large", "input": "a", "parameters": {"max_new_tokens": 1}}
        assert (await client.post("/generate", json=body)).status_code == 200

    with_apps(tmp_path, test, **settings)


@pytest.mark.parametrize(
    ("defaults", "outputs"),
    [({"num_beams": 4}, 1), ({"num_beams": 4, "num_return_sequences": 3}, 2),
     ({"do_sample": True, "num_return_sequences": 4}, 2)],
)  # fmt: skip
def test_defaults_that_ask_for_more_rows_than_there_are_are_cut(
    tmp_path: Path, defaults: dict[str, Any], outputs: int
) -> None:
    """They were accepted, and then failed every request that did not say otherwise."""

    async def test(served: Served) -> None:
        data = write_prefix(make_prefix(served.assembled.backbone.spec, seed=1, defaults=defaults))
        taken = await served.public.post("/prefixes", data={"task": "wide"}, files={"file": ("x", data)})
        assert taken.status_code == 201
        body = {"task": "wide", "input": "name", "parameters": {"max_new_tokens": 1}}
        answer = await served.public.post("/generate", json=body)
        assert (answer.status_code, len(answer.json().get("outputs", []))) == (200, outputs)
        refused = await served.public.post("/generate", json={**body, "parameters": {"num_beams": 3}})
        assert "num_beams: expected at most 2, this server's limit; got 3" in refused.json()["error"]["message"]

    with_apps(tmp_path, test, max_rows=2)


def test_a_template_that_leaves_no_room_for_an_input_is_refused_at_the_door(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        spec = served.assembled.backbone.spec
        data = write_prefix(make_prefix(spec, length=3, template="{input}" + "é" * 64))
        refused = await served.public.post("/prefixes", data={"task": "large"}, files={"file": ("x", data)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_artifact")
        assert refused.json()["error"]["detail"]["expected"] == 60
        assert (await served.public.get("/prefixes/large")).status_code == 404

    with_apps(tmp_path, test)
