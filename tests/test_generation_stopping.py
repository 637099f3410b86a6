"""Stopping criteria: transformers' results row by row, and stop strings found however tokens split the text."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.generation import stopping_criteria as theirs

from llama import LlamaTokenizerFast
from llama.checkpoints.gguf import sentencepiece_bpe
from llama.generation import stopping as ours
from llama.generation.config import GenerationConfig
from llama.generation.stopping import criteria_for

BYTES = {byte: letter for letter, byte in theirs.StopStringCriteria._byte_level_decoder().items()}
PIECES = ["a", "b", "c", "ab", "ca", "abc", " ", " a", "stop", "st", "op", "opera", "né", "🦙!", "\n\n"]


def byte_level() -> Tokenizer:
    """A tokenizer like Llama 3's: a token for every byte, and some for several bytes."""
    several = ["".join(BYTES[byte] for byte in piece.encode()) for piece in PIECES if len(piece.encode()) > 1]
    halves = ["".join(BYTES[byte] for byte in half) for half in ("a🦙".encode()[:3], "🦙b".encode()[2:])]
    vocab = [*(BYTES[byte] for byte in range(256)), *several, *halves]
    tokenizer = Tokenizer(models.BPE({letters: number for number, letters in enumerate(vocab)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's: pieces with ▁ for a space, and a token <0xNN> for every byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [piece.replace(" ", "▁") for piece in PIECES if piece != " "] + ["▁stop", "▁op", "é"]
    return sentencepiece_bpe(pieces, [0.0] * 259 + [-float(n) for n in range(len(pieces) - 259)], True)


def both(tokenizer: Tokenizer):
    return LlamaTokenizerFast(tokenizer), transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# For each kind: our tokenizer, transformers', the ids that begin a text, and the ids to draw from.
TOKENIZERS = {
    "bytes": (*both(byte_level()), [], [97, 98, 99, *"é🦙".encode(), *range(256, len(byte_level().get_vocab()))]),
    "pieces": (*both(sentencepiece()), [1], [*(3 + byte for byte in b"a" + "é🦙".encode()), *range(259, 277)]),
}
WORDS = st.text("abcé🦙 st\nop!", min_size=1, max_size=5)


def theirs_says(tokenizer, stops, ids):
    try:
        return theirs.StopStringCriteria(tokenizer, stops)(ids, None)
    except ValueError:  # no token ends any of the strings
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=250)
def test_stop_strings_equal_transformers(kind, data, seed):
    mine, their, begin, often = TOKENIZERS[kind]
    rng = np.random.default_rng(seed)
    length = data.draw(st.integers(1, 14))
    ids = [[*begin, *rng.choice(often, length)] for _ in range(3)]
    text = mine.decode(ids[0], skip_special_tokens=False)
    ends = st.builds(
        lambda size, cut: text[len(text) - cut - size : len(text) - cut], st.integers(1, 6), st.integers(0, 4)
    )
    stops = data.draw(st.lists(st.one_of(WORDS, ends.filter(bool)), min_size=1, max_size=3))
    assume(not any("\N{REPLACEMENT CHARACTER}" in stop for stop in stops))
    rows = torch.tensor(ids)
    if kind == "pieces":  # in decoded text, which is what we search, invalid bytes take their neighbours with them
        assume(not any("\N{REPLACEMENT CHARACTER}" in mine.decode(row) for row in ids))
    said = ours.StopStringCriteria(mine, stops)(rows, None)
    assert said.tolist() == theirs_says(their, stops, rows).tolist()
    assert said.tolist() == ours.StopStringCriteria(their, stops)(rows, None).tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text("aé🦙 stop", min_size=1, max_size=30), stop=st.text("é🦙 stop", min_size=1, max_size=4))
@example(text="🦙" * 9 + "é", stop="é")
def test_a_written_text_stops_when_it_first_holds_the_string(kind, text, stop):
    """Generation checks after every token, so it stops at the first match."""
    tokenizer, _, begin, _ = TOKENIZERS[kind]
    ids = [*begin, *tokenizer.encode(text, add_special_tokens=False)]
    criterion = ours.StopStringCriteria(tokenizer, stop)
    first = next((n for n in range(len(ids) + 1) if stop in tokenizer.decode(ids[:n])), None)
    said = [n for n in range(1, len(ids) + 1) if criterion(torch.tensor([ids[:n]]), None).item()]
    assert said[:1] == ([] if first is None else [first])


@pytest.mark.parametrize(
    ("tokens", "stops"),
    [
        (["st", "op"], True), (["stop"], True), (["st", "opera"], True), (["c", "a", "stop"], True),
        (["st", "opera", "a"], False), (["stop", "a"], False), (["st", "a", "op"], False), (["op"], False),
    ],
)  # fmt: skip
def test_the_string_must_reach_into_the_last_token(tokens, stops):
    tokenizer = TOKENIZERS["bytes"][0]
    row = [tokenizer._tokenizer.token_to_id(token) for token in tokens]
    assert ours.StopStringCriteria(tokenizer, ["zzz", "stop"])(torch.tensor([row]), None).tolist() == [stops]


def test_special_tokens_and_ids_without_a_token():
    tokenizer = TOKENIZERS["bytes"][0]
    end, a, b = tokenizer._tokenizer.token_to_id("<|end|>"), 97, 98
    says = lambda stop, *row: ours.StopStringCriteria(tokenizer, stop)(torch.tensor([row]), None).item()  # noqa: E731
    assert says("<|end|>", a, end)
    assert says("a<|end|>b", a, end, b)
    assert not says("ab", a, 9999, b)
    assert not says("ab", a, b, 9999)
    assert not says("ab", a, b, -100)
    assert says("ab", 9999, a, b)
    assert not says("ab", 9999, a, 9999, b)
    assert ours.StopStringCriteria(tokenizer, "a")(torch.zeros(2, 0, dtype=torch.long), None).tolist() == [False, False]


def test_only_a_tail_is_decoded():
    inner, longest = TOKENIZERS["bytes"][0], 0

    class Counting:
        def decode(self, ids, skip_special_tokens):
            nonlocal longest
            longest = max(longest, len(ids))
            return inner.decode(ids, skip_special_tokens=skip_special_tokens)

    criterion = ours.StopStringCriteria(Counting(), ["stop", "🦙"])
    assert criterion(torch.tensor([[97] * 5000 + [*b"stop"], [0x80] * 5004]), None).tolist() == [True, False]
    assert longest <= len(b"stop") + 4


@given(
    SEEDS, st.integers(1, 6), st.one_of(st.integers(-1, 5), st.lists(st.integers(0, 5), min_size=1)), st.integers(1, 4)
)
def test_end_tokens_and_lengths_equal_transformers(seed, length, eos, new):
    ids = torch.tensor(np.random.default_rng(seed).integers(0, 6, (3, length)))
    for make in (
        lambda module: module.EosTokenCriteria(eos),
        lambda module: module.EosTokenCriteria(torch.tensor(eos).reshape(-1)),
        lambda module: module.MaxLengthCriteria(4, max_position_embeddings=2),
        lambda module: module.MaxTimeCriteria(10.0),
        lambda module: module.MaxTimeCriteria(10.0, time.time() - 11),
        lambda module: module.StoppingCriteriaList([module.MaxLengthCriteria(5), module.EosTokenCriteria(eos)]),
        lambda module: module.StoppingCriteriaList(),
    ):
        mine, their = make(ours)(ids, None, new_token_length=new), make(theirs)(ids, None, new_token_length=new)
        assert mine.dtype == torch.bool
        assert mine.tolist() == their.tolist()


def test_outgrowing_the_positions_is_said_once(caplog):
    criterion = ours.MaxLengthCriteria(9, max_position_embeddings=2)
    for length in range(1, 6):
        criterion(torch.ones(1, length), None)
    assert [record.message for record in caplog.records] == ["the text exceeds the model's 2 positions"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (True, [True, True]),
        (False, [False, True]),
        (np.bool_(True), [True, True]),
        (torch.tensor([True, False]), [True, True]),
        (torch.tensor([0, 0]), [False, True]),
        (torch.tensor([[True], [False]]), [True, True]),
        (torch.tensor(False), [False, True]),
        ([True, False], [True, True]),
    ],
)
def test_users_criteria_may_speak_for_a_row_or_for_all(said, expected):
    both = ours.StoppingCriteriaList([lambda ids, scores, **kwargs: said, ours.EosTokenCriteria(7)])
    done = both(torch.tensor([[1, 2], [1, 7]]), None)
    assert done.dtype == torch.bool
    assert done.tolist() == expected


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_length": st.integers(1, 9),
            "max_new_tokens": st.integers(1, 9),
            "max_time": st.just(5.0),
            "stop_strings": st.just(["ab"]),
            "eos_token_id": st.sampled_from([2, [2, 3]]),
        },
    ),
    st.integers(0, 9),
    st.sampled_from([None, 7]),
)
def test_a_configuration_asks_for_what_it_does_in_transformers(fields, prompt, positions):
    mine, their = TOKENIZERS["bytes"][:2]
    config = GenerationConfig(**fields)
    made = criteria_for(config, prompt, tokenizer=mine, max_position_embeddings=positions)
    expected = transformers.GenerationConfig(**fields)
    expected.max_length = config.total_length(prompt, positions)
    expected._eos_token_tensor = None if config.eos_token_id is None else torch.tensor([2])
    model = transformers.GenerationMixin()
    model.config = SimpleNamespace(max_position_embeddings=positions)
    lined_up = model._get_stopping_criteria(expected, [], tokenizer=their)
    assert [type(criterion).__name__ for criterion in made] == [type(criterion).__name__ for criterion in lined_up]
    assert made.max_length == config.total_length(prompt, positions)


def test_a_users_own_criterion_takes_the_place_of_its_class():
    own, other = ours.MaxLengthCriteria(3), lambda ids, scores, **kwargs: True
    made = criteria_for(GenerationConfig(eos_token_id=2), 5, extra=[other, own])
    assert made[0] is own
    assert made[2:] == [other]
    assert made.max_length == 3
    assert ours.StoppingCriteriaList([other]).max_length is None


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`stop_strings` needs the model's tokenizer"):
        criteria_for(GenerationConfig(stop_strings="a"), 3)
    for wrong in ("", [], [""], [3], 3):
        with pytest.raises(ValueError, match="`stop_strings` has to be"):
            ours.StopStringCriteria(TOKENIZERS["bytes"][0], wrong)
    with pytest.raises(ValueError, match="`max_time` has to be"):
        ours.MaxTimeCriteria(-1)
    with pytest.raises(ValueError, match="`eos_token_id` has to be"):
        ours.EosTokenCriteria([1.5])
    with pytest.raises(NotImplementedError, match="StoppingCriteria has to define __call__"):
        ours.StoppingCriteria()(torch.ones(1, 1), None)
