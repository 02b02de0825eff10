"""The trainer's documents name each route, method and status as the code has them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from server.web.intake import Intake
from server.web.settings_sources import load_settings
from tests.support.documents import check_document
from trainer.service.app import create_admin, create_public
from trainer.service.assembly import assemble
from trainer.service.settings import TrainerSettings

SAMPLES = {"job_id": "job-1", "digest": "sha256:0"}


def test_both_documents_name_every_method_and_status_of_every_route(tmp_path: Path) -> None:
    async def run() -> None:
        given = {"data": str(tmp_path / "data"), "registry": str(tmp_path / "registry"), "backbone": "mine=/tmp/x"}
        trainer = await assemble(load_settings(TrainerSettings, given, config=None))
        intake = Intake(body_timeout_s=60, max_unfinished_bytes=1 << 20)
        try:
            public = create_public(trainer.runtime, intake)
            check_document(public, SAMPLES)
            check_document(create_admin(trainer.runtime, intake), SAMPLES)
            job = public.openapi()["components"]["schemas"]["JobBody"]["properties"]
            assert job["backbone"]["anyOf"][0] == {"type": "string", "enum": ["mine"]}
        finally:
            await trainer.close()

    asyncio.run(run())
