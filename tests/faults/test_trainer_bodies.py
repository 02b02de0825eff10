"""Jobs whose defaults no server takes are refused over HTTP, however they are nested; the trainer lives on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx

from tests.support.figures import Figures
from tests.support.refused_defaults import REFUSED_DEFAULTS
from tests.support.server import PLAIN
from tests.support.trainer_process import TrainerProcess

LINES: list[Mapping[str, str]] = [{"input": "a", "target": "b"}] * 3


def test_a_job_with_refused_defaults_is_an_answer_and_harms_nothing(figures: Figures, tmp_path: Path) -> None:
    places = ("--data", str(tmp_path / "data"), "--registry", str(tmp_path / "registry"), "--workers", "0")
    with TrainerProcess(tmp_path, *places) as trainer:
        dataset = trainer.wait_ready().upload(LINES)
        for defaults in REFUSED_DEFAULTS:
            figures.cases += 1
            body = f'{{"task": "e2e", "dataset": "{dataset}", "defaults": {defaults}}}'
            answer = trainer.post("/jobs", content=body.encode(), headers={"content-type": "application/json"})
            code = answer.json()["error"]["code"]
            got = answer.status_code, code in ("invalid_parameter", "invalid_request"), len(answer.content) < 3000
            assert figures.compare(got, (422, True, True)), f"{defaults[:100]}: {answer.status_code} {code}"
        assert httpx.get(f"{trainer.url}/jobs", timeout=60, verify=PLAIN).json()["jobs"] == []
        assert [line for line in trainer.log_lines() if line["level"] == "error"] == []
