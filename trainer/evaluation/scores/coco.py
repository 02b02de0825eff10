"""METEOR, CIDEr and COCO's ROUGE-L through ``pycocoevalcap``, over the tokens of Stanford's PTB tokenizer.

Owns the checks for the package and for Java, and the tokens; ``meteor`` talks to METEOR's program. This module runs the
tokenizer itself: the package would write the input beside its own code and leave the encoding to the machine's locale.
``meteor``, ``cider`` and ``coco_rouge`` take the corpus that ``tokenized`` made.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Final

from trainer.evaluation.scores.base import Corpus, Score, ScorerMissing, mean_score
from trainer.evaluation.scores.meteor import meteor_statistics

PUNCTUATION: Final = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that COCO's scores leave out, from pycocoevalcap's list."""
TIMEOUT_S: Final = 600.0
_JAR: Final = "stanford-corenlp-3.4.1.jar"


def tokenized(corpus: Corpus) -> Corpus:
    """Turn every text into lower-cased tokens without punctuation, joined by spaces. Raises ScorerMissing."""
    texts = [*corpus.outputs, *(text for texts in corpus.references for text in texts)]
    lines = iter(_run([" ".join(text.splitlines()) for text in texts]))
    return corpus.mapped(lambda _: " ".join(word for word in next(lines).split() if word not in PUNCTUATION))


def meteor(corpus: Corpus) -> Score:
    """METEOR 1.5 with its parameters for English, 0 to 100, from the statistics of all inputs. Raises ScorerMissing."""
    return meteor_statistics(corpus, java(), package("meteor"))


def cider(corpus: Corpus) -> Score:
    """CIDEr, 0 to 10. It has no interval: an n-gram's weight comes from all references together."""
    package("cider")
    from pycocoevalcap.cider.cider import Cider

    value, each = Cider().compute_score(*_as_dicts(corpus))
    return Score("cider", float(value), [float(score) for score in each])


def coco_rouge(corpus: Corpus) -> Score:
    """COCO's ROUGE-L, 0 to 100, mean over inputs: F with beta 1.2 of the best precision and the best recall.

    The two may come from different references.
    """
    package("rouge")
    from pycocoevalcap.rouge.rouge import Rouge

    _, each = Rouge().compute_score(*_as_dicts(corpus))
    return mean_score("coco_rougeL", [100 * float(score) for score in each])


def package(part: str) -> Path:
    """Return the folder of a part of pycocoevalcap. Raises ScorerMissing."""
    found = importlib.util.find_spec("pycocoevalcap")
    for folder in (found.submodule_search_locations if found else None) or ():
        if (Path(folder) / part).is_dir():
            return Path(folder) / part
    raise ScorerMissing(
        "METEOR, CIDEr and COCO's ROUGE-L: expected the package pycocoevalcap, found none; pip install 'prefixd[coco]'",
        package="pycocoevalcap",
    )


def java() -> str:
    """Return the path of the ``java`` program. Raises ScorerMissing."""
    program = shutil.which("java")
    if program is None:
        raise ScorerMissing(
            "METEOR, CIDEr and COCO's ROUGE-L: expected a Java runtime (the program java, 8 or newer), found none; on "
            "Debian: apt-get install default-jre-headless",
            program="java",
        )
    return program


def _run(lines: list[str]) -> list[str]:
    command = [
        java(), "-Dfile.encoding=UTF-8", "-cp", str(package("tokenizer") / _JAR),
        "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8",
    ]  # fmt: skip
    content = "".join(f"{line}\n" for line in lines).encode()
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ScorerMissing(f"the PTB tokenizer: expected it to run, got {type(error).__name__}") from None
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(found) != len(lines):
        raise ScorerMissing(
            f"the PTB tokenizer: expected {len(lines)} lines and exit status 0, got {len(found)} and {done.returncode}"
        )
    return found


def _as_dicts(corpus: Corpus) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and outputs in pycocoevalcap's form."""
    return {i: list(texts) for i, texts in enumerate(corpus.references)}, {
        i: [text] for i, text in enumerate(corpus.outputs)
    }
