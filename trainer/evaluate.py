"""Scores of a trained prefix on a test file: BLEU against several references, or F1 over ``field : value`` parts.

    python -m trainer.evaluate runs/e2e/prefix.safetensors e2e-test.jsonl --metric bleu

Owns the scores; texts come from the engine that will serve the prefix. This BLEU is sacreBLEU's (13a tokens,
lower-cased), near to but not the datasets' own scorers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixes.artifact import Prefix, read_prefix, version_of
from prefixes.backbone import Backbone, load_backbone
from prefixes.errors import InvalidParameter
from prefixes.spec import DEFAULT_TENANT, check_compatible
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kernels.torch_reference import TorchKernels
from server.engine.types import Failed, Finished, GenerationRequest, Output, PrefixKey, SamplingParams
from trainer.data import Dataset, read_dataset

KV_CACHE_BYTES = 1 << 28


def generate(backbone: Backbone, prefix: Prefix, inputs: Sequence[str], params: SamplingParams) -> list[Output]:
    """The best output per input, batched through the serving engine. Raises a request's own error."""
    check_compatible(prefix.spec, backbone.spec)
    return _generate(backbone, prefix, prefix.spec.template, inputs, params)


def generate_bare(backbone: Backbone, template: str, inputs: Sequence[str], params: SamplingParams) -> list[Output]:
    """As ``generate``, without a prefix: what the backbone does by itself, or by words in the template."""
    return _generate(backbone, None, template, inputs, params)


def _generate(
    backbone: Backbone, prefix: Prefix | None, template: str, inputs: Sequence[str], params: SamplingParams
) -> list[Output]:
    key, spec = (PrefixKey(DEFAULT_TENANT, version_of(prefix)), prefix.spec) if prefix else (None, None)

    def load(_: PrefixKey) -> Prefix:
        assert prefix is not None, "only rows with a prefix load one"
        return prefix

    config = EngineConfig(kv_cache_bytes=KV_CACHE_BYTES, max_waiting=max(1, len(inputs)))
    engine = Engine(backbone, TorchKernels(), config, load)
    for index, text in enumerate(inputs):
        ids = tuple(backbone.prompt_encoder.encode(template, text))
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
    """``metric`` is "bleu" or "fields"."""
    if metric == "bleu":
        return {"bleu": bleu(outputs, expected)}
    if metric == "fields":
        return field_scores(outputs, expected)
    raise InvalidParameter(f"metric: expected bleu or fields, got {metric!r}", got=metric)


def main(
    artifact: Annotated[Path, typer.Argument(help="A prefix artifact.")],
    data: Annotated[Path, typer.Argument(help="JSONL; lines of the same input are its references.")],
    backbone: Annotated[str, typer.Option(help="The backbone that the prefix was made for.")] = "demo",
    metric: Annotated[str, typer.Option(help="bleu or fields.")] = "bleu",
    beams: Annotated[int, typer.Option(help="1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Limit per output.")] = 100,
    limit: Annotated[int | None, typer.Option(help="Score only the first inputs.")] = None,
    report: Annotated[Path | None, typer.Option(help="JSONL of input, output and references to write.")] = None,
) -> None:
    """Generate with a prefix and print its score as JSON."""
    loaded, prefix = load_backbone(backbone), read_prefix(artifact.read_bytes())
    grouped = dict(list(references(read_dataset(data)).items())[:limit])
    params: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams}
    texts = [output.text for output in generate(loaded, prefix, list(grouped), SamplingParams(**params))]
    if report is not None:
        rows = zip(grouped.items(), texts, strict=True)
        lines = [json.dumps({"input": i, "output": o, "references": r}, ensure_ascii=False) for (i, r), o in rows]
        report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scores = score(metric, texts, list(grouped.values()))
    typer.echo(json.dumps({"version": version_of(prefix), "inputs": len(texts), "beams": beams, **scores}))


if __name__ == "__main__":
    typer.run(main)
