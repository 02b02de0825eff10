"""A month of two customers on one deployment: from an operator's first key to the table of what each task cost."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.callers import bearer
from tests.support.deployment import SHORT, Deployment, call, deployed_on, published, trainer_of
from tests.support.redis_server import wait_until
from tests.support.server import PLAIN, ServerProcess, events
from tests.support.trainer_process import restaurants

KINDS = ("input_tokens", "prefix_tokens", "output_tokens")


@pytest.fixture(params=["disk", "redis"])
def deployed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    with deployed_on(request.param, tmp_path) as made:
        yield made


@dataclass
class Client:
    """A customer's program: asks replicas in turn, and counts the tokens that it was told, by task."""

    deployed: Deployment
    secret: str
    counted: Counter[tuple[str, str]] = field(default_factory=Counter)
    asked: int = 0

    def generate(self, task: str, text: str = "Blue", **parameters: Any) -> httpx.Response:
        """One answer, or its refusal."""
        body = {"task": task, "input": text, "parameters": {**SHORT, **parameters}}
        answer = call(self._next(), "POST", "/generate", self.secret, json=body)
        if answer.status_code == 200:
            self._count(answer.json())
        return answer

    def stream(self, task: str, text: str = "Blue") -> httpx.Headers:
        """A whole stream; its headers."""
        body = {"task": task, "input": text, "parameters": SHORT, "stream": True}
        url = f"{self._next().url}/generate"
        with httpx.stream("POST", url, json=body, headers=bearer(self.secret), timeout=60, verify=PLAIN) as answer:
            for name, data in events(answer.iter_lines()):
                if name == "done":
                    self._count(data)
            return answer.headers

    def _count(self, body: Any) -> None:
        for kind in KINDS:
            self.counted[body["task"], kind] += body["usage"][kind]

    def _next(self) -> ServerProcess:
        self.asked += 1
        return self.deployed.replicas[self.asked % len(self.deployed.replicas)]


def test_two_customers_from_the_first_key_to_the_bill(deployed: Deployment, tmp_path: Path) -> None:
    acme = deployed.key("acme", "generate,read,publish,train,keys")["secret"]
    globex = deployed.key("globex", "generate,read,train,keys")["secret"]
    limited = deployed.key("globex", "generate,read", "--name", "batch", "--requests-per-minute", "4")
    first, last = deployed.replicas[0], deployed.replicas[-1]
    assert published(first, "hand", deployed.world.prefix(seed=1), acme).status_code == 201
    version = _trained(deployed, tmp_path, acme, globex)

    # What was trained is acme's alone, on every replica, until acme shares it.
    ours, theirs = Client(deployed, acme), Client(deployed, globex)
    said = [ours.generate("learned") for _ in deployed.replicas]
    assert [answer.json()["version"] for answer in said] == [version for _ in deployed.replicas]
    assert [theirs.generate(f"acme/{task}").status_code for task in ("learned", "hand", "none")] == [404, 404, 404]
    _crawl(deployed, globex, version)
    deployed.prefixd("prefixes", "share", "learned", "--tenant", "globex", server=last.url, key=acme)
    for server in deployed.replicas:
        seen = partial(call, server, "GET", "/prefixes/acme/learned", globex)
        wait_until(lambda seen=seen: seen().is_success, lambda: "the shared task is not seen", 20)  # type: ignore[misc]
    assert theirs.generate("acme/learned").json()["outputs"] == said[0].json()["outputs"]
    assert theirs.generate("acme/hand").status_code == 404

    refused = _limits_bite(deployed, limited, theirs)
    for client in (ours, theirs):
        for task in ("acme/learned", "acme/hand") if client is ours else ("acme/learned",):
            client.generate(task, "a longer input", num_beams=3)
            client.generate(task, do_sample=True, num_return_sequences=2, seed=1)
            client.stream(task)

    # The bill: to the token what the programs were told, and nothing of one in the other's.
    for secret, told in ((acme, ours.counted), (globex, theirs.counted + refused.counted)):
        _wait_for_bill(deployed, secret, told)


