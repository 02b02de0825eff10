"""Log-probabilities in OpenAI's form: offsets point into the text, the chosen token is told, a stream is the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.decoding.detokenizer import Detokenizer
from server.engine.decoding.text_stream import text_of
from server.engine.types import Finished, FinishReason, Output, Timing, TokenEvent, TokenLogprob, Usage
from server.openai.answers import ChunkWriter, completion
from server.openai.offsets import TextOffsets, TokenTexts
from tests.support.byte_fallback import byte_fallback_tokenizer
from tests.support.prefixes import save_tiny_tokenizer

QUICK = settings(max_examples=150, deadline=None, derandomize=True)
BYTE_FALLBACK = byte_fallback_tokenizer()
PIECES = st.lists(st.sampled_from(["a", " b", "é", "☕", "漢字", "👩‍🍳", "<|endoftext|>", "."]), max_size=10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")).backend_tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def offsets_of(tokenizer: Any, token_ids: list[int]) -> list[int]:
    offsets = TextOffsets(TokenTexts(tokenizer))
    return [offsets.add(token_id) for token_id in token_ids]


def streamed(tokenizer: Any, token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], Output]:
    """A stream's choices and its output, of tokens that the engine chose one by one."""
    detokenizer, writer = Detokenizer(tokenizer, stop), ChunkWriter(0, TokenTexts(tokenizer))
    choices: list[dict[str, Any]] = []
    taken: list[TokenLogprob] = []
    for token_id in token_ids:
        stopped = detokenizer.push(token_id)
        taken.append(TokenLogprob(token_id, -1.5, ((token_id, -1.5),)))
        last = stopped or len(taken) == len(token_ids)
        if last:
            stopped = stopped or detokenizer.finish()
        choices += writer.token(TokenEvent("r", 0, detokenizer.take(final=last), (token_id,), (taken[-1],)))
        if last:
            break
    ids = tuple(one.token_id for one in taken)
    output = Output(detokenizer.text, ids, FinishReason.STOP, logprobs=tuple(taken))
    return choices + writer.end(finished(output)), output


def finished(output: Output) -> Finished:
    return Finished("r", (output,), Usage(1, 0, len(output.token_ids)), Timing(0, 1, 2))


def logprobs_of(tokenizer: Any, output: Output) -> dict[str, list[Any]]:
    body = completion("id", 0, "e2e", [finished(output)], [TokenTexts(tokenizer)])
    logprobs: dict[str, list[Any]] = body["choices"][0]["logprobs"]
    return logprobs


def test_special_tokens_and_parts_of_characters_do_not_move_the_offsets(tokenizer: Any) -> None:
    token_ids = ids_of(tokenizer, "a<|endoftext|>漢b")
    texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids]
    assert len(token_ids) == 6  # the character takes three
    assert texts[1] == "<|endoftext|>"
    assert offsets_of(tokenizer, token_ids) == [0, 1, 1, 1, 1, 2]


@QUICK
@given(pieces=PIECES)
def test_an_offset_is_the_number_of_whole_characters_before_the_token(tokenizer: Any, pieces: list[str]) -> None:
    token_ids = ids_of(tokenizer, "".join(pieces))
    expected = []
    for at in range(len(token_ids)):
        expected.append(len(tokenizer.decode(token_ids[:at], skip_special_tokens=True).rstrip("\ufffd")))
    assert offsets_of(tokenizer, token_ids) == expected


@QUICK
@given(data=st.data())
def test_whatever_the_tokens_their_text_stands_at_their_offset(tokenizer: Any, data: st.DataObject) -> None:
    vocabulary = st.integers(0, tokenizer.get_vocab_size() - 1)
    token_ids = data.draw(st.lists(vocabulary, max_size=30))
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    for token_id, offset in zip(token_ids, offsets_of(tokenizer, token_ids), strict=True):
        token = tokenizer.decode([token_id], skip_special_tokens=True)
        if "\ufffd" not in token:
            assert text[offset : offset + len(token)] == token


