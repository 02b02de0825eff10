"""Conversion of the corpora, on small files of their formats and on the corpora themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefixes.errors import InvalidParameter
from tests.support.paths import SHARED
from trainer.data.convert import Conversion, convert
from trainer.data.corpora import CorpusError, detokenize, held_out
from trainer.data.xsum import read_xsum

E2E = "name : The Vaults | Type : pub||The Vaults , a pub , is n't cheap : £ 30 . \n" * 2
DART = [
    {
        "tripleset": [["A", "SIZE_OF", "1"], ["A", "IN", "B"]],
        "annotations": [{"source": "e2e", "text": "A is  1."}, {"source": "webnlg", "text": "A in B"}],
    },
    {
        "tripleset": [["C", "IN", "D"]],
        "annotations": [{"source": "webnlg", "text": "C in D"}, {"source": "x", "text": None}],
    },
]
SCITLDR = [
    {"paper_id": "p1", "source": ["First.", " Second ."], "target": ["One.", "Two."]},
    {"paper_id": "p2", "source": ["Third."], "target": ["Three."]},
]
XSUM = [
    {"document": "A long\narticle | with a bar.", "summary": "Short. ", "id": "17"},
    {"document": "Another\u2028one.", "summary": "Other.", "id": "18"},
]
WEBNLG: dict[str, Any] = {
    "entries": [
        {
            "1": {
                "category": "Food",
                "modifiedtripleset": [
                    {"subject": "A", "property": "isIn", "object": "B_C"},
                    {"subject": "A", "property": "has", "object": "D"},
                ],
                "lexicalisations": [{"comment": "good", "lex": "A is in B."}, {"comment": "bad", "lex": "no"}],
            }
        }
    ]
}


def jsonl(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


WHOLE = (
    ("e2e", E2E), ("dart", json.dumps(DART)), ("webnlg", json.dumps(WEBNLG)), ("scitldr", jsonl(SCITLDR)),
    ("xsum", jsonl(XSUM)),
)  # fmt: skip


def converted(tmp_path: Path, conversion: Conversion, content: str) -> list[dict[str, str]]:
    source, output = tmp_path / "source", tmp_path / "out.jsonl"
    source.write_text(content)
    counts = convert(conversion, source, output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert counts.lines == len(lines)
    assert counts.inputs == len({line["input"] for line in lines})
    return lines


def test_e2e_gives_a_line_per_reference(tmp_path: Path) -> None:
    lines = converted(tmp_path, Conversion("e2e"), E2E)
    assert lines == 2 * [
        {"input": "name : The Vaults | Type : pub", "target": "The Vaults , a pub , is n't cheap : £ 30 ."}
    ]


def test_reversed_cleaned_and_lower_cased(tmp_path: Path) -> None:
    lines = converted(tmp_path, Conversion("e2e", reverse=True, clean=True, lower=True), E2E)
    assert lines[0] == {"input": "the vaults, a pub, is n't cheap: £30.", "target": "name : The Vaults | Type : pub"}


def test_webnlg_keeps_only_good_lexicalisations_and_a_bar_before_every_triple(tmp_path: Path) -> None:
    lines = converted(tmp_path, Conversion("webnlg"), json.dumps(WEBNLG))
    assert lines == [{"input": " | A : isIn : B_C | A : has : D", "target": "A is in B."}]


def test_dart_lower_cases_relations_and_leaves_out_sources(tmp_path: Path) -> None:
    lines = converted(tmp_path, Conversion("dart", without=("webnlg",)), json.dumps(DART))
    assert lines == [{"input": "A : size_of : 1 | A : in : B", "target": "A is 1."}]


def test_scitldr_gives_a_line_per_summary_of_an_abstract(tmp_path: Path) -> None:
    lines = converted(tmp_path, Conversion("scitldr"), jsonl(SCITLDR))
    assert lines == [
        {"input": "First. Second .", "target": "One."},
        {"input": "First. Second .", "target": "Two."},
        {"input": "Third.", "target": "Three."},
    ]


def test_xsum_is_read_as_datasets_hubs_give_it(tmp_path: Path) -> None:
    lines = converted(tmp_path, Conversion("xsum"), jsonl(XSUM))
    assert lines == [
        {"input": "A long article | with a bar.", "target": "Short."},
        {"input": "Another one.", "target": "Other."},
    ]


def test_xsum_is_read_from_line_aligned_files(tmp_path: Path) -> None:
    (tmp_path / "train.source").write_text("An article\x85 here.\nAnother.\n")
    (tmp_path / "train.target").write_text("Short.\nOther.")
    convert(Conversion("xsum"), tmp_path / "train", tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"input": "An article here.", "target": "Short."},
        {"input": "Another.", "target": "Other."},
    ]
    assert [pair.origin for pair in read_xsum(tmp_path / "train")] == ["train/1", "train/2"]


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("a\nb\n", "x\n", "expected as many lines in both, got 2 and 1"),
        ("a\nb\n", "x\n \n", "train.target line 2: expected a text, got an empty line"),
        ("a\n", None, "cannot read .*train.target"),
        ("a\nb\n", "x\n\u200b\n", "train.target line 2: expected a text, got an empty line"),
        ("\ufeffa\n", "x\n", "train.source line 1: expected UTF-8 without a byte order mark"),
        ("a\nb\n", "x\n\ufeffy\n", "train.target line 2: expected UTF-8 without a byte order mark"),
    ],
)
def test_files_that_are_not_line_aligned_are_named(
    tmp_path: Path, source: str, target: str | None, said: str
) -> None:
    (tmp_path / "train.source").write_text(source)
    if target is not None:
        (tmp_path / "train.target").write_text(target)
    with pytest.raises(CorpusError, match=said):
        convert(Conversion("xsum"), tmp_path / "train", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_all_summaries_of_an_abstract_fall_on_one_side(tmp_path: Path) -> None:
    papers = [{"paper_id": f"p{i}", "source": [f"Text {i}."], "target": ["a", "b"]} for i in range(200)]
    sides = {split: converted(tmp_path, Conversion("scitldr", split), jsonl(papers)) for split in ("train", "held-out")}
    inputs = {split: [line["input"] for line in lines] for split, lines in sides.items()}
    assert len(inputs["train"]) + len(inputs["held-out"]) == 400
    assert inputs["held-out"] and not set(inputs["train"]) & set(inputs["held-out"])


def test_paper_spaces_surround_input_and_target(tmp_path: Path) -> None:
    line = converted(tmp_path, Conversion("dart", paper_spaces=True, without=("webnlg",)), json.dumps(DART))[0]
    assert line == {"input": " A : size_of : 1 | A : in : B", "target": " A is 1. "}


def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order(tmp_path: Path) -> None:
    content = "".join(f"name : N{i}||It is N{i} .\n" for i in range(50))
    drawn = [converted(tmp_path, Conversion("e2e", sample=10, seed=seed), content) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [int(line["input"].removeprefix("name : N")) for line in drawn[0]]
    assert len(numbers) == 10 and numbers == sorted(numbers)
    with pytest.raises(InvalidParameter, match="sample: expected at most 50 lines, got 51"):
        converted(tmp_path, Conversion("e2e", sample=51), content)


@pytest.mark.parametrize(
    ("corpus", "content", "said"),
    [
        ("e2e", "no bars here\n", "line 1: expected fields"),
        ("dart", "{", "expected JSON"),
        ("webnlg", "{}", "expected a list of entries under 'entries'"),
        ("dart", '[{"tripleset": 1}]', "entry 0"),
        ("webnlg", '{"entries": [{"1": {}}]}', "entry 0"),
        ("dart", "[]", "no reference is left"),
        ("scitldr", '{"paper_id": "p", "source": ["a"]}', "line 1: expected paper_id, source and target"),
        ("xsum", jsonl(XSUM) + "{", "line 3: expected JSON"),
        ("xsum", jsonl(XSUM) + "[]", "line 3: expected an object, got list"),
        ("xsum", '{"document": "a", "id": "1"}', "line 1, field 'summary': expected a text, got none"),
        ("xsum", '{"document": " ", "summary": "b", "id": "1"}', "line 1, field 'document': .* an empty one"),
        ("xsum", '{"document": "a", "summary": "b", "id": 1}', "line 1, field 'id': expected a text, got int"),
        ("xsum", jsonl(XSUM) + r'{"document": "a", "summary": "\ud800", "id": "1"}', "line 3, .*'summary': .*surr"),
        ("xsum", r'{"document": "a", "summary": "\u200b", "id": "1"}', "line 1, .*'summary': .* an empty one"),
        ("xsum", r'{"document": "\ufeffa", "summary": "b", "id": "1"}', "line 1, .*'document': .* a byte order mark"),
        ("xsum", '{"document": "a", "document": "c", "summary": "b", "id": "1"}', "line 1: .* a key twice"),
        ("scitldr", '{"paper_id": "p", "source": ["a"], "target": ["b"], "target": ["c"]}', "line 1: .*a key twice"),
        ("scitldr", '{"paper_id": "p", "source": ["a"], "target": ["\u2060"]}', "line 1: expected a paper with"),
        ("scitldr", "[" * 100_000, "line 1: .*nested too deeply"),
        ("dart", '[{"tripleset": [["A", "B", "C"]], "tripleset": [], "annotations": []}]', "a key twice"),
        ("dart", '[{"tripleset": [], "annotations": [{"source": "x", "text": "A."}]}]', "entry 0: .*no triple"),
        ("dart", r'[{"tripleset": [["\ufeffA", "B", "C"]], "annotations": []}]', "entry 0: .*a byte order mark"),
        ("dart", "[" * 100_000, "nested too deeply"),
        ("webnlg", '{"entries": [], "entries": []}', "a key twice"),
        ("e2e", E2E + "name : A||\u200b\n", "line 3: expected fields"),
        ("e2e", E2E + "\u2060||It .\n", "line 3: expected fields"),
        ("e2e", E2E + "name : A||\ufeffIt .\n", "line 3: expected fields"),
        ("e2e", E2E + "\ufeff" + E2E, "line 3: expected UTF-8 without a byte order mark, got one"),
        *((corpus, "\ufeff" + content, "line 1: expected UTF-8 without a byte order") for corpus, content in WHOLE),
    ],
)
def test_a_foreign_file_is_named_and_leaves_no_output(tmp_path: Path, corpus: Any, content: str, said: str) -> None:
    (tmp_path / "source").write_text(content)
    with pytest.raises(CorpusError, match=said):
        convert(Conversion(corpus), tmp_path / "source", tmp_path / "out.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_options_of_another_corpus_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="without"):
        Conversion("e2e", without=("webnlg",))
    with pytest.raises(InvalidParameter, match="clean"):
        Conversion("dart", clean=True)


def test_the_held_out_side_ignores_the_order_of_fields() -> None:
    sources = [f"name : N{i} | Type : pub | area : riverside" for i in range(400)]
    turned = [" | ".join(reversed(source.split(" | "))) for source in sources]
    assert [held_out(s) for s in sources] == [held_out(t) for t in turned]
    assert 5 < sum(held_out(s) for s in sources) < 40


def test_detokenize_restores_punctuation_prices_and_hyphens() -> None:
    tokenised = "It 's a family - Friendly pub , isn 't it ? From £ 20 - £ 25 ."
    assert detokenize(tokenised) == "It's a family-friendly pub, isn't it? From £20-£25."


@pytest.mark.parametrize(
    "text",
    [
        "The Eagle - a pub - is cheap.",
        "A pub by the riverside - it is family-friendly.",
        "Prices are in the high range - but it is good.",
        "Rated 5 - it's the best.",
        "It is in the city centre - near Café Rouge.",
        "Strada - 3 out of 5.",
        "Blue Spice - highly rated.",
        "Cocum- a pub.",
        "Meals from £20 - not cheap.",
        "A restaurant - family friendly.",
    ],
)
def test_detokenize_leaves_a_dash_between_clauses(text: str) -> None:
    assert detokenize(text) == text


@pytest.mark.parametrize(
    ("tokenised", "text"),
    [
        ("non - family - friendly", "non-family-friendly"),
        ("kids - Friendly", "kids-friendly"),
        ("5 - star , high - priced", "5-star, high-priced"),
        ("family- friendly", "family-friendly"),
        ("£ 20 - 25", "£20-25"),
        ("fast - food take - away", "fast-food take-away"),
        ("The Eagle - a low - cost pub - is mid - priced .", "The Eagle - a low-cost pub - is mid-priced."),
    ],
)
def test_detokenize_joins_a_compound(tokenised: str, text: str) -> None:
    assert detokenize(tokenised) == text


@pytest.mark.corpora
def test_the_corpora_give_their_documented_counts(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip(f"needs {SHARED}")
    out = tmp_path / "out.jsonl"
    assert convert(Conversion("e2e"), SHARED / "e2e" / "src1_test.txt", out).inputs == 630
    assert convert(Conversion("e2e"), SHARED / "e2e" / "src1_valid.txt", out).lines == 4672
    assert convert(Conversion("webnlg"), SHARED / "webnlg2017" / "train.json", out).lines == 18025  # good ones
    assert convert(Conversion("dart"), SHARED / "dart" / "dev.json", out).lines == 6980
    kept = convert(Conversion("dart", without=("webnlg",)), SHARED / "dart" / "dev.json", out)
    train = convert(Conversion("dart", "train", without=("webnlg",)), SHARED / "dart" / "dev.json", out)
    held = convert(Conversion("dart", "held-out", without=("webnlg",)), SHARED / "dart" / "dev.json", out)
    assert kept.lines == 4712 == train.lines + held.lines
    tldr = convert(Conversion("scitldr"), SHARED / "scitldr" / "train.jsonl", out)
    assert (tldr.inputs, tldr.lines) == (1991, 1992), "one abstract stands there twice"
    tldr = convert(Conversion("scitldr"), SHARED / "scitldr" / "test.jsonl", out)
    assert tldr.inputs == 618 < tldr.lines
