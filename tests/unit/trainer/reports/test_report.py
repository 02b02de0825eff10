"""The report: what it says, that hostile texts stay texts, and what a browser makes of it."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import InvalidParameter
from trainer.evaluation.evaluate import Evaluation, ScoredOutput, ScoreValue
from trainer.reports.content import Report
from trainer.reports.html import duration, escaped, flattened, render_html
from trainer.reports.report import MAX_CHARACTERS, MAX_REFERENCES, build_report, report_of, write_reports
from trainer.reports.svg import MAX_POINTS, line_chart, thinned, ticks

VOID = {"meta", "br", "line", "circle", "polyline"}
KNOWN = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "p", "code", "dl", "dt", "dd",
    "div", "section", "figure", "svg", "line", "text", "polyline", "circle", "table", "thead", "tbody", "tr", "th",
    "td", "span", "article", "ul", "li", "em",
}  # fmt: skip
HOSTILE = [
    "</style><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "--></title></textarea></main></body><svg onload=document.title='owned'>",
    "]]><iframe srcdoc='<script>parent.document.title=1</script>'></iframe>",
    "javascript:alert(1)",
    "\x00\x1b[31m\u202egnissam\u2066 \ud800",
    "&lt;script&gt;",
]


class Page(HTMLParser):
    """Every element and attribute; raises where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open and self._open.pop() == tag, f"</{tag}> does not nest"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def evaluation(texts: list[str], scores: list[float | None] | None = None) -> Evaluation:
    ranks = scores or [float(index) for index in range(len(texts))]
    return Evaluation(
        version="sha256:" + "a" * 64, data="sha256:" + "d" * 64, preset="plain", inputs=len(texts),
        references=len(texts), decoding={"num_beams": 4, "max_new_tokens": 9, "top_k": 0, "stop": []},
        scores={"bleu": ScoreValue(34.5, 30.25, 39.75), "nist": ScoreValue(5.0, None, None)}, ranked_by="bleu", seed=1,
        resamples=1000, seconds=2.5, output_tokens=77, scorers={"sacrebleu": "2"},
        outputs=tuple(
            ScoredOutput(f"in {text}", f"out {text}", (f"ref {text}",), rank, False, "stop")
            for text, rank in zip(texts, ranks, strict=True)
        ),
    )  # fmt: skip


def metrics(steps: int = 40) -> list[dict[str, Any]]:
    lines = [{"step": 10 * i, "epoch": 0, "loss": 50 / i, "learning_rate": 1e-4} for i in range(1, steps + 1)]
    return [line | ({"validation_loss": 2 + (i - 7) ** 2 / 100} if i % 4 == 3 else {}) for i, line in enumerate(lines)]


FACTS = {
    "version": "sha256:" + "a" * 64, "finished_at": "2026-01-02T03:04:05+00:00", "seconds": 7384.2, "torch": "2.13.0",
    "identity": {"template": "{input}<|endoftext|>"}, "origin": {"backbone": "tiny", "hyperparameters": {"lr": 8e-5}},
}  # fmt: skip


def hostile_report(more: str = "") -> Report:
    texts = [f"{text}{more}" for text in HOSTILE]
    made = evaluation(texts)
    facts = {**FACTS, texts[0]: texts[1], "origin": {"method": texts[2], "hyperparameters": {texts[3]: texts[4]}}}
    made = replace(
        made, ranked_by=texts[1], preset=texts[2], scores={texts[0]: ScoreValue(1.0, None, None)},
        decoding={texts[1]: texts[0]},
    )  # fmt: skip
    gate = {"verdict": texts[0], "reason": texts[1], "rule": {texts[2]: texts[3]}, "scores": None}
    return build_report(facts, metrics(), made, task=texts[0], cost={texts[2]: 3.0}, gate=gate)


def test_a_gates_verdict_its_reason_and_its_numbers_are_shown_and_come_back() -> None:
    gate = {"verdict": "rejected", "reason": "bleu 3.00 against 9.00", "inputs": 77, "left_out": {"current": 5}}
    report = build_report(FACTS, metrics(), task="t", gate=gate)
    shown = " ".join(Page(render_html(report)).texts)
    assert all(text in shown for text in ("Gate", "rejected", "bleu 3.00 against 9.00", "77", "left_out · current"))
    document = json.loads(json.dumps(report.as_dict()))
    assert Report.from_dict(document).gate == gate
    del document["gate"]  # as in the reports of older releases
    assert Report.from_dict(document).gate is None


