"""The report as one HTML file without scripts. It loads nothing and escapes every text from outside.

Owns the page; ``content`` owns what it says, ``style`` its style sheet. The content security policy allows only this
style sheet, by its hash: even a text that escaped its element could not run or fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any, Final

from server.engine.types import SamplingParams
from trainer.data.seen import ENTRY
from trainer.evaluation.evaluate import ScoredOutput
from trainer.reports.content import Report
from trainer.reports.search import TRIAL_COLUMNS, learning_curve, trial_rows
from trainer.reports.style import STYLE
from trainer.reports.svg import line_chart

POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)
_CONTROLS: Final = {*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A}
_REORDERING: Final = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # these change the order in which a text shows
_INVISIBLE: Final = dict.fromkeys(_CONTROLS | _REORDERING, "\N{REPLACEMENT CHARACTER}")


def render_html(report: Report) -> str:
    """Return the whole page."""
    title = "Training report" if report.metrics else "Evaluation report"
    heading = f"{title}: {report.task}" if report.task else title
    sections = [
        _header(heading, report), _warnings(report), _curves(report), _search(report), _scores(report), _gate(report),
        _outputs("Worst outputs", report.worst, report), _outputs("Random outputs", report.random, report),
        _cost(report), _provenance(report),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(POLICY)}">'
        '<meta name="referrer" content="no-referrer"><meta name="robots" content="noindex">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escaped(heading)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def escaped(value: object) -> str:
    """Return a value as text that is safe between tags and in quoted attributes. Invisible characters become �."""
    text = str(value).encode("utf-8", "replace").decode()  # a lone surrogate has no bytes
    return html.escape(text.translate(_INVISIBLE), quote=True)


def _header(heading: str, report: Report) -> str:
    facts, tiles = report.facts, []
    measured = [line["validation_loss"] for line in report.metrics if "validation_loss" in line]
    if report.evaluation:
        name, score = next(iter(report.evaluation["scores"].items()))
        tiles.append((name, f"{score['value']:.2f}"))
    if measured:
        tiles.append(("validation loss per token", f"{min(measured):.4f}"))
    if report.metrics:
        tiles.append(("steps", f"{report.metrics[-1]['step']:,}"))
    if seconds := report.cost.get("seconds", facts.get("seconds")):
        tiles.append(("training time", duration(float(seconds))))
    shown = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in tiles)
    finished = f' · {escaped(facts["finished_at"])}' if facts.get("finished_at") else ""
    version = f'<p class="version"><code>{escaped(facts.get("version", ""))}</code>{finished}</p>'
    return f'<header><h1>{escaped(heading)}</h1>{version}<dl class="tiles">{shown}</dl></header>'


def _warnings(report: Report) -> str:
    told = "".join(f"<p><strong>Warning:</strong> {escaped(text)}.</p>" for text in report.facts.get("warnings", ()))
    return f"<section>{told}</section>" if told else ""


def _search(report: Report) -> str:
    """What a search tried; nothing for a run without one."""
    search = report.facts.get("search")
    if not search:
        return ""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in TRIAL_COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in trial_rows(search)
    )
    note = (
        f"{search['seconds']:,.0f} s of a budget of {60 * search['budget_minutes']:,.0f} s; losses per token on "
        f"{search['selection_examples']:,} held-out examples. {learning_curve(search['curve'])}."
    )
    table = f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<section><h2>Search</h2>{table}<p class="muted">{escaped(note)}</p></section>'


def _curves(report: Report) -> str:
    losses = [(line["step"], line["loss"]) for line in report.metrics]
    measured = [(line["step"], line["validation_loss"]) for line in report.metrics if "validation_loss" in line]
    charts = [
        line_chart(losses, kind="training", label="training loss"),
        line_chart(measured, kind="validation", label="validation loss per token", mark_lowest=True),
    ]
    drawn = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<section><h2>Curves</h2><div class="charts">{drawn}</div></section>' if drawn else ""


def _scores(report: Report) -> str:
    made = report.evaluation
    if made is None:
        return ""
    rows = []
    for name, score in made["scores"].items():
        bounds = "–" if score["low"] is None else f"{score['low']:.2f} to {score['high']:.2f}"
        cells = f'<td class="number">{score["value"]:.2f}</td><td class="number">{bounds}</td>'
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>')
    how = ", ".join(f"{name} {value}" for name, value in made["decoding"].items() if _told(name, value))
    note = (
        f"{made['inputs']:,} inputs, {made['references']:,} references, preset {made['preset']}. Decoded with {how}. "
        f"Intervals: 95 %, bootstrap over inputs ({made['resamples']:,} draws); – where a score is no sum over inputs."
    )
    head = '<thead><tr><th scope="col">score</th><th scope="col">value</th><th scope="col">interval</th></tr></thead>'
    table = f'<table class="scores">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'<section><h2>Scores</h2>{table}<p class="muted">{escaped(note)}</p></section>'


def _gate(report: Report) -> str:
    """The gate's verdict, why, and what it follows from."""
    made = report.gate
    if made is None:
        return ""
    facts = {name: value for name, value in made.items() if name not in ("verdict", "reason", "version")}
    said = f'<p><span class="tag">{escaped(made["verdict"])}</span> {escaped(made["reason"])}</p>'
    return f"<section><h2>Gate</h2>{said}{_facts(flattened(facts))}</section>"


