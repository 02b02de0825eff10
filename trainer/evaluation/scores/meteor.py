"""METEOR 1.5's program: its protocol, its statistics, and its formula over their sums.

Owns the protocol and the formula (Denkowski & Lavie 2014; parameters of the task ``rank`` for English). The program
gives the value; the formula serves resamples, and a test compares it with the program.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import numpy as np

from trainer.evaluation.scores.base import Corpus, Floats, Score, ScorerMissing

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_WEIGHTS: Final = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
_FIELDS: Final = 23
"""Statistics of one input: words of output and reference; function words of both; for each of four kinds of match, the
matched content words and function words of both; chunks; matched words of output and reference."""


def meteor_statistics(corpus: Corpus, java: str, folder: Path) -> Score:
    """METEOR, 0 to 100, of a tokenised corpus, by the program in ``folder``. Raises ScorerMissing if it fails."""
    with _program(java, folder) as (told, heard):

        def tell(line: str) -> None:
            told.write(f"{line}\n")
            told.flush()

        lines = []
        for output, references in zip(corpus.outputs, corpus.references, strict=True):
            words = " ||| ".join(text.replace("|||", " ") for text in (*references, output))
            tell(f"SCORE ||| {words} ")  # the space keeps an empty output a field
            lines.append(heard.readline().strip())
        rows = np.array([_row(line) for line in lines])
        whole = (rows[:, 20] == 1) & (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1])
        rows[whole, 20] = 0  # the program does the same: an output that matches as a whole is not fragmented
        tell("EVAL ||| " + " ||| ".join(lines))
        each = [_number(heard) for _ in lines]
        value = _number(heard)  # the score of the whole corpus
    per_input = [100 * score for score in each]
    return Score("meteor", 100 * value, per_input, statistics=rows, of_sums=lambda sums: 100 * formula(sums))


def formula(sums: Floats) -> Floats:
    """Turn sums of statistics ``(samples, 23)`` into scores ``(samples,)``, 0 to 1."""
    length, reference_length, functions, reference_functions = sums[:, :4].T
    matches = sums[:, 4:20].reshape(-1, 4, 4)  # (samples, kind, content of both and function words of both)
    content, reference_content, function, reference_function = np.moveaxis(matches, 2, 0) @ _WEIGHTS
    precision = _ratio(
        _DELTA * content + (1 - _DELTA) * function, _DELTA * (length - functions) + (1 - _DELTA) * functions
    )
    recall = _ratio(
        _DELTA * reference_content + (1 - _DELTA) * reference_function,
        _DELTA * (reference_length - reference_functions) + (1 - _DELTA) * reference_functions,
    )
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _ratio(sums[:, 20], (sums[:, 21] + sums[:, 22]) / 2)
    return np.asarray(mean * (1 - _GAMMA * fragmentation**_BETA))


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _row(line: str) -> list[float]:
    try:
        row = [float(field) for field in line.split()]
    except ValueError:
        row = []
    if len(row) != _FIELDS:
        raise ScorerMissing(f"METEOR: expected {_FIELDS} statistics per input, got {len(row)}; it may want more memory")
    return row


def _number(heard: IO[str]) -> float:
    try:
        return float(heard.readline())
    except ValueError:
        raise ScorerMissing("METEOR: expected a score per input, got none") from None


@contextmanager
def _program(java: str, folder: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """Run the program and give its input and output. It answers line by line."""
    command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar"]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdin, process.stdout
        except BrokenPipeError:
            raise ScorerMissing("METEOR: expected its program to run, got an early end; it wants 2 GB") from None
        finally:
            process.kill()