def _trained(deployed: Deployment, folder: Path, acme: str, globex: str) -> str:
    """The version that acme's job published. The other customer finds neither job nor data."""
    with trainer_of(deployed, folder) as trainer:
        trainer.wait_ready()
        trainer.secret = acme
        dataset = trainer.upload(restaurants(40))
        job = trainer.submit("learned", dataset, backbone="tiny")
        trainer.secret = globex
        with trainer.client() as client:
            for path in (f"/jobs/{job}", f"/jobs/{job}/events", f"/datasets/{dataset}"):
                assert client.get(path).status_code == 404
            assert client.get("/jobs").json()["jobs"] == []
        trainer.secret = acme
        version: str = trainer.wait_for_job(job, "succeeded")["version"]
        return version


def _crawl(deployed: Deployment, secret: str, version: str) -> None:
    """Whoever follows every link of the API with a foreign key reads no name, digest, key or count of acme's."""
    for server in deployed.replicas:
        document = call(server, "GET", "/openapi.json", secret).json()
        asked = 0
        for template, methods in document["paths"].items():
            if "get" not in methods:
                continue
            for tenant in ("acme", "globex"):
                filled = {"tenant": tenant, "name": "learned", "version": version, "model": f"{tenant}/learned"}
                path = template.replace("{key_id}", "0" * 16).replace(":path}", "}")
                for name, value in filled.items():
                    path = path.replace(f"{{{name}}}", value)
                told = call(server, "GET", path, secret)
                assert told.status_code < 500, (path, told.text)
                kept = told.text.replace("acme/learned", "")  # an error may say what was asked for
                assert not any(word in kept for word in ("acme", "hand")), (path, told.text)
                assert told.status_code != 200 or (version not in told.text and "learned" not in told.text), path
                asked += 1
        assert asked > 20


def _limits_bite(deployed: Deployment, key: dict[str, Any], others: Client) -> Client:
    """A key with four requests a minute has four on all replicas together; its tenant's other key has its own."""
    client = Client(deployed, key["secret"])
    answers = [client.generate("acme/learned") for _ in range(6)]
    taken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(taken) + len(refused) == 6 and len(taken) in (4, 5), [answer.text for answer in answers]  # 1 in 15 s
    assert all(answer.headers["x-ratelimit-limit-requests"] == "4" for answer in answers)
    assert [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers][:4] == [3, 2, 1, 0]
    assert all(answer.json()["error"]["code"] == "rate_limited" for answer in refused)
    assert all(1 <= int(answer.headers["retry-after"]) <= 15 for answer in refused)
    assert others.generate("acme/learned").status_code == 200
    # A quota is another thing than a rate: waiting does not help.
    deployed.prefixd("keys", "limits", key["id"], "--unset", "requests-per-minute", "--tokens-per-day", "40")

    def bites() -> bool:  # on every replica
        answers = [client.generate("acme/learned") for _ in deployed.replicas]
        return all("quota_exceeded" in answer.text and answer.status_code == 403 for answer in answers)

    wait_until(bites, lambda: "the quota does not bite", 60)
    assert others.generate("acme/learned").status_code == 200
    return client


def _wait_for_bill(deployed: Deployment, secret: str, told: Counter[tuple[str, str]]) -> None:
    wait_until(lambda: _billed(deployed, secret) == told, lambda: f"{_billed(deployed, secret)} is not {told}", 60)


def _billed(deployed: Deployment, secret: str) -> Counter[tuple[str, str]]:
    """The usage of a customer by task, as its command shows it."""
    rows = deployed.prefixd("usage", "--by", "task", server=deployed.replicas[0].url, key=secret)["rows"]
    return Counter({(row["task"], kind): row[kind] for row in rows for kind in KINDS if row[kind]})


def test_help_of_every_command_of_tenants_teaches() -> None:
    for command in (["keys"], ["tenants"], ["usage"], ["keys", "limits"], ["tenants", "limits"]):
        asked = [sys.executable, "-m", "prefixd", *command, "--help"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
        assert len(shown.stdout) > 300
