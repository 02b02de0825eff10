"""Scores of a trained prefix on a test file: BLEU, ROUGE, or F1 over ``field : value`` parts, each against several
references.

    python -m trainer.evaluate runs/e2e/prefix.safetensors e2e-test.jsonl --metric bleu

Owns the scores, ROUGE apart; texts come from the engine that will serve the prefix. This BLEU is sacreBLEU's (13a
tokens, lower-cased), near to but not the datasets' own scorers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from prefixes.artifact import Prefix, read_prefix, version_of
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.spec import DEFAULT_TENANT, check_compatible
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kernels.torch_reference import TorchKernels
from server.engine.types import Failed, Finished, GenerationRequest, Output, PrefixKey, SamplingParams
from server.parameters import SAMPLING, ParameterLimits, merge_parameters
from trainer.data import Dataset, read_dataset
from trainer.files import write_text
from trainer.options import decoding_parameters, named_errors
from trainer.rouge import rouge

KV_CACHE_BYTES: Final = 1 << 28
UNLIMITED: Final = sys.maxsize
LIMITS: Final = ParameterLimits(128, UNLIMITED, UNLIMITED, UNLIMITED)
"""A server's default length, and no limit of its own: a score is of the prefix, not of a server's settings."""
METRICS: Final = ("bleu", "rouge", "fields")
SCORED: Final = (
    "max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty",
    "early_stopping", "stop",
)  # fmt: skip
"""What ``--parameter`` may say; nothing here samples."""


def generate(
    backbone: Backbone, prefix: Prefix, inputs: Sequence[str], params: SamplingParams, *, truncate: bool = False
) -> list[Output]:
    """The best output per input, batched through the serving engine.

    An input past the window raises InputTooLong, or with ``truncate`` loses its end, as in a request. Raises a
    request's own error.
    """
    check_compatible(prefix.spec, backbone.spec)
    return _generate(backbone, prefix, prefix.spec.template, inputs, params, truncate)


def generate_bare(
    backbone: Backbone, template: str, inputs: Sequence[str], params: SamplingParams, *, truncate: bool = False
) -> list[Output]:
    """As ``generate``, without a prefix: what the backbone does by itself, or by words in the template."""
    return _generate(backbone, None, template, inputs, params, truncate)


def _generate(
    backbone: Backbone,
    prefix: Prefix | None,
    template: str,
    inputs: Sequence[str],
    params: SamplingParams,
    truncate: bool,
) -> list[Output]:
    key, spec = (PrefixKey(DEFAULT_TENANT, version_of(prefix)), prefix.spec) if prefix else (None, None)

    def load(_: PrefixKey) -> Prefix:
        assert prefix is not None, "only rows with a prefix load one"
        return prefix

    config = EngineConfig(kv_cache_bytes=KV_CACHE_BYTES, max_waiting=max(1, len(inputs)))
    engine = Engine(backbone, TorchKernels(), config, load)
    room = backbone.spec.input_room(spec)
    for index, text in enumerate(inputs):
        ids = _prompt(backbone, template, text, room, truncate, index)
        request = GenerationRequest(str(index), DEFAULT_TENANT, ids, params, key, spec)
        engine.check(request)
        engine.add(request)
    outputs: dict[int, Output] = {}
    while engine.requests:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                outputs[int(event.request_id)] = event.outputs[0]
    return [outputs[index] for index in range(len(inputs))]


def _prompt(backbone: Backbone, template: str, text: str, room: int, truncate: bool, index: int) -> tuple[int, ...]:
    ids = backbone.prompt_encoder.encode(template, text)
    kept = backbone.prompt_encoder.cut(template, ids, room) if truncate or len(ids) <= room else None
    if kept is None:
        raise InputTooLong(
            f"input {index + 1}: expected at most {room} tokens, got {len(ids)}"
            + ("" if truncate else "; --truncate cuts it"),
            expected=room,
            got=len(ids),
        )
    return tuple(kept)


def decoding(backbone: Backbone, prefix: Prefix, given: Mapping[str, Any]) -> tuple[SamplingParams, bool]:
    """How the server would decode a request of ``given``, and whether it would cut long inputs.

    Where ``given`` says nothing of sampling, it is a request with ``do_sample`` false. Raises InvalidParameter.
    """
    request = dict(given) if SAMPLING & given.keys() else {**given, "do_sample": False}
    return merge_parameters(request, prefix.spec.defaults, backbone.generation_defaults, LIMITS)


def references(data: Dataset) -> dict[str, list[str]]:
    """Input -> all its targets, in the file's order."""
    grouped: dict[str, list[str]] = {}
    for example in data.examples:
        grouped.setdefault(example.input, []).append(example.target)
    return grouped


