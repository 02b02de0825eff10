"""An evaluation: a prefix's outputs on a test set, scored against every input's references, with intervals.

Owns an evaluation's fields and JSON. The outputs come from ``generate``, the scores from ``scores``, the intervals from
``bootstrap``. Knows no registry and no terminal.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as installed
from typing import Any, Final, Literal

from prefixes.artifact import Prefix, version_of
from prefixes.backbone import Backbone
from prefixes.errors import InvalidParameter
from server.engine.kernels import chosen_quantization
from server.engine.kernels.base import Quantization
from trainer.data.dataset import Dataset
from trainer.evaluation.bootstrap import RESAMPLES, intervals
from trainer.evaluation.generate import KV_CACHE_BYTES, Report, check_scored, decoding, generate
from trainer.evaluation.scores.base import Corpus, Score
from trainer.evaluation.scores.presets import ScorePreset, metrics_of, preset_of, scores_of

SCORERS: Final = ("sacrebleu", "rouge-score")


@dataclass(frozen=True)
class ScoreValue:
    """A score and its 95 % interval, or None where it has none (see ``bootstrap``)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ScoredOutput:
    """The output of one input.

    ``score`` is this input's value of ``Evaluation.ranked_by``, higher is better; None if no score ranks inputs.
    ``truncated``: the input was cut to the window. ``finish_reason`` is ``length`` if the output reached its limit.
    """

    input: str
    output: str
    references: tuple[str, ...]
    score: float | None
    truncated: bool
    finish_reason: str

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``from_dict`` takes them back."""
        return asdict(self) | {"references": list(self.references)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ScoredOutput:
        """Read what ``as_dict`` wrote. Raises KeyError or TypeError for anything else."""
        return cls(**{**document, "references": tuple(document["references"])})


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. ``scores`` are in the requested order; ``seconds`` is the time of generation alone."""

    version: str
    data: str  # the digest of the test set's file
    preset: str
    inputs: int
    references: int
    decoding: Mapping[str, Any]
    scores: Mapping[str, ScoreValue]
    ranked_by: str | None
    seed: int
    resamples: int
    seconds: float
    output_tokens: int
    scorers: Mapping[str, str]  # the packages' versions
    outputs: tuple[ScoredOutput, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values; ``from_dict`` takes them back."""
        return asdict(self) | {"outputs": [row.as_dict() for row in self.outputs]}

    def summary(self) -> dict[str, Any]:
        """JSON values without inputs and outputs, which may be printed, logged and kept beside the version."""
        return {key: value for key, value in self.as_dict().items() if key != "outputs"}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Evaluation:
        """Read what ``as_dict`` wrote. Raises InvalidParameter for anything else."""
        try:
            return cls(**{
                **document,
                "scores": {name: ScoreValue(**score) for name, score in document["scores"].items()},
                "outputs": tuple(map(ScoredOutput.from_dict, document["outputs"])),
            })  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidParameter(f"evaluation: expected its own JSON, got {type(error).__name__}: {error}") from None

    def record(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record for the registry. It keeps the scores of the ``known`` record and adds these."""
        old = known.get("scores")
        scores = {name: score.value for name, score in self.scores.items()}
        return {"scores": {**(old if isinstance(old, Mapping) else {}), **scores}, "evaluation": self.summary()}


def references(data: Dataset, preset: ScorePreset, limit: int | None = None) -> dict[str, list[str]]:
    """Map each input to its references, in the file's order; only the first ``limit`` inputs.

    Inputs with the same ``preset.meaning`` become one: the first, with the targets of all.
    """
    first: dict[str, str] = {}
    grouped: dict[str, list[str]] = {}
    for example in data.examples:
        text = first.setdefault(preset.meaning(example.input), example.input)
        grouped.setdefault(text, []).append(example.target)
    return dict(list(grouped.items())[:limit])


def evaluate(
    backbone: Backbone,
    prefix: Prefix,
    data: Dataset,
    *,
    preset: str = "plain",
    metrics: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    truncate: bool = False,
    limit: int | None = None,
    seed: int = 1,
    resamples: int = RESAMPLES,
    kv_cache_bytes: int = KV_CACHE_BYTES,
    threads: int | None = None,
    quantize: Literal["auto"] | Quantization = "auto",
    report: Report = lambda done, total: None,
) -> Evaluation:
    """Generate for every input of ``data`` as the server would, without sampling, and score.

    Without ``metrics`` the preset's are used. ``parameters`` override the artifact's and the backbone's defaults.
    ``seed`` is for the intervals' draws. ``report`` may raise to end the work. Raises InvalidParameter, ScorerMissing,
    InputTooLong, IncompatiblePrefix.
    """
    chosen, settings = preset_of(preset), dict(parameters or {})
    names = metrics_of(chosen, metrics)
    check_scored(settings)
    params, by_default = decoding(backbone, prefix, settings)
    cut = truncate or by_default
    kept = chosen_quantization(quantize, backbone.model.device, backbone.model.dtype, stored=backbone.quantized)
    kept_of_weights = {} if kept == "none" else {"quantize": kept}
    grouped = references(data, chosen, limit)
    began = time.monotonic()
    made = generate(
        backbone, prefix, list(grouped), params,
        truncate=cut, kv_cache_bytes=kv_cache_bytes, threads=threads, quantize=kept, report=report,
    )  # fmt: skip
    seconds = time.monotonic() - began
    corpus = Corpus.of([one.output.text for one in made], list(grouped.values()))
    scores = scores_of(corpus, chosen, names)
    bounds = intervals(scores, seed=seed, resamples=resamples)
    ranked_by, ranks = _ranks(scores, len(made))
    rows = zip(grouped.items(), made, ranks, strict=True)
    decoded = {name: value for name, value in asdict(params).items() if name not in ("seed", "logprobs")}
    return Evaluation(
        version=version_of(prefix),
        data=data.digest,
        preset=preset,
        inputs=len(made),
        references=sum(map(len, grouped.values())),
        decoding=decoded | {"stop": list(params.stop), "truncate": cut, **kept_of_weights},
        scores={score.name: ScoreValue(score.value, *(bounds[score.name] or (None, None))) for score in scores},
        ranked_by=ranked_by,
        seed=seed,
        resamples=resamples,
        seconds=round(seconds, 3),
        output_tokens=sum(len(one.output.token_ids) for one in made),
        scorers={name: installed(name) for name in SCORERS},
        outputs=tuple(
            ScoredOutput(text, one.output.text, tuple(expected), rank, one.truncated, str(one.output.finish_reason))
            for (text, expected), one, rank in rows
        ),
    )


def _ranks(scores: Sequence[Score], inputs: int) -> tuple[str | None, Sequence[float | None]]:
    """Return the name and values of the first score with a value per input, negated if lower is better."""
    for score in scores:
        if score.per_input is not None:
            if score.lower_is_better:
                return f"-{score.name}", [-value for value in score.per_input]
            return score.name, score.per_input
    return None, [None] * inputs
