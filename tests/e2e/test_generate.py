"""``/generate`` and ``/generate/batch`` over a socket."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from tests.support.server import LONG, WINDOW, ServerProcess, TinyWorld, events, metric, wait_for_metric

INPUT = "name : Blue Spice | Type : coffee shop"


def ask(client: httpx.Client, task: str | None = "e2e", text: str = INPUT, **parameters: Any) -> dict[str, Any]:
    response = client.post("/generate", json={"task": task, "input": text, "parameters": parameters})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: httpx.Client, task: str | None = "e2e", **parameters: Any) -> list[tuple[str, Any]]:
    body = {"task": task, "input": INPUT, "parameters": parameters, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events(response.iter_lines()))


def refused(client: httpx.Client, **body: Any) -> tuple[int, dict[str, Any]]:
    content = json.dumps({"input": INPUT, **body})  # escapes what is no Unicode, which httpx would not send
    response = client.post("/generate", content=content, headers={"content-type": "application/json"})
    error: dict[str, Any] = response.json()["error"]
    assert error["request_id"] == response.headers["x-request-id"]
    return response.status_code, error


def test_the_answer_has_the_documented_form(client: httpx.Client, world: TinyWorld) -> None:
    answer = ask(client, max_new_tokens=7, min_new_tokens=7)
    (output,) = answer["outputs"]
    assert answer["task"] == "default/e2e"
    assert answer["version"].startswith("sha256:")
    assert (len(output["token_ids"]), output["finish_reason"]) == (7, "length")
    assert output.keys() == {"text", "token_ids", "finish_reason"}
    assert answer["usage"]["prefix_tokens"] == 5 * world.sites
    assert answer["usage"]["output_tokens"] == 7
    assert answer["usage"]["input_tokens"] > 10
    assert 0 <= answer["timing"]["queue_ms"] <= answer["timing"]["time_to_first_token_ms"]
    assert answer["timing"]["time_to_first_token_ms"] <= answer["timing"]["total_ms"]
    assert answer.keys() == {"id", "task", "version", "outputs", "usage", "timing"}


def test_tasks_and_the_bare_backbone_answer_differently(client: httpx.Client) -> None:
    texts = {ask(client, task, max_new_tokens=12)["outputs"][0]["text"] for task in ("e2e", "dart", None)}
    assert len(texts) == 3
    bare = ask(client, None, max_new_tokens=2)
    assert (bare["task"], bare["version"], bare["usage"]["prefix_tokens"]) == (None, None, 0)


def test_a_stream_joined_is_the_answer(client: httpx.Client) -> None:
    whole = ask(client, max_new_tokens=20, logprobs=1)
    *tokens, (last, done) = stream(client, max_new_tokens=20, logprobs=1)
    assert {name for name, _ in tokens} == {"token"}
    assert last == "done"
    assert done["outputs"] == whole["outputs"]
    assert "".join(data["text"] for _, data in tokens) == whole["outputs"][0]["text"]
    assert [token for _, data in tokens for token in data["token_ids"]] == whole["outputs"][0]["token_ids"]
    assert [one for _, data in tokens for one in data["logprobs"]] == whole["outputs"][0]["logprobs"]


def test_samples_of_one_request_stream_side_by_side(client: httpx.Client) -> None:
    *tokens, (_, done) = stream(client, max_new_tokens=9, num_return_sequences=3, temperature=1.0, seed=4)
    for index, output in enumerate(done["outputs"]):
        assert "".join(data["text"] for _, data in tokens if data["index"] == index) == output["text"]
    assert len({output["text"] for output in done["outputs"]}) == 3
    again = ask(client, max_new_tokens=9, num_return_sequences=3, temperature=1.0, seed=4)
    assert again["outputs"] == done["outputs"]


def test_beams_stream_nothing_but_done(client: httpx.Client) -> None:
    ((name, done),) = stream(client, num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert name == "done"
    assert len(done["outputs"]) == 2
    assert done["outputs"][0]["score"] >= done["outputs"][1]["score"]


def test_a_stop_string_ends_the_output_and_is_not_part_of_it(client: httpx.Client) -> None:
    full = ask(client, max_new_tokens=30, min_new_tokens=30)["outputs"][0]["text"]
    stop = full[5:7]
    output = ask(client, max_new_tokens=30, min_new_tokens=30, stop=[stop])["outputs"][0]
    assert (output["text"], output["finish_reason"]) == (full[: full.index(stop)], "stop")


def test_an_input_past_the_window_is_refused_or_cut_and_said_so(client: httpx.Client, world: TinyWorld) -> None:
    room = WINDOW if world.spec.input_site == "encoder" else WINDOW - 5 - 1
    text = "x " * WINDOW
    status, error = refused(client, task="e2e", input=text)
    assert (status, error["code"]) == (422, "input_too_long")
    assert error["detail"]["expected"] == room
    assert error["detail"]["got"] > WINDOW
    cut = ask(client, "e2e", text, truncate=True, max_new_tokens=3)
    assert cut["truncated"] is True
    assert cut["usage"]["input_tokens"] == room
    assert cut["outputs"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"task": "nobody"}, 404, "task_not_found"),
        ({"task": "e2e@staging"}, 404, "task_not_found"),
        ({"task": "e2e@sha256:" + "0" * 64}, 404, "task_not_found"),
        ({"task": "other/e2e"}, 404, "task_not_found"),
        ({"task": "../e2e"}, 422, "invalid_name"),
        ({"parameters": {"temperature": 0}}, 422, "invalid_parameter"),
        ({"parameters": {"do_sample": False, "top_k": 3}}, 422, "invalid_parameter"),
        ({"parameters": {"num_beams": 2, "temperature": 1}}, 422, "invalid_parameter"),
        ({"parameters": {"num_return_sequences": 2}}, 422, "invalid_parameter"),
        ({"parameters": {"max_new_tokens": 8001}}, 422, "invalid_parameter"),
        ({"parameters": {"num_beams": 9}}, 422, "invalid_parameter"),
        ({"parameters": {"tempreture": 1}}, 422, "invalid_request"),
        ({"input": "\ud800"}, 422, "invalid_parameter"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_run_is_refused_before_the_first_byte(
    client: httpx.Client, body: dict[str, Any], status: int, code: str, streaming: bool
) -> None:
    got, error = refused(client, **{"stream": streaming, **body})
    assert (got, error["code"]) == (status, code)


def test_no_token_at_all_is_refused_where_the_input_is_all_there_is(client: httpx.Client, world: TinyWorld) -> None:
    around = {"bart": 2, "t5": 1, "llama": 1}.get(world.spec.family, 0)  # tokens that its tokenizer adds to any text
    if around:
        assert ask(client, None, "", max_new_tokens=2)["usage"]["input_tokens"] == around
    else:
        status, error = refused(client, task=None, input="")
        assert (status, error["code"]) == (422, "invalid_parameter")


def test_a_batch_answers_in_order_and_a_bad_item_fails_alone(client: httpx.Client) -> None:
    item = {"task": "e2e", "input": INPUT, "parameters": {"max_new_tokens": 5}}
    bad = [{"task": "nobody", "input": "x"}, {"inputs": "x"}, {"input": "x", "parameters": {"top_p": 7}}]
    body = {"items": [item, bad[0], {**item, "task": None}, bad[1], {**item, "task": "dart"}, bad[2]]}
    items = client.post("/generate/batch", json=body).json()["items"]
    assert [one["error"]["code"] if "error" in one else one["task"] for one in items] == [
        "default/e2e", "task_not_found", None, "invalid_request", "default/dart", "invalid_parameter",
    ]
    alone = ask(client, max_new_tokens=5)
    assert items[0]["outputs"] == alone["outputs"]


def test_a_batch_larger_than_rows_and_queue_together_is_answered_whole(client: httpx.Client) -> None:
    items = [{"task": "e2e", "input": str(n), "parameters": {"max_new_tokens": 4}} for n in range(40)]
    answers = client.post("/generate/batch", json={"items": items}).json()["items"]
    assert all("outputs" in answer for answer in answers)
    assert len({answer["id"] for answer in answers}) == 40


@pytest.mark.parametrize("items", [[], [{"input": "x"}] * 65, "x"])
def test_a_batch_of_no_or_too_many_items_is_refused(client: httpx.Client, items: Any) -> None:
    response = client.post("/generate/batch", json={"items": items})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request")


def test_rows_of_several_tasks_make_one_call_of_the_model_per_step(
    server: ServerProcess, client: httpx.Client
) -> None:
    names = ("prefixd_forward_total", "prefixd_step_tasks_sum", "prefixd_step_tasks_count", "prefixd_step_rows_sum")
    before = [metric(server, name) for name in names]
    tasks = ["e2e", "dart", None] * 2
    items = [
        {"task": task, "input": INPUT, "parameters": {"max_new_tokens": 40, "min_new_tokens": 40}} for task in tasks
    ]
    client.post("/generate/batch", json={"items": items})
    forwards, tasks_seen, steps, rows = (metric(server, name) - was for name, was in zip(names, before, strict=True))
    assert forwards == steps < 80  # one by one they would be 240
    assert tasks_seen / steps > 2
    assert rows / steps > 4


def test_a_full_queue_is_429_and_those_inside_are_not_disturbed(server: ServerProcess, client: httpx.Client) -> None:
    async def run() -> None:
        body = {"task": "e2e", "input": "x", "stream": True, "parameters": LONG}
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as many:
            streams = [many.stream("POST", "/generate", json=body) for _ in range(16)]
            readers = []
            for number, one in enumerate(streams):
                response = await one.__aenter__()
                assert response.status_code == 200, number
                readers.append(response.aiter_raw())
                if number < 8:  # a row each, before the queue fills
                    await anext(readers[-1])
            refused = await many.post("/generate", json={"task": "dart", "input": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await many.get("/ready")).status_code == 200
            assert await anext(readers[0])
            for one in streams:
                await one.__aexit__(None, None, None)

    asyncio.run(run())
    wait_for_metric(server, "prefixd_num_requests_running", 0)
    assert ask(client, max_new_tokens=2)["outputs"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_ends_its_request(server: ServerProcess, client: httpx.Client, streaming: bool) -> None:
    aborted = metric_or_zero(server, "abort")

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as leaving:
            body = {"task": "e2e", "input": "x", "stream": streaming, "parameters": LONG}
            request = asyncio.create_task(leaving.post("/generate", json=body))
            while await asyncio.to_thread(metric, server, "prefixd_num_requests_running") < 1:
                await asyncio.sleep(0.02)
            request.cancel()

    begun = time.monotonic()
    asyncio.run(run())
    wait_for_metric(server, "prefixd_num_requests_running", 0, timeout_s=5)
    assert metric_or_zero(server, "abort") == aborted + 1
    assert time.monotonic() - begun < 10


def metric_or_zero(server: ServerProcess, reason: str) -> float:
    lines = server.metrics().splitlines()
    name = f'prefixd_request_success_total{{finished_reason="{reason}"'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_body_is_413_and_the_server_stays_up(client: httpx.Client, chunked: bool) -> None:
    content: Any = b"x" * (2 << 20)
    if chunked:
        content = (b"x" * 65536 for _ in range(32))
    response = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert ask(client, max_new_tokens=1)["outputs"]


def test_the_log_is_json_and_holds_no_prompt(server: ServerProcess, client: httpx.Client) -> None:
    secret = "topsecretprompt"
    response = client.post("/generate", json={"input": secret, "parameters": {"max_new_tokens": 1}})
    client.post("/generate", json={"input": secret, "parameters": {"top_p": 9}})
    client.post("/generate", json={"input": [secret]})
    request_id = response.headers["x-request-id"]
    lines = server.log_lines()
    assert any(line.get("request_id") == request_id and line.get("status") == 200 for line in lines)
    assert secret not in server.log.read_text()


def test_metrics_have_the_documented_names(server: ServerProcess, client: httpx.Client) -> None:
    ask(client, max_new_tokens=3)
    text = server.metrics()
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count", "prompt_tokens_total",
        "generation_tokens_total", "request_success_total", "num_preemptions_total", "forward_total",
        "step_rows_count", "step_tasks_count", "step_tokens_count", "resident_prefixes", "resident_prefix_bytes",
        "prefix_load_seconds_count", "prefix_evictions_total", "http_requests_total",
    ):
        assert f"\nprefixd_{name}" in text, name
    assert 'route="/generate"' in text