def bleu(outputs: Sequence[str], expected: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, against any number of references per output."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise InvalidParameter("metric 'bleu': expected the package sacrebleu, found none (pip install it)") from error
    most = max(len(texts) for texts in expected)
    streams: Any = [[texts[i] if i < len(texts) else None for texts in expected] for i in range(most)]
    return float(BLEU(tokenize="13a", lowercase=True).corpus_score(list(outputs), streams).score)


def field_scores(outputs: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro precision, recall and F1 over exact ``field : value`` parts, and the share of inputs wholly right.

    Of several references the one that agrees best counts.
    """
    hits = made = wanted = exact = 0
    for output, texts in zip(outputs, expected, strict=True):
        got = _fields(output)
        best = max((_fields(text) for text in texts), key=lambda fields: 2 * len(got & fields) / len([*got, *fields]))
        hits, made, wanted, exact = hits + len(got & best), made + len(got), wanted + len(best), exact + (got == best)
    precision, recall = hits / max(1, made), hits / max(1, wanted)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "exact": exact / len(outputs)}


def _fields(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split("|") if part.strip())


def score(metric: str, outputs: Sequence[str], expected: Sequence[Sequence[str]]) -> Mapping[str, float]:
    """``metric`` is one of METRICS."""
    if metric == "bleu":
        return {"bleu": bleu(outputs, expected)}
    if metric == "rouge":
        return rouge(outputs, expected)
    if metric == "fields":
        return field_scores(outputs, expected)
    raise InvalidParameter(f"metric: expected {' or '.join(METRICS)}, got {metric!r}", got=metric)


def main(
    artifact: Annotated[Path, typer.Argument(help="A prefix artifact.")],
    data: Annotated[Path, typer.Argument(help="JSONL; lines of the same input are its references.")],
    backbone: Annotated[str, typer.Option(help="The backbone that the prefix was made for.")] = "demo",
    metric: Annotated[str, typer.Option(help=f"{', '.join(METRICS)}.")] = "bleu",
    parameter: Annotated[
        list[str] | None, typer.Option(help="How to decode, name=value; repeatable. Default: as the server would.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut inputs that pass the window.")] = False,
    limit: Annotated[int | None, typer.Option(help="Score only the first inputs.", min=1)] = None,
    report: Annotated[Path | None, typer.Option(help="JSONL of input, output and references to write.")] = None,
) -> None:
    """Generate with a prefix through the serving engine, without sampling, and print its score as JSON.

    \b
    Examples:
      python -m trainer.evaluate runs/e2e/prefix.safetensors e2e-test.jsonl --metric bleu
      python -m trainer.evaluate runs/tldr/prefix.safetensors tldr-test.jsonl
                                 --metric rouge --truncate --parameter num_beams=4
    """
    with named_errors():
        given = decoding_parameters("--parameter", parameter or [])
        foreign = sorted(given.keys() - set(SCORED))
        if foreign:
            raise InvalidParameter(f"--parameter: expected some of {', '.join(SCORED)}, got {foreign[0]}")
        if metric not in METRICS:
            raise InvalidParameter(f"metric: expected {' or '.join(METRICS)}, got {metric!r}", got=metric)
        grouped = dict(list(references(read_dataset(data)).items())[:limit])
        loaded, prefix = load_backbone(backbone), read_prefix(artifact.read_bytes())
        params, by_default = decoding(loaded, prefix, given)
        outputs = generate(loaded, prefix, list(grouped), params, truncate=truncate or by_default)
        texts = [output.text for output in outputs]
        if report is not None:
            rows = zip(grouped.items(), texts, strict=True)
            lines = [json.dumps({"input": i, "output": o, "references": r}, ensure_ascii=False) for (i, r), o in rows]
            write_text(report, "\n".join(lines) + "\n")
        scores = score(metric, texts, list(grouped.values()))
        beams = params.num_beams
        typer.echo(json.dumps({"version": version_of(prefix), "inputs": len(texts), "beams": beams, **scores}))


if __name__ == "__main__":
    typer.run(main)