def test_the_report_shows_curves_scores_outputs_cost_and_provenance() -> None:
    cost = {"tokens": 123456, "tokens_per_second": 812.5, "peak_memory_bytes": 3 * 2**29}
    texts = [f"t{index:02}" for index in range(30)]
    page = render_html(build_report(FACTS, metrics(), evaluation(texts), task="acme/e2e", cost=cost))
    shown = " ".join(Page(page).texts)
    for said in (
        "Training report: acme/e2e", "training loss", "validation loss per token", "lowest 2 at step 80", "34.50",
        "30.25 to 39.75", "ref t00", "2 h 3 min", "123,456", "812.5", "1.50 GiB", "sha256:aaaa", "{input}<|endoftext|>",
        "8e-05", "num_beams 4",
    ):  # fmt: skip
        assert said in shown, said
    assert "top_k" not in shown, "a parameter that is off says nothing"
    assert page.count("<svg") == 2


CHOICE = {"prefix_length": 20, "init": "examples", "method": "direct", "frozen_positions": 1, "learning_rate": 0.005}
TRIAL = {"round": 1, "choice": CHOICE, "steps": 8, "made": 8, "loss": 2.5, "ended": "done", "tokens": 9, "learnt": 3}
SEARCH = {
    "budget_minutes": 5, "seconds": 240.0, "selection_examples": 32, "chosen": CHOICE, "rounds": [], "cost": None,
    "trials": [TRIAL, {**TRIAL, "loss": None, "ended": "diverged", "made": 2}],
    "curve": {
        "estimate": 2.125, "low": 2.0, "high": 2.25, "examples": 200, "points": [[25, 4.0], [50, 3.0], [100, 2.5]]
    },
}  # fmt: skip


def test_the_report_shows_what_a_search_tried_and_what_more_examples_would_bring() -> None:
    page = render_html(build_report({**FACTS, "search": SEARCH, "warnings": ["3 of the 9 <held-out>"]}, metrics(3)))
    shown = " ".join(Page(page).texts)
    for said in (
        "2.5000 (best)", "none (diverged)", "2 of 8", "240 s of a budget of 300 s", "32 held-out examples",
        "With twice the examples, 200: about 0.3750 lower (between 0.2500 and 0.5000)", "4.0000 with 25",
        "3 of the 9 <held-out>",
    ):  # fmt: skip
        assert said in shown, said
    untold = {**SEARCH, "curve": {"estimate": None, "reason": "it takes more"}}
    assert "not estimated, it takes more" in render_html(build_report({**FACTS, "search": untold}, []))
    plain = render_html(build_report({**FACTS, "warnings": []}, metrics(3)))
    assert "Search" not in plain and "Warning" not in plain


def test_a_report_without_training_or_without_evaluation_is_whole() -> None:
    bare = render_html(build_report(FACTS, metrics(3)))
    assert {"table", "svg"} <= Page(bare).tags and "Scores" not in bare
    scored = render_html(build_report({"version": "v"}, [], evaluation(["x"], [None])))
    assert "svg" not in Page(scored).tags and "Evaluation report" in scored and "Worst" not in scored


def test_ten_worst_and_ten_random_outputs_are_shown_and_the_draw_repeats() -> None:
    texts = [f"t{index:02}" for index in range(40)]
    scores = [float((7 * index) % 40) for index in range(40)]
    made = evaluation(texts, list(scores))
    report = build_report(FACTS, [], made, seed=3)
    assert [output.score for output in report.worst] == [float(rank) for rank in range(10)]
    assert len({output.input for output in report.random}) == 10
    assert report.random == build_report(FACTS, [], made, seed=3).random
    assert report.random != build_report(FACTS, [], made, seed=4).random
    assert len(build_report(FACTS, [], evaluation(texts[:4])).random) == 4


def test_long_texts_are_cut_and_say_so() -> None:
    long = ScoredOutput("i" * (MAX_CHARACTERS + 5), "o" * (1 << 20), ("r",) * (MAX_REFERENCES + 3), 0.0, True, "length")
    report = build_report(FACTS, [], replace(evaluation(["x"]), outputs=(long,)))
    [shown] = report.worst
    assert shown.input.endswith("i… (5 more characters)") and len(shown.output) < MAX_CHARACTERS + 60
    assert len(shown.references) == MAX_REFERENCES + 1 and shown.references[-1] == "… and 3 more"
    page = render_html(report)
    assert len(page) < 60_000 and "input cut to the window" in page and "reached its length limit" in page