@QUICK
@given(token_ids=st.lists(st.integers(0, 299) | st.integers(128 + 3, 255 + 3), max_size=20))
@pytest.mark.parametrize("prompt", [[], [1], [1, 299]])
def test_offsets_point_into_the_text_of_a_byte_fallback_tokenizer(prompt: list[int], token_ids: list[int]) -> None:
    """The first token of an output has a space where its prompt has text; a bad byte is one character."""
    text = text_of(BYTE_FALLBACK, prompt, token_ids)
    offsets = TextOffsets(TokenTexts(BYTE_FALLBACK, prompt))
    for at, token_id in enumerate(token_ids):
        offset, before = offsets.add(token_id), text_of(BYTE_FALLBACK, prompt, token_ids[:at])
        if token_id < 3 or 128 + 3 <= token_id < 256 + 3:  # special, or a part of a character
            assert len(before.rstrip("\ufffd")) <= offset <= len(before)
        else:
            assert offset == len(before)
            assert text[offset:].startswith(text_of(BYTE_FALLBACK, prompt + token_ids[:at], [token_id]))


def test_the_bytes_of_a_character_begin_where_it_begins() -> None:
    offsets = TextOffsets(TokenTexts(BYTE_FALLBACK, [1]))
    spelled = [byte + 3 for byte in (*b"a", *"☕".encode(), 0xFF, *"é".encode(), *b"b")]
    assert [offsets.add(token_id) for token_id in spelled] == [0, 1, 1, 1, 2, 3, 3, 4]


@QUICK
@given(token_ids=st.lists(st.integers(256 + 3, 299) | st.integers(ord("a") + 3, ord("z") + 3), max_size=20))
def test_the_texts_of_an_outputs_tokens_are_its_text(token_ids: list[int]) -> None:
    """Also where tokens begin with SentencePiece's space: `the` and ` the` are two texts."""
    texts = TokenTexts(BYTE_FALLBACK)
    assert "".join(map(texts.token, token_ids)) == text_of(BYTE_FALLBACK, [299], token_ids)


def test_a_special_token_has_its_name_for_a_text() -> None:
    assert [TokenTexts(BYTE_FALLBACK).token(token_id) for token_id in range(3)] == ["<unk>", "<s>", "</s>"]


def test_the_chosen_token_is_in_top_logprobs_also_where_it_is_none_of_the_likeliest(tokenizer: Any) -> None:
    a, b, c = ids_of(tokenizer, "abc")
    logprobs = (
        TokenLogprob(a, -0.5, ((a, -0.5), (b, -2.0))),
        TokenLogprob(c, -7.0, ((a, -0.5), (b, -2.0))),
        TokenLogprob(c, -7.0),
    )
    body = logprobs_of(tokenizer, Output("acc", (a, c, c), FinishReason.LENGTH, logprobs=logprobs))
    assert body["top_logprobs"] == [{"a": -0.5, "b": -2.0}, {"a": -0.5, "b": -2.0, "c": -7.0}, {"c": -7.0}]


def test_a_likelier_token_of_the_same_text_does_not_hide_the_chosen_one(tokenizer: Any) -> None:
    first, second = ids_of(tokenizer, "☕")[:2]  # each alone is an incomplete character
    chosen = TokenLogprob(second, -3.0, ((first, -0.1), (second, -3.0)))
    body = logprobs_of(tokenizer, Output("\ufffd", (second,), FinishReason.LENGTH, logprobs=(chosen,)))
    assert body["top_logprobs"] == [{"\ufffd": -3.0}]


@QUICK
@given(pieces=PIECES, stop=st.sampled_from([(), ("b",), ("a b",), ("漢字.", "é"), ("☕a",)]))
def test_a_streams_logprobs_joined_are_those_of_the_whole(
    tokenizer: Any, pieces: list[str], stop: tuple[str, ...]
) -> None:
    token_ids = ids_of(tokenizer, "".join(pieces)) or [0]
    choices, output = streamed(tokenizer, token_ids, stop)
    whole = logprobs_of(tokenizer, output)
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert {name: [value for body in told for value in body[name]] for name in whole} == whole
    assert "".join(choice["text"] for choice in choices) == output.text
    assert all(0 <= offset <= len(output.text) for offset in whole["text_offset"])


def test_a_token_goes_out_with_its_text(tokenizer: Any) -> None:
    choices, _ = streamed(tokenizer, ids_of(tokenizer, "a漢b"))
    told = [(choice["text"], choice["logprobs"] and len(choice["logprobs"]["tokens"])) for choice in choices]
    assert told == [("a", 1), ("漢", 3), ("b", 1), ("", None)]
