"""``prefixd serve --backbone demo-bart`` as a user starts it: both tasks are there, and run in one step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.server import ServerProcess, events

FIELDS = "name : Blue Spice | Type : coffee shop | area : city centre"
ABSTRACT = (
    "Deep neural networks are often trained with noisy labels. We propose a simple method that estimates how reliable "
    "each label is during training and weights its loss. It needs no clean data. It improves accuracy on two datasets."
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("demo-bart")
    with ServerProcess(folder, "--backbone", "demo-bart", "--registry", str(folder / "registry")) as process:
        yield process.wait_ready(300)


def test_table_to_text_and_summaries_share_steps(server: ServerProcess) -> None:
    tasks = {"e2e-bart": FIELDS, "scitldr": ABSTRACT}
    with server.client() as client:
        assert {task["task"] for task in client.get("/prefixes").json()["prefixes"]} == {f"default/{t}" for t in tasks}
        alone = {task: ask(client, task, text) for task, text in tasks.items()}
        before = shared_steps(server)
        with ThreadPoolExecutor(6) as pool:
            mixed = list(pool.map(lambda item: (item[0], ask(client, *item)), list(tasks.items()) * 3))
        assert all(text == alone[task] for task, text in mixed), "a neighbour of another task changes nothing"
        assert shared_steps(server) > before, "no step had rows of both tasks"
        assert all(part in alone["e2e-bart"] for part in ("Blue Spice", "coffee shop", "city centre"))
        assert 0 < len(alone["scitldr"]) < len(ABSTRACT)


def test_a_stream_and_the_openai_route_give_the_same_text(server: ServerProcess) -> None:
    with server.client() as client:
        whole = ask(client, "e2e-bart", FIELDS)
        body = {"task": "e2e-bart", "input": FIELDS, "stream": True}
        with client.stream("POST", "/generate", json=body) as response:
            parts = [data for name, data in events(response.iter_lines()) if name == "token"]
        assert "".join(part["text"] for part in parts) == whole
        completion = client.post("/v1/completions", json={"model": "e2e-bart", "prompt": FIELDS, "max_tokens": 80})
        assert completion.json()["choices"][0]["text"] == whole


def test_an_abstract_longer_than_the_window_is_cut_and_said_so(server: ServerProcess) -> None:
    with server.client() as client:
        answer = client.post("/generate", json={"task": "scitldr", "input": ABSTRACT * 20}).json()
        assert answer["truncated"] is True and answer["usage"]["input_tokens"] == 512
        refused = client.post("/generate", json={"task": "e2e-bart", "input": ABSTRACT * 20})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "input_too_long")


def ask(client: httpx.Client, task: str, text: str) -> str:
    answer: dict[str, Any] = client.post("/generate", json={"task": task, "input": text}).json()
    assert answer["outputs"], answer
    return str(answer["outputs"][0]["text"])


def shared_steps(server: ServerProcess) -> float:
    """Steps that had more than one task in them."""
    lines = server.metrics().splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith("prefixd_step_tasks"))
    values = {name: float(value) for name, _, value in found}
    return values["prefixd_step_tasks_count"] - values['prefixd_step_tasks_bucket{le="1.0"}']