def test_hostile_texts_stay_texts_everywhere() -> None:
    page = render_html(hostile_report())
    read = Page(page)
    assert read.tags <= KNOWN, read.tags - KNOWN
    assert not {name for name in read.attributes if name.startswith("on")} | read.attributes & {"src", "href", "style"}
    assert page.count("</style>") == 1 and "<script" not in page
    shown = "".join(read.texts)
    assert "in </style><script>document.title='owned'</script>" in shown, "told as it is"
    assert not set(page) & {"\x00", "\x1b", "\u202e", "\u2066"}
    page.encode()  # no lone surrogate either


def test_the_policy_allows_the_style_sheet_by_its_hash_and_nothing_else() -> None:
    page = render_html(hostile_report())
    policy = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.startswith("default-src &#x27;none&#x27;; style-src &#x27;sha256-") and "unsafe" not in policy
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_the_json_is_a_superset_of_the_runs_own_and_comes_back(tmp_path: Path) -> None:
    report = build_report(FACTS, metrics(5), evaluation(["a", "b"]), task="t", cost={"tokens": 5})
    write_reports(tmp_path, report)
    document = json.loads((tmp_path / "report.json").read_text())
    assert {name: document[name] for name in FACTS} == FACTS
    assert Report.from_dict(document) == report
    assert render_html(Report.from_dict(document)) == (tmp_path / "report.html").read_text() == render_html(report)
    with pytest.raises(InvalidParameter, match="expected its own JSON"):
        Report.from_dict(FACTS)


def test_a_folders_report_can_be_made_again_with_its_scores(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(FACTS))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(5)))
    write_reports(tmp_path, report_of(tmp_path))
    write_reports(tmp_path, report_of(tmp_path, evaluation(["a"])))
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["evaluation"]["scores"]["bleu"]["value"] == 34.5 and document["version"] == FACTS["version"]
    with pytest.raises(InvalidParameter, match="expected a finished run, got FileNotFoundError"):
        report_of(tmp_path / "none")


def test_reports_are_not_written_into_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_reports(tmp_path / "gone", build_report(FACTS, []))


def test_a_curve_stays_inside_of_its_frame_and_skips_what_is_not_finite() -> None:
    chart = line_chart([(1, 5.0), (2, float("nan")), (3, float("inf")), (4, 3.0)], kind="training", label="loss")
    points = chart.split('points="')[1].split('"')[0].split()
    assert len(points) == 2
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 460 and 0 <= y <= 230
    assert line_chart([], kind="training", label="loss") == ""
    assert "<polyline" in line_chart([(10, 2.0)], kind="training", label="loss"), "a single point too"


def test_many_points_become_means_of_stretches() -> None:
    made = thinned([(float(i), float(i % 2)) for i in range(10_000)])
    assert len(made) <= MAX_POINTS
    assert all(abs(y - 0.5) < 0.05 for _, y in made)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.4262, 1.434), (25, 42), (0, 300_000), (3, 3), (0, 0), (-2, 5)])
def test_ticks_are_round_and_reach_around_the_values(low: float, high: float) -> None:
    made = ticks(low, high)
    assert made[0] <= low and made[-1] >= high and 2 <= len(made) <= 8


def test_values_are_told_in_their_units() -> None:
    assert [duration(s) for s in (0.5, 42, 200, 7500)] == ["0.5 s", "42 s", "3 min 20 s", "2 h 5 min"]
    assert flattened({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}) == {"a · b": 1, "a · c · d": "1, 2"}
    assert escaped("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address that hostile texts point at, and every request that came."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page: Path) -> str:
    """The document as a browser has it after everything has run."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser_nothing_runs_and_no_request_leaves(tmp_path: Path, listener: tuple[str, list[str]]) -> None:
    """And to see that the browser would: the same page with a text that was not escaped, without the policy, asks."""
    address, seen = listener
    attack = f"<img src='{address}/image'><script>document.title='owned';fetch('{address}/script')</script>"
    page = tmp_path / "report.html"
    page.write_text(render_html(hostile_report(attack)))
    document = browse(page)
    assert "<title>Training report: " in document and "owned</title>" not in document
    assert "<script" not in document and "<img" not in document and seen == []
    broken = page.read_text().replace("<main>", f"<main>{attack}")
    page.write_text(broken)
    browse(page)
    assert seen == [], "a text that breaks out meets the policy"
    page.write_text(broken.replace("Content-Security-Policy", "x-none"))
    assert "<title>owned</title>" in browse(page) and seen, "the attack works where nothing stops it"
