"""From texts to sequences and batches: what is learnt, what is cut, what is refused, for both kinds of backbone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefixes.backbone import Backbone, load_backbone
from prefixes.prompt import PromptEncoder
from prefixes.spec import PrefixSpec
from server.engine.decoding.text_stream import text_of
from tests.support.bart import tiny_bart
from tests.support.byte_fallback import STARTS, save_byte_fallback_tokenizer
from tests.support.llama import save_tiny_llama
from tests.support.paths import SHARED
from tests.support.prefixes import save_tiny_gpt2
from tests.support.trainer import (
    BART_TEMPLATE,
    FAMILIES,
    TEMPLATE,
    tiny_backbone,
    toy_data,
    toy_examples,
    toy_pairs,
    toy_plan,
)
from trainer.data.dataset import Dataset, Example, InvalidData
from trainer.data.sequences import TokenExample, collate, epoch_batches, split_batch, target_opening, tokenize
from trainer.training.config import GPT2_TEMPLATE, TrainConfig
from trainer.training.plan import plan_prefix

P = 4
WINDOW = 64


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("bart"), family="bart")


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    found: Backbone = request.getfixturevalue(request.param)
    return found


def data(*pairs: tuple[str, str]) -> Dataset:
    return Dataset(tuple(Example(line, *pair) for line, pair in enumerate(pairs, 1)), "sha256:0")


def plan_of(backbone: Backbone, **options: object) -> PrefixSpec:
    return toy_plan(backbone, TrainConfig.of("e2e", {"prefix_length": P, **options}))


def letters(count: int) -> str:
    """So many tokens, in either vocabulary."""
    return "\x01" * count


def test_target_and_end_token_are_learnt_and_nothing_else(backbone: Backbone) -> None:
    examples = toy_examples(backbone)[:3]
    batch = collate(examples)
    places = [(row, at) for row, length in enumerate(batch.read.lengths) for at in range(length)]
    following = [examples[row].ids[at + 1] for row, at in (places[index] for index in batch.predict.tolist())]
    assert batch.targets.tolist() == following, "each is predicted where the token before it stands"
    assert len(following) == sum(example.learnt for example in examples)
    opening = list(target_opening(backbone))
    for row, pair in enumerate(toy_pairs()[:3]):
        learnt = [int(t) for t, at in zip(batch.targets, batch.predict, strict=True) if places[int(at)][0] == row]
        assert learnt[-1] == backbone.eos_token_ids[0]
        assert learnt[: len(opening)] == opening
        assert backbone.tokenizer.decode(learnt[len(opening) : -1]) == pair["target"]


def test_a_decoder_alone_reads_the_input_itself(gpt2: Backbone) -> None:
    (example,) = tokenize(gpt2, plan_of(gpt2), data(("ab", "c"))).examples
    prompt = gpt2.prompt_encoder.encode(TEMPLATE, "ab")
    assert example.ids == (*prompt, *gpt2.prompt_encoder.encode_text("c"), gpt2.eos_token_ids[0])
    assert (example.start, example.input_ids) == (len(prompt), ())
    assert collate([example]).inputs is None


def test_an_encoder_decoder_gets_the_papers_sequences(bart: Backbone) -> None:
    """``<s> input </s>`` in the encoder; ``</s> <s> target </s>`` in the decoder, learnt behind its first token."""
    (example,) = tokenize(bart, plan_of(bart), data(("ab", "c"))).examples
    assert example.input_ids == (0, *bart.prompt_encoder.encode_text("ab"), 2)
    assert example.ids == (2, 0, *bart.prompt_encoder.encode_text("c"), 2)
    assert example.start == 1
    batch = collate([example])
    assert batch.targets.tolist() == list(example.ids[1:])


def test_sequences_stand_one_behind_the_other_without_padding() -> None:
    batch = collate([TokenExample((2, 0, 2), 1, (0, 5, 6, 2)), TokenExample((2, 0, 9, 2), 1, (0, 2))])
    assert batch.inputs is not None
    assert (batch.inputs.ids.tolist(), batch.inputs.lengths) == ([0, 5, 6, 2, 0, 2], (4, 2))
    assert (batch.read.ids.tolist(), batch.read.lengths) == ([2, 0, 2, 0, 9], (2, 3)), "nothing behind the last token"
    assert (batch.predict.tolist(), batch.targets.tolist()) == ([0, 1, 2, 3, 4], [0, 2, 0, 9, 2])


def test_micro_batches_hold_every_example_once_like_lengths_together() -> None:
    examples = [TokenExample((0,) * length, 1) for length in (5, 3, 9, 7, 2, 8, 4)]
    for parts, sizes in ((1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (9, [1] * 7)):
        made = split_batch(examples, parts)
        assert [len(part) for part in made] == sizes
        lengths = [len(example.ids) for part in made for example in part]
        assert lengths == [2, 3, 4, 5, 7, 8, 9]


def test_a_forced_first_token_begins_every_target(tmp_path: Path) -> None:
    forced = tiny_bart(tmp_path, generation={"forced_bos_token_id": 7})
    assert target_opening(forced) == (7,)
    (example,) = tokenize(forced, plan_of(forced), data(("a", "c"))).examples
    assert example.ids[:2] == (2, 7)


def test_a_decoder_alone_learns_no_forced_first_token(tmp_path: Path) -> None:
    """It is forced behind a prompt of one token; targets stand behind whole inputs."""
    save_tiny_gpt2(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "forced_bos_token_id": 7}))
    forced = load_backbone(str(tmp_path))
    assert (forced.forced_first, target_opening(forced)) == (7, ())


def test_special_tokens_in_data_are_split_but_the_templates_are_not(gpt2: Backbone, bart: Backbone) -> None:
    end = gpt2.eos_token_ids[0]
    (example,) = tokenize(gpt2, plan_of(gpt2), data(("a<|endoftext|>", "b<|endoftext|>"))).examples
    assert [index for index, token in enumerate(example.ids) if token == end] == [
        example.start - 1,
        len(example.ids) - 1,
    ]
    (example,) = tokenize(bart, plan_of(bart), data(("a</s>", "b<s></s>"))).examples
    assert (example.input_ids.count(2), example.ids.count(2), example.ids.count(0)) == (1, 2, 1)


@pytest.mark.parametrize(("ends", "taught"), [((7, 0), 0), ((0, 7), 0), ((7, 9), 7)])
def test_of_several_end_tokens_the_tokenizers_own_closes_a_target(
    tmp_path: Path, ends: tuple[int, ...], taught: int
) -> None:
    """Llama 3's generation config names ``<|end_of_text|>`` before the token that its tuned models end with."""
    save_tiny_llama(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(ends)}))
    backbone = load_backbone(str(tmp_path))
    (example,) = tokenize(backbone, plan_prefix(TrainConfig(), backbone), data(("a", "b"))).examples
    assert example.ids == (*backbone.prompt_encoder.encode("{input}\n", "a"),
                           *backbone.prompt_encoder.encode_text("b"), taught)  # fmt: skip
    assert taught in backbone.eos_token_ids, "the server ends there"


