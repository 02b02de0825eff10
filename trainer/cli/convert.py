"""``prefixd convert``: the command line that converts a corpus.

Owns options and help; ``data.convert`` does the rest. ``prefixd.py`` mounts the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixes.errors import InvalidParameter
from trainer.cli.options import named_errors
from trainer.data import convert as conversion


def convert(
    corpus: Annotated[str, typer.Argument(help=f"{', '.join(conversion.CORPORA)}.")],
    source: Annotated[Path, typer.Argument(help="The corpus's own file; xsum also DIR/train for DIR/train.source.")],
    output: Annotated[Path, typer.Argument(help="The JSONL to write.")],
    split: Annotated[
        str, typer.Option(help="all, or one side of a fixed split by input: train (95 %) or held-out (5 %).")
    ] = "all",
    reverse: Annotated[bool, typer.Option("--reverse", help="From the sentence to the fields.")] = False,
    lower: Annotated[bool, typer.Option("--lower", help="Lower-case the sentences, as DART's scores do.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Undo E2E's tokenisation: `pub .` becomes `pub.`")] = False,
    paper_spaces: Annotated[
        bool, typer.Option("--paper-spaces", help="Keep the paper's spaces around input and target.")
    ] = False,
    sample: Annotated[int | None, typer.Option(help="Only so many lines, drawn with --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 1,
    without: Annotated[
        list[str] | None, typer.Option(help="DART: leave out this annotation source, e.g. webnlg; repeatable.")
    ] = None,
) -> None:
    """Convert a corpus, of tables or of articles to summarise, to the trainer's JSONL: a line per input and reference.

    \b
    Examples:
      prefixd convert e2e src1_train.txt e2e.jsonl
      prefixd convert dart dev.json dart.jsonl --without webnlg --split train
      prefixd convert e2e src1_train.txt fields.jsonl --reverse --clean
      prefixd convert scitldr train.jsonl tldr.jsonl
      prefixd convert xsum xsum-train.jsonl xsum.jsonl
      prefixd convert xsum xsum/train xsum.jsonl

    XSum comes as JSONL of document, summary and id, or as the two line-aligned files train.source and train.target.
    """
    with named_errors():
        for name, value, allowed in (("corpus", corpus, conversion.CORPORA), ("split", split, conversion.SPLITS)):
            if value not in allowed:
                raise InvalidParameter(f"{name}: expected one of {', '.join(allowed)}, got {value!r}", got=value)
        wanted = conversion.Conversion(
            corpus,  # type: ignore[arg-type]
            split,  # type: ignore[arg-type]
            reverse=reverse,
            lower=lower,
            clean=clean,
            paper_spaces=paper_spaces,
            without=tuple(without or ()),
            sample=sample,
            seed=seed,
        )
        counts = conversion.convert(wanted, source, output)
        typer.echo(f"{output}: {counts.lines} lines, {counts.inputs} inputs")
