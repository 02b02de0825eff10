"""``prefixd jobs``: what is sent for what was typed, and what never leaves the machine."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import prefixd
from server.settings import Settings
from server.web.settings_sources import load_settings
from tests.support.trainer import toy_pairs, write_jsonl
from trainer.cli.jobs.submit import submit
from trainer.evaluation.scores.presets import PRESETS as SCORE_PRESETS
from trainer.service.schemas import Evaluation, Hyperparameters, JobBody, PromoteIf

JOB = {"id": "job-1", "state": "queued", "spec": {}}


class Trainer:
    """A service that has no dataset, takes every job, and keeps what it was sent."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str | None, bytes]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                asked.append((self.command, self.path, self.headers.get("authorization"), body))
                status, answer = 200, dict[str, Any](JOB)
                if self.path.startswith("/datasets"):
                    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
                    missing = {"error": {"code": "dataset_not_found", "message": "none"}}
                    status, answer = (201, {"dataset": digest}) if self.command == "POST" else (404, missing)
                if self.path.startswith("/jobs?"):
                    answer = {"jobs": [JOB], "next": None}
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _answer  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def submitted(self) -> dict[str, Any]:
        """The body of the only job."""
        [body] = [body for method, path, _, body in self.asked if (method, path) == ("POST", "/jobs")]
        sent: dict[str, Any] = json.loads(body)
        return sent


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    made = Trainer()
    monkeypatch.setenv("PREFIXD_TRAINER", made.url)
    monkeypatch.delenv("PREFIXD_KEY", raising=False)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", toy_pairs(20))


def prefixd_jobs(*arguments: str) -> Result:
    return CliRunner().invoke(prefixd.app, ["jobs", *arguments])


def test_every_field_of_a_job_has_an_option_that_reaches_it(trainer: Trainer, data: Path, tmp_path: Path) -> None:
    validation = write_jsonl(tmp_path / "validation.jsonl", toy_pairs(5))
    numbers = {
        "prefix-length": 7, "middle": 9, "frozen-positions": 1, "epochs": 3, "batch-size": 8, "accumulate": 2,
        "lr": 0.5, "warmup-steps": 4, "weight-decay": 0.1, "gradient-clip": 2.0, "validate-every": 6,
        "checkpoint-every": 11, "seed": 12, "hold-out": 13, "limit": 14, "steps": 15, "patience": 16,
        "budget-minutes": 17,
    }  # fmt: skip
    texts = {
        "sites": "decoder, cross", "positions": "unshifted", "method": "direct", "init": "some words",
        "reduction": "token", "task": "acme/e2e", "data": str(data), "validation": str(validation),
        "backbone": "tiny", "preset": "xsum", "alias": "canary", "template": "<{input}>", "start-from": "e2e@old",
        "default": "num_beams=3", "evaluate": "e2e", "metric": "bleu", "promote-if": "rougeL", "margin": "0.5",
        "gate": str(validation), "gate-hold-out": "7",
    }  # fmt: skip
    options = [word for name, value in {**numbers, **texts}.items() for word in (f"--{name}", str(value))]
    (data.parent / "style.txt").write_text("a style\n")
    options += ["--start-file", str(data.parent / "style.txt")]
    result = prefixd_jobs("submit", *options, "--checkpoint-activations", "--truncate", "--drop-long", "--auto")
    assert result.exit_code == 0, result.output
    assert result.stdout == "job-1\n"
    sent = trainer.submitted()
    assert set(sent) == set(JobBody.model_fields)
    assert set(sent["hyperparameters"]) == set(Hyperparameters.model_fields)
    assert set(sent["evaluation"]) == set(Evaluation.model_fields)
    body = JobBody.model_validate(sent)
    for name, value in numbers.items():
        name = {"lr": "learning_rate"}.get(name, name).replace("-", "_")
        owner = next(part for part in (body, body.evaluation, body.hyperparameters) if hasattr(part, name))
        assert getattr(owner, name) == value, name
    assert (body.task, body.backbone, body.preset, body.alias) == ("acme/e2e", "tiny", "xsum", "canary")
    assert (body.template, body.start_from, body.defaults) == ("<{input}>", "e2e@old", {"num_beams": 3})
    assert body.start_text == "a style\n" and body.auto
    assert body.hyperparameters.sites == ("decoder", "cross")
    assert body.evaluation == Evaluation(preset="e2e", metrics=("bleu",), limit=14)
    assert body.promote_if == PromoteIf(metric="rougeL", margin=0.5)
    digests = [f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in (data, validation)]
    assert [body.dataset, body.validation_dataset, body.gate_dataset, body.gate_hold_out] == [*digests, digests[1], 7]