def _told(name: str, value: Any) -> bool:
    """Whether to show a decoding parameter: these two always, the others if they differ from the default."""
    return name in ("num_beams", "max_new_tokens") or value not in (getattr(SamplingParams, name, False), [])


def _outputs(heading: str, outputs: Sequence[ScoredOutput], report: Report) -> str:
    if not outputs:
        return ""
    measure = (report.evaluation or {}).get("ranked_by")
    cards = []
    for output in outputs:
        marks = [f"{measure} {output.score:.1f}"] if output.score is not None else []
        marks += ["input cut to the window"] * output.truncated
        marks += ["reached its length limit"] * (output.finish_reason == "length")
        tags = "".join(f'<span class="tag">{escaped(mark)}</span>' for mark in marks)
        references = "".join(f"<li>{escaped(text)}</li>" for text in output.references)
        cards.append(
            f'<article><p class="tags">{tags}</p><dl><dt>input</dt><dd class="text">{escaped(output.input)}</dd>'
            f'<dt>output</dt><dd class="text made">{escaped(output.output) or "<em>empty</em>"}</dd>'
            f'<dt>references</dt><dd class="text"><ul>{references}</ul></dd></dl></article>'
        )
    return f"<section><h2>{escaped(heading)}</h2>{''.join(cards)}</section>"


def _cost(report: Report) -> str:
    rows: dict[str, str] = {}
    names = {"seconds": duration, "peak_memory_bytes": size}
    known = {name: report.facts.get(name) for name in ("seconds", "tokens")}
    for name, value in {**known, **report.cost}.items():
        if value is not None:
            label = name.removesuffix("_bytes").replace("_", " ").replace("seconds", "training time")
            rows[label] = names.get(name, lambda number: f"{number:,.6g}")(float(value))
    if made := report.evaluation:
        rows["evaluation time"] = duration(made["seconds"])
        rows["evaluation tokens"] = f"{made['output_tokens']:,}"
    return _table("Cost", rows)


def _provenance(report: Report) -> str:
    """The tables of hyperparameters and provenance. The hyperparameters are part of the artifact's origin."""
    shown = ("seconds", "tokens", "finished_at", "origin", "search", "warnings")
    facts = {name: value for name, value in report.facts.items() if name not in shown}
    origin = {name: value for name, value in report.facts.get("origin", {}).items() if name != ENTRY}
    hyperparameters = origin.pop("hyperparameters", {})
    if report.evaluation:
        facts |= {"evaluation": {name: report.evaluation[name] for name in ("data", "seed", "scorers")}}
    return _table("Hyperparameters", flattened(hyperparameters)) + _table("Provenance", flattened({**facts, **origin}))


def _table(heading: str, rows: Mapping[str, object]) -> str:
    if not rows:
        return ""
    return f"<section><h2>{escaped(heading)}</h2>{_facts(rows)}</section>"


def _facts(rows: Mapping[str, object]) -> str:
    cells = "".join(f'<tr><th scope="row">{escaped(k)}</th><td>{escaped(v)}</td></tr>' for k, v in rows.items())
    return f'<table class="facts"><tbody>{cells}</tbody></table>'


def flattened(facts: Mapping[str, Any], under: str = "") -> dict[str, object]:
    """Flatten nested mappings into one with joined names; leave out empty values."""
    rows: dict[str, object] = {}
    for name, value in facts.items():
        full = f"{under} · {name}" if under else str(name)
        if isinstance(value, Mapping):
            rows |= flattened(value, full)
        elif value not in (None, [], ""):
            words = ", ".join(map(str, value)) if isinstance(value, list) else value
            rows[full] = f"{value:.6g}" if isinstance(value, float) else words
    return rows


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
