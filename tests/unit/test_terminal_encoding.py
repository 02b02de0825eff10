"""The command shows what a terminal's encoding lacks; it does not end in a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixes.artifact import write_prefix
from prefixes.registry import open_registry
from tests.support.paths import ROOT
from tests.support.prefixes import make_prefix


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_template_that_stdout_cannot_encode_is_shown_escaped(tmp_path: Path, encoding: str) -> None:
    url = f"disk://{tmp_path}/registry"
    data = write_prefix(make_prefix(template="概要 {input} 👍"))
    open_registry(url).publish("default", "e2e", data, record={})
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prefixd", "prefixes", "inspect", "e2e", "--registry", url]
    shown = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path, check=False)
    assert b"Traceback" not in shown.stderr
    assert shown.returncode == 0, shown.stderr
    assert ("概要" if encoding == "utf-8" else "\\u6982\\u8981") in shown.stdout.decode(encoding)