def test_what_is_not_given_is_the_trainers_to_choose(trainer: Trainer, data: Path) -> None:
    assert prefixd_jobs("submit", "--task", "e2e", "--data", str(data)).exit_code == 0
    body = JobBody.model_validate(trainer.submitted())
    assert body == JobBody.model_validate({"task": "e2e", "dataset": body.dataset})


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--no-alias"], "alias", None),
        (["--no-evaluate"], "evaluation", None),
        (["--limit", "0"], "evaluation", {"limit": None}),
    ],
)
def test_none_can_be_asked_for(trainer: Trainer, data: Path, options: list[str], field: str, value: Any) -> None:
    assert prefixd_jobs("submit", "--task", "e2e", "--data", str(data), *options).exit_code == 0
    assert trainer.submitted()[field] == value


def test_an_operator_lists_the_jobs_of_a_tenant(trainer: Trainer) -> None:
    assert prefixd_jobs("list", "--tenant", "acme").exit_code == 0
    assert prefixd_jobs("list").exit_code == 0
    assert [path for _, path, _, _ in trainer.asked] == ["/jobs?limit=20&tenant=acme", "/jobs?limit=20"]


def test_a_dataset_is_sent_as_it_is_under_its_files_name(trainer: Trainer, data: Path) -> None:
    prefixd_jobs("submit", "--task", "e2e", "--data", str(data))
    look, send, _ = trainer.asked
    assert look[:2] == ("GET", f"/datasets/sha256:{hashlib.sha256(data.read_bytes()).hexdigest()}")
    assert (send[0], send[1], send[3]) == ("POST", "/datasets?name=data", data.read_bytes())


def test_a_dataset_can_be_named_by_its_digest(trainer: Trainer) -> None:
    digest = "sha256:" + "a" * 64
    assert prefixd_jobs("submit", "--task", "e2e", "--data", digest).exit_code == 0
    assert trainer.submitted()["dataset"] == digest
    assert [path for _, path, _, _ in trainer.asked] == ["/jobs"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "expected a JSONL file, got none"),
        ("", "expected at least one line"),
        ('{"input": "x", "target": "y"}\n{"input": "x", "target": 7}\n', "line 2, field 'target'"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_sent(
    trainer: Trainer, tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    result = prefixd_jobs("submit", "--task", "e2e", "--data", str(path))
    assert (result.exit_code, result.stdout, trainer.asked) == (1, "", [])
    assert result.stderr.startswith("error (invalid_data): ") and says in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--no-evaluate", "--limit", "3"], 2, "--no-evaluate"),
        (["--default", "beams=3"], 1, "beams"),
        (["--default", "num_beams"], 1, "name=JSON"),
        (["--data", "sha256:12"], 1, "64 hex digits"),
    ],
)
def test_options_that_make_no_sense_send_nothing(
    trainer: Trainer, data: Path, options: list[str], code: int, says: str
) -> None:
    result = prefixd_jobs("submit", "--task", "e2e", "--data", str(data), *options)
    assert (result.exit_code, result.stdout, trainer.asked) == (code, "", [])
    assert says in result.stderr


def test_the_key_comes_from_the_environment(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefixd_jobs("show", "job-1").exit_code == 0
    monkeypatch.setenv("PREFIXD_KEY", "k")
    assert prefixd_jobs("show", "job-1", "--trainer", trainer.url).exit_code == 0
    assert [key for _, _, key, _ in trainer.asked] == [None, "Bearer k"]


def test_the_trainers_address_is_no_setting_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_TRAINER", "http://elsewhere:8100")
    load_settings(Settings, {})


def test_the_help_names_every_way_of_scoring() -> None:
    annotation = str(inspect.signature(submit, eval_str=True).parameters["evaluate"].annotation.__metadata__[0].help)
    assert [name for name in SCORE_PRESETS if name not in annotation] == []
