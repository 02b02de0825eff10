"""``/prefixes`` over a socket: upload, refuse, move, read back, delete; and what a running server does meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from prefixes.artifact import Prefix, write_prefix
from prefixes.registry import open_registry
from tests.support.prefixes import make_backbone_spec, make_prefix
from tests.support.server import LONG, ServerProcess, TinyWorld, events, upload


def ask(client: httpx.Client, task: str, tokens: int = 6) -> dict[str, Any]:
    parameters = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    response = client.post("/generate", json={"task": task, "input": "x", "parameters": parameters})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def listed(client: httpx.Client) -> dict[str, Any]:
    return {task["task"]: task for task in client.get("/prefixes").json()["prefixes"]}


def refusal(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.fixture
def running(server: ServerProcess) -> Iterator[Iterator[tuple[str, Any]]]:
    """A stream that keeps running for as long as the test does."""
    body = {"task": "dart", "input": "x", "parameters": LONG, "stream": True}
    with server.client() as other, other.stream("POST", "/generate", json=body) as response:
        tokens = events(response.iter_lines())
        next(tokens)
        yield tokens
        assert next(tokens)[0] == "token"


def test_an_upload_is_usable_at_once_under_load(
    client: httpx.Client, world: TinyWorld, running: Iterator[tuple[str, Any]]
) -> None:
    for number in range(5):
        task = f"fresh-{number}"
        response = upload(client, task, world.prefix(seed=100 + number), record=json.dumps({"bleu": number}))
        assert response.status_code == 201
        body = response.json()
        assert body == {
            "task": f"default/{task}", "version": body["version"], "aliases": {"production": body["version"]},
            "size": len(world.prefix(seed=100 + number)),
        }
        answer = ask(client, task)
        assert (answer["version"], answer["usage"]["prefix_tokens"]) == (body["version"], 5 * world.sites)
        entry = listed(client)[f"default/{task}"]
        assert entry == {
            "task": f"default/{task}", "aliases": {"production": body["version"]}, "version": body["version"],
            "versions": 1, "prefix_tokens": 5 * world.sites, "resident": True,
        }
        details = client.get(f"/prefixes/{task}").json()
        assert details["versions"][0]["record"] == {"bleu": number}
        assert details["versions"][0]["spec"]["sites"]["decoder"]["length"] == 5
        assert client.delete(f"/prefixes/{task}").status_code == 204


def test_versions_move_by_promote_and_rollback_and_come_back_byte_for_byte(
    client: httpx.Client, world: TinyWorld
) -> None:
    data = [world.prefix(seed=seed, length=length) for seed, length in ((1, 3), (2, 4))]
    first = upload(client, "moving", data[0]).json()["version"]
    second = upload(client, "moving", data[1], alias="staging").json()["version"]
    assert listed(client)["default/moving"]["aliases"] == {"production": first, "staging": second}
    assert ask(client, "moving")["version"] == first
    assert ask(client, "default/moving@staging")["version"] == second
    assert ask(client, f"moving@{second}")["version"] == second

    promoted = client.post("/prefixes/default/moving/promote", json={"version": second, "expected_current": first})
    assert promoted.json()["aliases"]["production"] == second
    assert ask(client, "moving")["version"] == second  # at once, in this process
    stale = client.post("/prefixes/moving/promote", json={"version": first, "expected_current": first})
    refusal(stale, 409, "conflict")

    assert client.post("/prefixes/moving/rollback", json={}).json()["aliases"]["production"] == first
    assert ask(client, "moving")["version"] == first
    history = client.get("/prefixes/default/moving").json()["history"]["production"]
    assert [(move["version"], move["action"]) for move in history] == [
        (first, "publish"), (second, "promote"), (first, "rollback"),
    ]
    for path in (f"/prefixes/moving/versions/{second}", "/prefixes/default/moving/versions/staging"):
        download = client.get(path)
        assert (download.content, download.headers["x-prefixd-version"]) == (data[1], second)

    assert client.delete("/prefixes/default/moving").status_code == 204
    assert "default/moving" not in listed(client)
    refusal(client.post("/generate", json={"task": "moving", "input": "x"}), 404, "task_not_found")
    refusal(client.get(f"/prefixes/moving/versions/{first}"), 404, "task_not_found")
    refusal(client.post("/prefixes/moving/rollback"), 404, "task_not_found")


def test_an_empty_alias_moves_none(client: httpx.Client, world: TinyWorld) -> None:
    body = upload(client, "unmoved", world.prefix(seed=3), alias="").json()
    assert body["aliases"] == {}
    assert listed(client)["default/unmoved"]["version"] is None
    refusal(client.post("/generate", json={"task": "unmoved", "input": "x"}), 404, "task_not_found")
    assert ask(client, f"unmoved@{body['version']}")["version"] == body["version"]
    client.delete("/prefixes/unmoved")


def test_a_promote_mid_stream_leaves_running_rows_alone(
    client: httpx.Client, server: ServerProcess, world: TinyWorld
) -> None:
    first = upload(client, "switched", world.prefix(seed=10, length=5)).json()["version"]
    tokens = 400
    alone = ask(client, "switched", tokens)
    parameters = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    body = {"task": "switched", "input": "x", "parameters": parameters, "stream": True}
    with server.client() as other, other.stream("POST", "/generate", json=body) as response:
        stream = events(response.iter_lines())
        next(stream)
        second = upload(client, "switched", world.prefix(seed=11, length=9)).json()["version"]
        new = ask(client, "switched", 3)
        *rest, (name, done) = stream
        assert len(rest) > 10  # it was running when the alias moved
    assert (new["version"], new["usage"]["prefix_tokens"]) == (second, 9 * world.sites)
    assert (name, done["version"]) == ("done", first)
    assert done["outputs"] == alone["outputs"]
    client.delete("/prefixes/switched")


def test_a_promote_by_another_process_is_seen_within_a_second(
    client: httpx.Client, world: TinyWorld, registry: Path
) -> None:
    versions = [upload(client, "elsewhere", world.prefix(seed=seed)).json()["version"] for seed in (20, 21)]
    assert ask(client, "elsewhere", 1)["version"] == versions[1]
    open_registry(str(registry)).promote("default", "elsewhere", versions[0])
    begun = time.monotonic()
    while ask(client, "elsewhere", 1)["version"] != versions[0]:
        assert time.monotonic() - begun < 1
    client.delete("/prefixes/elsewhere")


def foreign() -> bytes:
    data: bytes = save({"prefix": torch.zeros(2, 2)}, metadata={"format": "pt"})
    return data


def not_finite(world: TinyWorld) -> bytes:
    data = world.prefix(length=2)
    value = torch.tensor([float("nan")]).numpy().tobytes()
    return data[:-4] + value


def test_bytes_that_are_no_artifact_are_422_and_nothing_is_listed(client: httpx.Client, world: TinyWorld) -> None:
    good = world.prefix(length=2)
    bad = {
        "empty": b"", "short": good[:40], "truncated": good[:-4], "longer": good + b"\0", "foreign": foreign(),
        "nan": not_finite(world), "pickle": b"\x80\x04K\x01.", "text": b"hello" * 100,
    }
    before = listed(client)
    for name, data in bad.items():
        error = refusal(upload(client, f"bad-{name}", data), 422, "invalid_artifact")
        assert "expected" in error["message"], name
    assert "NaN or infinite" in refusal(upload(client, "nan", bad["nan"]), 422, "invalid_artifact")["message"]
    assert listed(client) == before
    assert ask(client, "e2e")["outputs"]


def test_a_prefix_for_another_backbone_is_409_with_expected_and_got(client: httpx.Client, world: TinyWorld) -> None:
    fingerprint = "sha256:" + "cd" * 32
    geometry = world.spec.sites["decoder"]
    same_shape = make_backbone_spec(
        layers=geometry.layers, kv_heads=geometry.kv_heads, head_dim=geometry.head_dim, fingerprint=fingerprint
    )
    other_shape = make_backbone_spec(layers=geometry.layers + 1, fingerprint=world.spec.fingerprint)
    before = listed(client)
    error = refusal(upload(client, "wrong", write_prefix(make_prefix(same_shape))), 409, "incompatible_prefix")
    assert error["detail"] == {"expected": world.spec.fingerprint, "got": fingerprint}
    error = refusal(upload(client, "wrong", write_prefix(make_prefix(other_shape))), 409, "incompatible_prefix")
    layers = (error["detail"]["expected"]["layers"], error["detail"]["got"]["layers"])
    assert layers == (geometry.layers, geometry.layers + 1)
    assert listed(client) == before


def test_defaults_that_cannot_decode_are_422(client: httpx.Client, world: TinyWorld) -> None:
    error = refusal(upload(client, "wrong", world.prefix(defaults={"top_p": 7.0})), 422, "invalid_artifact")
    assert error["message"].startswith("defaults: top_p: expected above 0, at most 1, got 7.0")


def test_an_artifacts_defaults_are_used_and_a_request_wins_over_them(client: httpx.Client, world: TinyWorld) -> None:
    upload(client, "brief", world.prefix(seed=30, defaults={"max_new_tokens": 4, "min_new_tokens": 4}))
    post = {"task": "brief", "input": "x"}
    assert client.post("/generate", json=post).json()["usage"]["output_tokens"] == 4
    answer = client.post("/generate", json={**post, "parameters": {"max_new_tokens": 2}}).json()
    assert answer["usage"]["output_tokens"] == 2
    client.delete("/prefixes/brief")


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_beyond_the_limit_is_413_and_nothing_is_listed(client: httpx.Client, chunked: bool) -> None:
    before = listed(client)
    if chunked:
        head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        pieces = (part for part in [head, *[b"\0" * 65536] * 64])
        headers = {"content-type": "multipart/form-data; boundary=x"}
        response = client.post("/prefixes", content=pieces, headers=headers)
    else:
        response = upload(client, "huge", b"\0" * (4 << 20))
    refusal(response, 413, "body_too_large")
    assert listed(client) == before


def test_forms_that_are_no_upload_are_refused_by_field(client: httpx.Client, world: TinyWorld) -> None:
    data = world.prefix(length=1)
    file = {"file": ("x", data)}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"data": {"task": "t"}, "files": {"flie": ("x", data)}}, "invalid_request", "flie: unknown field; did you"),
        ({"data": {"task": "t"}, "files": {"record": ("x", b"{}")}}, "invalid_request", "file: expected"),
        ({"files": file}, "invalid_request", "task: expected text, got nothing"),
        ({"data": {"task": "t@staging"}, "files": file}, "invalid_request", "task: expected"),
        ({"data": {"task": "../t"}, "files": file}, "invalid_name", "tenant name"),
        ({"data": {"task": "t", "alias": "a/b"}, "files": file}, "invalid_name", "alias name"),
        ({"data": {"task": "t", "record": "[1]"}, "files": file}, "invalid_request", "record: expected a JSON object"),
        ({"data": {"task": "t", "record": "{"}, "files": file}, "invalid_request", "record: expected a JSON object"),
        ({"json": {"task": "t"}}, "invalid_request", "content-type"),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "invalid_request", ""),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data"}}, "invalid_request", ""),
    ]
    for arguments, code, message in cases:
        error = refusal(client.post("/prefixes", **arguments), 422, code)
        assert error["message"].startswith(message), (error, message)


def test_names_in_paths_are_checked(client: httpx.Client) -> None:
    for path in ("/prefixes/UPPER", "/prefixes/a/..b", "/prefixes/e2e/versions/sha256:zz", "/prefixes/%2e%2e/x"):
        refusal(client.get(path), 422, "invalid_name")
    refusal(client.get("/prefixes/nobody/e2e"), 404, "task_not_found")
    refusal(client.post("/prefixes/e2e/promote", json={"version": "latest"}), 422, "invalid_name")
    refusal(client.post("/prefixes/e2e/promote", json={"version": "sha256:" + "0" * 64}), 404, "task_not_found")
    refusal(client.post("/prefixes/e2e/promote", json={"verison": "x"}), 422, "invalid_request")
    refusal(client.post("/prefixes/e2e/rollback"), 409, "conflict")


def test_a_damaged_blob_fails_its_own_rows_and_no_others(
    client: httpx.Client, world: TinyWorld, registry: Path, running: Iterator[tuple[str, Any]]
) -> None:
    version = upload(client, "damaged", world.prefix(seed=40)).json()["version"]
    (blob,) = registry.rglob(f"{version.removeprefix('sha256:')}.safetensors")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    item = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 3}}
    alone = ask(client, "e2e", 3)["outputs"]
    for place in range(3):
        items: list[dict[str, Any]] = [item, item]
        items.insert(place, {**item, "task": "damaged"})
        answers = client.post("/generate/batch", json={"items": items}).json()["items"]
        broken = answers.pop(place)
        assert broken["error"]["code"] == "engine_failure"
        assert "damaged: digest: expected" in broken["error"]["message"]
        assert [answer["outputs"][0]["token_ids"] for answer in answers] == [alone[0]["token_ids"]] * 2
    refusal(client.post("/generate", json={"task": "damaged", "input": "x"}), 500, "engine_failure")
    with client.stream("POST", "/generate", json={"task": "damaged", "input": "x", "stream": True}) as response:
        ((name, body),) = events(response.iter_lines())
    assert (name, body["error"]["code"]) == ("error", "engine_failure")
    client.delete("/prefixes/damaged")


def test_an_artifact_of_half_precision_serves(client: httpx.Client, world: TinyWorld) -> None:
    prefix = make_prefix(world.spec, seed=50, dtype=torch.float16)
    assert upload(client, "half", write_prefix(Prefix(prefix.spec, prefix.tensors))).status_code == 201
    assert ask(client, "half")["outputs"]
    client.delete("/prefixes/half")
