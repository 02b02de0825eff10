"""The process that trains gets none of its worker's secrets: no URL, no password, no key."""

from __future__ import annotations

import re
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from tests.support.paths import ROOT
from trainer.service.process import environment

COMPOSED: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["trainer"]


def test_a_child_has_no_credentials_of_redis_nor_the_place_of_their_files() -> None:
    worker = {name: str(value or "") for name, value in COMPOSED["environment"].items()} | {
        "PATH": "/bin", "OMP_NUM_THREADS": "8", "PREFIXD_KEY": "pfx_x", "REDISCLI_AUTH": "s3cret",
        "AWS_SECRET_ACCESS_KEY": "s3cret", "HF_TOKEN": "s3cret", "HTTPS_PROXY": "http://ann:s3cret@proxy",
    }  # fmt: skip
    assert any("redis_trainer_password" in value for value in worker.values())
    child = environment(worker, 2)
    assert child == {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    assert not re.search(r"redis|s3cret|pfx_|/run/prefixd", str(child))
