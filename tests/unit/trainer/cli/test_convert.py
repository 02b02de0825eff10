"""``prefixd convert``: what a user sees."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

import prefixd


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(prefixd.app, ["convert", *arguments])


def test_convert_says_what_it_wrote_and_refuses_unknown_corpora(tmp_path: Path) -> None:
    source, out = tmp_path / "e2e.txt", tmp_path / "e2e.jsonl"
    source.write_text("name : A||A . \nname : A||It is A . \n")
    result = invoke("e2e", str(source), str(out))
    assert (result.exit_code, "2 lines, 1 inputs" in result.output) == (0, True)
    result = invoke("c4", str(source), str(out))
    assert (result.exit_code, "corpus: expected one of e2e, webnlg, dart, scitldr, xsum" in result.output) == (1, True)


def test_help_teaches_by_examples() -> None:
    assert "prefixd convert" in invoke("--help").output