def test_what_just_fits_is_taken_and_one_token_more_is_named_or_left_out(backbone: Backbone) -> None:
    plan, encoder = plan_of(backbone), backbone.prompt_encoder
    around = len(encoder.encode(plan.template, ""))
    beside = len(target_opening(backbone)) + 2  # a target of one token and its end
    # A decoder alone has one window for prefix, input and target; an unshifted encoder all of its own for the input.
    room = WINDOW - around - (0 if backbone.spec.input_site == "encoder" else P + beside)
    fits, long = (letters(room), "x"), (letters(room + 1), "x")
    assert len(tokenize(backbone, plan, data(fits)).examples) == 1
    with pytest.raises(InvalidData, match=r"^data line 2: expected at most \d+ tokens of input and temp.*--truncate"):
        tokenize(backbone, plan, data(fits, long))
    kept = tokenize(backbone, plan, data(fits, long), drop_long=True)
    assert (len(kept.examples), kept.dropped, kept.cut) == (1, 1, 0)
    with pytest.raises(InvalidData, match="no example fits"):
        tokenize(backbone, plan, data(long), drop_long=True)


def test_truncating_cuts_the_inputs_own_end_as_the_server_does(backbone: Backbone) -> None:
    text = "".join(chr(1 + index % 8) for index in range(90))
    plan, encoder = plan_of(backbone), backbone.prompt_encoder
    made = tokenize(backbone, plan, data(("a", "x"), (text, "x")), truncate=True)
    assert (made.dropped, made.cut) == (0, 1)
    example = made.examples[1]
    read = example.input_ids or example.ids[: example.start]
    before, after = (encoder.encode_literal(part) for part in plan.template.split("{input}"))
    kept = encoder.encode_text(text)[: len(read) - len(before) - len(after)]
    assert list(read) == [*before, *kept, *after], "the template is whole"
    assert len(example.input_ids or example.ids) == (WINDOW if example.input_ids else WINDOW - P)


def test_a_target_past_the_window_is_never_cut(backbone: Backbone) -> None:
    plan, long = plan_of(backbone), data(("a", "x"), ("a", letters(70)))
    with pytest.raises(InvalidData, match=r"line 2: expected at most \d+ tokens of target"):
        tokenize(backbone, plan, long, truncate=True)
    kept = tokenize(backbone, plan, long, truncate=True, drop_long=True)
    assert (len(kept.examples), kept.dropped) == (1, 1)


