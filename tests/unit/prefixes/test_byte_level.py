"""A text's least tokens, and the places where it can be cut, against the tokens of the whole text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from prefixes.byte_level import NFC_SHRINKS, ByteLevelRules, byte_level_rules
from prefixes.errors import InputTooLong
from prefixes.prompt import PromptEncoder
from tests.support.paths import ROOT

FOLDERS = [
    *(ROOT / "prefixes" / "demo" / family for family in ("gpt2", "bart")),
    *(ROOT.parent / "shared" / "data" / "tokenizers" / family for family in ("gpt2", "bart")),
]
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
ADDED = ("<name>", "a b", "\n- ", "<|begin of text|>")
PIECES = st.sampled_from(
    [" ", "   ", "\t", "\n", "\r\n", "\xa0", "\u2028", "\u200d", "\ufeff", "\x1c", "\x85", "'", "'s", "'re", "'LL",
     "\u2019t", "e\u0301", "\u0301", "ñ", "ß", "İ", "\ufb01", "中文", "。", "\uff0c", "かな", "한글", "ไทย", "😀",
     "👩\u200d👧", "\U0001f1e6", "½", "\u0663", "²", "0", "123", "a", "ab", "word", "the", "x" * 40, "-" * 30, "=" * 70,
     "...", "_", "/", "#", "\\", "\x00", "\x7f", "<|endoftext|>", "<mask>", "<s>", "</s>", "<na", "me>", ".\n",
     "!\n\n", "1234567", "don't", "I'LL", "\u212a", "\u1fef", "\u1fbe\u0308\u0341", "\u1100\u1161\u11a8", "\u11a8",
     "\u0308", "\u0327\u0323", "\u2126\u0313", "\u0344", *ADDED]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=40).map("".join)


def split_by(pattern: str) -> pre_tokenizers.Sequence:
    splits = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
    return pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits_apart() -> pre_tokenizers.Sequence:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


LATER: dict[str, Callable[[], Any]] = {
    "llama3": lambda: split_by(LLAMA3_REGEX),
    "qwen": lambda: split_by(PRETOKENIZE_REGEX),
    "smollm2": digits_apart,
}
"""Pre-tokenizers of later models."""


def trained(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits as the later model's, with merges wherever it lets them be."""
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    backend.normalizer = normalizers.NFC() if name == "qwen" else None
    backend.pre_tokenizer, backend.decoder = LATER[name](), decoders.ByteLevel()
    texts = ["the word. 123 the  word!\n\nab's 中文。\nа é\n", "e\u0301 I'LL x-y\r\n 한글 = 1234567 don't.\n"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens([AddedToken("<name>", normalized=False), AddedToken("a b", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module", params=[*FOLDERS, "added", *LATER], ids=lambda one: "-".join(str(one).split("/")[-2:]))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each real tokenizer; one with added tokens that are not special; and one of each later kind."""
    if request.param in LATER:
        return trained(request.param)
    folder = FOLDERS[0] if request.param == "added" else request.param
    if not folder.exists():
        pytest.skip(f"needs {folder.name}'s vocabulary in ../shared/data")
    loaded = AutoTokenizer.from_pretrained(str(folder))
    if request.param == "added":
        loaded.add_tokens([*ADDED[:-1]])
        loaded.add_special_tokens({"additional_special_tokens": [ADDED[-1]]})
    return loaded


@pytest.fixture(scope="module")
def rules(tokenizer: Any) -> ByteLevelRules:
    found = byte_level_rules(tokenizer.backend_tokenizer)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, start=st.integers(0, 60))
def test_the_tokens_before_a_cut_are_those_that_the_whole_text_begins_with(
    encoder: PromptEncoder, rules: ByteLevelRules, text: str, start: int
) -> None:
    whole = encoder.encode_text(text)
    assert len(whole) >= rules.least_tokens(len(text.encode()))
    place = rules.cut_from(text, start, len(text))
    while place is not None:
        assert place >= start
        before = encoder.encode_text(text[:place])
        assert before == whole[: len(before)], (text[:place], text[place:])
        place = rules.cut_from(text, place + 1, len(text))


def test_a_text_of_the_longest_tokens_has_no_fewer_than_the_least(
    tokenizer: Any, encoder: PromptEncoder, rules: ByteLevelRules
) -> None:
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    longest = max(vocabulary, key=len)
    text = tokenizer.backend_tokenizer.decoder.decode([longest])
    assert encoder.encode_text(text) == [vocabulary[longest]]
    assert rules.least_tokens(len(text.encode())) == 1


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, repeat=st.integers(1, 12), room=st.integers(1, 40))
def test_a_text_cut_to_a_window_keeps_the_tokens_of_the_whole_text(
    encoder: PromptEncoder, text: str, repeat: int, room: int
) -> None:
    text *= repeat
    whole = encoder.encode_text(text)
    fitted = encoder.fit("{input}", text, room, truncate=True)
    assert fitted.token_ids == tuple(whole[:room])
    assert fitted.truncated == (len(whole) > room)
    assert fitted.got <= len(whole)
    refused = encoder.fit("{input}", text, room)
    assert (refused.token_ids is None) == (len(whole) > room)
    assert refused.got <= len(whole)


@pytest.mark.parametrize(
    "text",
    ["ab" * (1 << 19), " " * (1 << 19) + "x", "word " + "y" * (1 << 19) + " end", "中" * (1 << 17), "a\r\n" * 1000],
    ids=["word", "spaces", "word between", "ideographs", "lines"],
)
def test_a_word_or_a_run_of_spaces_of_any_length_is_cut_as_the_whole_text_is(
    encoder: PromptEncoder, text: str
) -> None:
    fitted = encoder.fit("{input}", text, 50, truncate=True)
    assert fitted.token_ids == tuple(encoder.encode_text(text)[:50])
    assert fitted.truncated


def test_only_a_head_of_a_long_text_is_tokenised(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    monkeypatch.setattr("prefixes.prompt._encode", _noting(encoded))
    text = "name : Blue Spice, " * 50_000
    encoder.fit("{input}", text, 100, truncate=True)
    assert 0 < sum(map(len, encoded)) < 4000
    encoded.clear()
    refused = encoder.fit("a{input}", text, 100)
    assert (refused.token_ids, refused.at_least, encoded) == (None, True, ["a", ""])
    assert 100 < refused.got <= 2 + len(text)


def test_a_text_is_tokenised_up_to_a_bound(encoder: PromptEncoder) -> None:
    assert encoder.fit("{input}", "x " * 5000, 10, truncate=True, max_bytes=1000).truncated
    with pytest.raises(InputTooLong, match="at most 1000 bytes") as caught:
        encoder.fit("{input}", "x" * 1001, 10, truncate=True, max_bytes=1000)
    assert caught.value.detail == {"expected": 1000, "got": 1001}
    assert encoder.fit("{input}", "x" * 1000, 10, truncate=True, max_bytes=1000).truncated


def _noting(encoded: list[str]) -> Callable[[Any, str], list[int]]:
    from prefixes.prompt import _encode

    def encode(backend: Any, text: str) -> list[int]:
        encoded.append(text)
        return _encode(backend, text)

    return encode


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDERS[0] / "tokenizer.json"))


def normalised(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.NFKC()


def composing_added_tokens(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("K b", normalized=True)])


def split_otherwise(backend: Tokenizer) -> None:
    backend.pre_tokenizer = split_by(PRETOKENIZE_REGEX.replace("+|", "|", 1))


def split_twice(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])


