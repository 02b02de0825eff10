"""SentencePiece's space stands before a prompt's first words and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from prefixes.leading_space import without_leading_space
from prefixes.prompt import AddedTokens, PromptEncoder
from tests.support.byte_fallback import STARTS, save_byte_fallback_tokenizer
from tests.support.prefixes import save_tiny_tokenizer

FIRST = (1,)
QUICK = settings(max_examples=200, deadline=None, derandomize=True)
PIECES = st.sampled_from(["Hello", "world", " ", "  ", "a", "☕", "é", "\n", ":", "the"])
TEXTS = st.lists(PIECES, max_size=5).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {start: save_byte_fallback_tokenizer(tmp_path_factory.mktemp(start), start) for start in STARTS}


@pytest.fixture(params=STARTS)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


@pytest.fixture(scope="module")
def encoders(tokenizers: dict[str, Any]) -> dict[str, PromptEncoder]:
    return {start: PromptEncoder(tokenizer, AddedTokens(FIRST)) for start, tokenizer in tokenizers.items()}


@pytest.fixture
def encoder(tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, AddedTokens(FIRST))


def tokens(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


@QUICK
@given(opening=TEXTS, begin=st.sampled_from(["", "<s>", "<s></s>"]), text=TEXTS.filter(bool), closing=TEXTS)
def test_the_text_of_a_prompt_is_the_template_with_the_input_in_it(
    tokenizers: dict[str, Any],
    encoders: dict[str, PromptEncoder],
    opening: str,
    begin: str,
    text: str,
    closing: str,
) -> None:
    template = f"{begin}{opening}</s>{{input}}</s>{closing}"
    ids = {start: encoder.encode(template, text) for start, encoder in encoders.items()}
    for start in ("legacy", "never"):
        assert tokenizers[start].decode(ids[start], skip_special_tokens=True) == opening + text + closing
    if not (opening or text).startswith(" "):  # Metaspace adds no space to one that is there
        assert ids["always"] == ids["first"] == ids["legacy"]


def test_an_input_by_itself_is_what_the_models_tokenizer_gives(tokenizer: Any, encoder: PromptEncoder) -> None:
    for text in ("Hello world", " the pub", "a☕", "a\n"):
        whole = tokenizer(text)["input_ids"]
        for template in ("{input}", "<s>{input}"):
            assert encoder.encode(template, text) == whole
            assert list(encoder.fit(template, text, len(whole) - 1, truncate=True).token_ids or ()) == whole[:-1]


def test_no_space_stands_before_what_goes_on_in_a_text(tokenizer: Any, encoder: PromptEncoder) -> None:
    start = "" if tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens == ["a"] else "▁"
    assert tokens(tokenizer, encoder.encode("a:{input}:b</s>c", "Hello")) == f"<s>{start}a:Hello:b</s>c"
    assert tokens(tokenizer, encoder.encode("a: {input} b", "Hello")) == f"<s>{start}a:▁Hello▁b"
    assert tokens(tokenizer, encoder.encode("<s>a</s>b{input}", "c")) == f"<s>{start}a</s>bc"


def test_a_templates_tokens_do_not_depend_on_the_input(encoder: PromptEncoder) -> None:
    before, after = encoder.encode("a:{input}", ""), encoder.encode("{input}b c", "")[1:]
    for text in ("", "Hello", " ", "☕"):
        ids = encoder.encode("a:{input}b c", text)
        assert (ids[: len(before)], ids[len(ids) - len(after) :]) == (before, after)


@pytest.mark.parametrize(
    "splitter",
    [None, pre_tokenizers.ByteLevel(add_prefix_space=False),
     pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])],
    ids=["none", "byte-level", "words that all begin with a space"],
)  # fmt: skip
def test_a_tokenizer_that_puts_no_space_before_a_text_is_left_as_it_is(splitter: Any) -> None:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    if splitter:
        backend.pre_tokenizer = splitter
    described = json.loads(backend.to_str())
    assert without_leading_space(described) == described


def test_a_byte_level_tokenizer_is_taken_likewise(tmp_path: Path) -> None:
    tokenizer = save_tiny_tokenizer(tmp_path)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.normalizer = normalizers.Prepend("x")
    ids = PromptEncoder(tokenizer).encode("a{input}", "b")
    assert backend.decode(ids) == " xab"