def test_a_shifted_prefix_takes_its_length_off_both_of_an_encoder_decoders_windows(bart: Backbone) -> None:
    plan, around = plan_of(bart, positions="shifted"), 2
    tokenize(bart, plan, data((letters(WINDOW - around - P), letters(WINDOW - 3 - P))))
    with pytest.raises(InvalidData, match=f"at most {WINDOW - P} tokens of input"):
        tokenize(bart, plan, data((letters(WINDOW - around - P + 1), "x")))
    with pytest.raises(InvalidData, match=f"at most {WINDOW - P - 1} tokens of target"):
        tokenize(bart, plan, data(("a", letters(WINDOW - 3 - P + 1))))


def test_an_epochs_batches_hold_every_example_once_and_depend_on_seed_and_epoch(backbone: Backbone) -> None:
    examples = toy_examples(backbone)
    batches = epoch_batches(examples, 5, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(len(examples)))
    assert batches == epoch_batches(examples, 5, seed=1, epoch=0)
    assert batches != epoch_batches(examples, 5, seed=1, epoch=1) != epoch_batches(examples, 5, seed=2, epoch=1)


def test_lengths_are_mixed_so_that_no_batch_is_of_short_outputs_alone() -> None:
    """Each token of a mean over the tokens of such a batch would weigh more, and outputs would come out shorter."""
    lengths = [len(batch) for batch in epoch_batches([TokenExample((0,) * 4, 1)] * 10, 4, seed=1, epoch=0)]
    assert lengths == [4, 4, 2]
    examples = [TokenExample((0,) * (5 + index // 100), 1) for index in range(400)]
    means = [
        sum(examples[index].learnt for index in batch) / len(batch)
        for epoch in range(4) for batch in epoch_batches(examples, 8, seed=1, epoch=epoch)
    ]  # fmt: skip
    assert all(4 < mean < 7 for mean in means), "of 4 to 7"


def test_no_data_gives_no_examples(backbone: Backbone) -> None:
    assert tokenize(backbone, plan_of(backbone), replace(toy_data(), examples=())).examples == []


def test_the_usual_templates_are_the_papers(gpt2: Backbone, bart: Backbone) -> None:
    assert plan_prefix(TrainConfig(), gpt2).template == GPT2_TEMPLATE
    assert plan_prefix(TrainConfig(), bart).template == BART_TEMPLATE


@pytest.mark.corpora
def test_the_default_template_with_paper_spaces_gives_the_papers_tokens(gpt2: Backbone) -> None:
    """GPT-2's own tokenizer over `` {source} <|endoftext|> {target} <|endoftext|>``, as one string."""
    folder = SHARED / "tokenizers" / "gpt2"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    from transformers import GPT2Tokenizer

    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(merge) for merge in _merges(folder)]
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges)
    source, target = "name : The Vaults | Type : pub", "The Vaults is a pub ."
    real = replace(gpt2, prompt_encoder=PromptEncoder(tokenizer), eos_token_ids=(tokenizer.eos_token_id,))
    (example,) = tokenize(real, plan_prefix(TrainConfig(), gpt2), data((f" {source}", f" {target} "))).examples
    assert list(example.ids) == tokenizer(f" {source} <|endoftext|> {target} <|endoftext|>")["input_ids"]


@pytest.mark.corpora
def test_barts_own_tokenizer_gives_the_same_inputs_and_labels(tmp_path: Path) -> None:
    """transformers' call of the real BART tokenizer puts ``<s>`` and ``</s>`` around a text: the paper's sequences."""
    folder = SHARED / "tokenizers" / "bart"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    from transformers import BartTokenizer

    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[tuple(merge) for merge in _merges(folder)])
    real = replace(tiny_bart(tmp_path), prompt_encoder=PromptEncoder(tokenizer), tokenizer=tokenizer)
    document, summary = "The Vaults is a pub. It is cheap.", "A cheap pub"
    (example,) = tokenize(real, plan_prefix(TrainConfig(), real), data((document, summary))).examples
    assert list(example.input_ids) == tokenizer(document)["input_ids"]
    assert list(example.ids[example.start :]) == tokenizer(summary)["input_ids"]


def _merges(folder: Path) -> list[list[str]]:
    lines = (folder / "merges.txt").read_text().splitlines()[1:]
    return [line.split() for line in lines if line]


@pytest.mark.parametrize("start", STARTS)
def test_a_target_is_the_text_that_its_tokens_give_behind_the_prompt(tmp_path: Path, start: str) -> None:
    """SentencePiece's tokenizers put a space before a text. A target goes on in one, and has none."""
    save_tiny_llama(tmp_path)
    save_byte_fallback_tokenizer(tmp_path, start)
    backbone = load_backbone(str(tmp_path))
    plan = plan_prefix(TrainConfig.of("e2e", {"prefix_length": P}), backbone, "{input}:")
    for target in ("world", " world", "the ☕"):
        example = tokenize(backbone, plan, data(("Hello", target))).examples[0]
        prompt, told = example.ids[: example.start], example.ids[example.start : -1]
        assert list(prompt) == backbone.prompt_encoder.encode("{input}:", "Hello")
        assert text_of(backbone.tokenizer.backend_tokenizer, prompt, told) == target