def unsplit(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)


def taking_spaces(backend: Tokenizer) -> None:
    backend.add_tokens([AddedToken("<x>", lstrip=True)])


def whole_words(backend: Tokenizer) -> None:
    backend.add_tokens([AddedToken("x", single_word=True)])


@pytest.mark.parametrize(
    "change",
    [normalised, composing_added_tokens, split_otherwise, split_twice, unsplit, taking_spaces, whole_words],
)
def test_nothing_is_taken_for_proven_of_another_kind_of_tokenizer(change: Callable[[Tokenizer], None]) -> None:
    backend = demo()
    assert byte_level_rules(backend) is not None
    change(backend)
    assert byte_level_rules(backend) is None


@pytest.mark.parametrize(
    "field", [{"dropout": 0.1}, {"end_of_word_suffix": "@"}, {"continuing_subword_prefix": "@"}, {"vocab": {"a": 0}}]
)
def test_nothing_is_taken_for_proven_of_another_kind_of_model(field: dict[str, Any]) -> None:
    class Described:
        def to_str(self) -> str:
            described = json.loads(demo().to_str())
            described["model"].update(field)
            return json.dumps(described)

    assert byte_level_rules(Described()) is None


def test_an_unproven_tokenizer_tokenises_the_whole_text_up_to_the_bound() -> None:
    loaded = AutoTokenizer.from_pretrained(str(FOLDERS[0]))
    normalised(loaded.backend_tokenizer)
    encoder, text = PromptEncoder(loaded), "e\u0301 " * 400
    refused = encoder.fit("{input}", text, 10)
    assert (refused.token_ids, refused.got, refused.at_least) == (None, len(encoder.encode_text(text)), False)
    with pytest.raises(InputTooLong):
        encoder.fit("{input}", text, 10, truncate=True, max_bytes=1000)


def test_composing_leaves_a_quarter_of_a_texts_bytes() -> None:
    """Over all of Unicode: a text's bytes are at most those of its decomposed characters' longest single forms."""
    characters = map(chr, (*range(0xD800), *range(0xE000, 0x110000)))
    parts = {one: decomposed for one in characters if (decomposed := unicodedata.normalize("NFD", one)) != one}
    longest = {part: len(part.encode()) for part in "".join(parts.values())}
    for character, decomposed in parts.items():
        if len(decomposed) == 1:
            longest[decomposed] = max(longest[decomposed], len(character.encode()))
    for character, decomposed in {**parts, **{part: part for part in longest}}.items():
        most = sum(longest[part] for part in decomposed)
        assert len(character.encode()) <= most
        if unicodedata.normalize("NFC", character) == character:
            assert most <= NFC_SHRINKS * len(character.encode()), hex(ord(character))
