"""Processors match transformers' bit for bit, alone and in the order in which a configuration lists them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import transformers_model
from strategies import SEEDS
from transformers.generation import logits_process as theirs

from llama.generation import processors as ours
from llama.generation.config import GenerationConfig
from llama.generation.processors import processors_for

FIELDS = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def tensor_of(draw, rows, vocab, dtype):
    """Scores with ties, -inf and extreme values; every row has at least one finite score."""
    rng = np.random.default_rng(draw(SEEDS))
    scores = rng.normal(scale=draw(st.sampled_from([0.1, 1.0, 10.0, 1e4])), size=(rows, vocab))
    if draw(st.booleans()):
        scores = np.round(scores)
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < draw(st.sampled_from([0.1, 0.9]))] = -np.inf
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.1] = draw(st.sampled_from([-6e4, 6e4, 0.0]))
    scores[np.arange(rows), rng.integers(0, vocab, rows)] = rng.normal(size=rows)
    return torch.tensor(scores).to(dtype)


@st.composite
def texts_and_scores(draw):
    """Draw (input_ids, scores, V), with few distinct tokens so that they repeat."""
    rows, length, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(2, 30))
    rng = np.random.default_rng(draw(SEEDS))
    ids = rng.integers(0, min(vocab, draw(st.sampled_from([2, 4, 30]))), (rows, length))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    return torch.tensor(ids), tensor_of(draw, rows, vocab, dtype), vocab


def same(mine, their):
    torch.testing.assert_close(mine, their, rtol=0, atol=0, equal_nan=True)


def compare(make, ids, scores):
    """Compare `make(ours)` with `make(theirs)` as the text grows token by token; scores must stay unmodified."""
    before = scores.clone()
    mine, their = make(ours), make(theirs)
    for length in range(1, ids.shape[1] + 1):
        same(mine(ids[:, :length], scores), their(ids[:, :length], scores.clone()))
    same(scores, before)


def token(vocab):
    return st.integers(0, vocab - 1)


def tokens(vocab, least=1):
    return st.lists(token(vocab), min_size=least, max_size=4)


def ends(vocab):
    return st.one_of(token(vocab), tokens(vocab), tokens(vocab).map(torch.tensor))


def sequences(vocab):
    return st.lists(st.lists(st.integers(0, min(vocab, 3) - 1), min_size=1, max_size=4), min_size=1, max_size=8)


BIAS = st.sampled_from([-math.inf, -2.5, -1.0, 0.3, 7.0])
KEEP = st.integers(1, 4)
SMALL = st.sampled_from([1e-4, 0.01, 0.1, 0.4, 0.9])

# class -> strategy for its arguments, given the vocabulary size
ARGUMENTS = {
    "TemperatureLogitsWarper": lambda v: st.tuples(st.sampled_from([0.1, 0.7, 1.0, 3.0])),
    "TopKLogitsWarper": lambda v: st.tuples(st.integers(1, 40), st.sampled_from([-math.inf, -1e4]), KEEP),
    "TopPLogitsWarper": lambda v: st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.just(-math.inf), KEEP),
    "MinPLogitsWarper": lambda v: st.tuples(st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.just(-math.inf), KEEP),
    "TypicalLogitsWarper": lambda v: st.tuples(SMALL, st.just(-math.inf), KEEP),
    "EpsilonLogitsWarper": lambda v: st.tuples(SMALL, st.just(-math.inf), KEEP),
    "EtaLogitsWarper": lambda v: st.tuples(SMALL, st.just(-math.inf), KEEP),
    "LogitNormalization": lambda v: st.just(()),
    "InfNanRemoveLogitsProcessor": lambda v: st.just(()),
    "RepetitionPenaltyLogitsProcessor": lambda v: st.tuples(
        st.sampled_from([0.5, 1.3, 3.0]), st.sampled_from([None, 0, 1, 3])
    ),
    "NoRepeatNGramLogitsProcessor": lambda v: st.tuples(st.integers(1, 4)),
    "SequenceBiasLogitsProcessor": lambda v: st.tuples(
        sequences(v).flatmap(
            lambda drawn: st.one_of(
                st.just([[ids, bias] for ids, bias in zip(drawn, [0.5, -2.0] * 4, strict=False)]),
                st.fixed_dictionaries({tuple(ids): BIAS for ids in drawn}),
            )
        )
    ),
    "NoBadWordsLogitsProcessor": lambda v: st.tuples(
        sequences(v).map(lambda drawn: [*drawn, [0, 1]]), st.one_of(st.none(), ends(v))
    ),
    "MinLengthLogitsProcessor": lambda v: st.tuples(st.integers(0, 12), ends(v + 3)),
    "MinNewTokensLengthLogitsProcessor": lambda v: st.tuples(st.integers(0, 8), st.integers(0, 8), ends(v + 3)),
    "ForcedBOSTokenLogitsProcessor": lambda v: st.tuples(token(v)),
    "ForcedEOSTokenLogitsProcessor": lambda v: st.tuples(st.integers(1, 10), ends(v)),
    "ExponentialDecayLengthPenalty": lambda v: st.tuples(
        st.tuples(st.integers(0, 4), st.sampled_from([0.5, 1.01, 2.0])), ends(v), st.integers(0, 4)
    ),
    "SuppressTokensLogitsProcessor": lambda v: st.tuples(tokens(v + 3, 0)),
    "SuppressTokensAtBeginLogitsProcessor": lambda v: st.tuples(tokens(v + 3, 0), st.integers(0, 9)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@given(drawn=texts_and_scores(), data=st.data())
@settings(max_examples=80)
def test_processors_equal_transformers_bit_for_bit(name, drawn, data):
    ids, scores, vocab = drawn
    arguments = data.draw(ARGUMENTS[name](vocab))
    compare(lambda module: getattr(module, name)(*arguments), ids, scores)


@pytest.mark.parametrize("name", ARGUMENTS)
@given(data=st.data())
@settings(max_examples=5)
def test_no_processor_waits_for_a_number(name, data):
    """The "meta" device holds no values: anything that would synchronise with a GPU fails there."""
    one = getattr(ours, name)(*data.draw(ARGUMENTS[name](20)))
    for length in range(1, 9):
        ids, scores = torch.ones(2, length, dtype=torch.long, device="meta"), torch.ones(2, 20, device="meta")
        assert one(ids, scores).shape == scores.shape


@given(texts_and_scores(), SEEDS)
def test_the_repetition_penalty_skips_each_rows_padding(drawn, seed):
    ids, scores, _ = drawn
    padding = torch.tensor(np.random.default_rng(seed).integers(0, ids.shape[1] + 1, len(ids)))
    compare(lambda module: module.RepetitionPenaltyLogitsProcessor(1.7, padding), ids, scores)
    mine = ours.RepetitionPenaltyLogitsProcessor(1.7, padding)(ids, scores)
    for row, skipped in enumerate(padding):
        alone = ours.RepetitionPenaltyLogitsProcessor(1.7)(ids[row : row + 1, skipped:], scores[row : row + 1])
        same(mine[row : row + 1], alone)


@given(texts_and_scores(), st.integers(1, 3), st.data())
def test_the_prefix_function_is_asked_and_obeyed_as_in_transformers(drawn, beams, data):
    ids, scores, vocab = drawn
    ids, scores = ids.repeat_interleave(beams, 0), scores.repeat_interleave(beams, 0)
    table = data.draw(st.lists(tokens(vocab), min_size=5, max_size=5))
    asked = []

    def allowed(batch, text):
        asked.append((batch, text.tolist()))
        return table[int(text.sum() + batch) % 5]

    compare(lambda module: module.PrefixConstrainedLogitsProcessor(allowed, beams), ids, scores)
    half = len(asked) // ids.shape[1] // 2
    assert asked[:half] == asked[half : 2 * half]
    with pytest.raises(ValueError, match=r"`prefix_allowed_tokens_fn` .* an empty list"):
        ours.PrefixConstrainedLogitsProcessor(lambda batch, text: [], beams)(ids, scores)


def test_a_constraint_without_hope_begins_anew():
    scores = torch.tensor([[0.0, -math.inf, -math.inf], [-math.inf, 1.0, -math.inf]])
    one = lambda beams: ours.PrefixConstrainedLogitsProcessor(lambda batch, text: [1, 2], beams)  # noqa: E731
    ids = torch.zeros(2, 1, dtype=torch.long)
    assert one(1)(ids, scores).tolist() == [[-math.inf, 0.0, 0.0], [-math.inf, 1.0, -math.inf]]
    assert one(2)(ids, scores).tolist() == [[-math.inf] * 3, [-math.inf, 1.0, -math.inf]]  # one beam has a finite score


def test_invalid_values_are_removed():
    scores = torch.tensor([[math.nan, math.inf, -math.inf, 3.0]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        compare(lambda module: module.InfNanRemoveLogitsProcessor(), torch.ones(1, 1), scores.to(dtype))


@given(SEEDS, st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0]), st.sampled_from([None, 1, 3]), st.booleans())
@settings(max_examples=25)
def test_guidance_equals_transformers(seed, use_cache, scale, negative, masked):
    model = transformers_model(FIELDS, 0)[0]
    rng = np.random.default_rng(seed)
    ids = torch.tensor(rng.integers(0, 30, (2, 8)))
    against = None if negative is None else torch.tensor(rng.integers(0, 30, (2, negative)))
    mask = None
    if masked and negative == 3:
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mine, their = (
        module.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, against, mask, use_cache)
        for module in (ours, theirs)
    )
    for length in range(4, 8):
        scores = torch.tensor(rng.normal(size=(2, 30)), dtype=torch.float32)
        with torch.no_grad():
            same(mine(ids[:, :length], scores), their(ids[:, :length], scores))


class Doubled:
    """A user-defined processor of no known class."""

    def __call__(self, input_ids, scores):
        return scores * 2


@st.composite
def options(draw):
    """Keyword arguments that both GenerationConfigs accept."""
    fields = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "sequence_bias": st.just([[[3, 4], -1.5], [[5], 2.0]]),
                "repetition_penalty": st.sampled_from([1.0, 1.4]),
                "no_repeat_ngram_size": st.sampled_from([0, 1, 3]),
                "bad_words_ids": st.just([[7], [1, 2]]),
                "min_length": st.sampled_from([0, 3, 7]),
                "min_new_tokens": st.sampled_from([0, 2]),
                "max_length": st.sampled_from([4, 7]),
                "max_new_tokens": st.sampled_from([1, 2]),
                "forced_bos_token_id": st.just(9),
                "forced_eos_token_id": st.sampled_from([2, [2, 3]]),
                "remove_invalid_values": st.booleans(),
                "suppress_tokens": st.just([11, 12]),
                "begin_suppress_tokens": st.just([13]),
                "do_sample": st.sampled_from([True, True, False]),
                "num_beams": st.sampled_from([1, 3]),
                "temperature": st.sampled_from([1.0, 0.6]),
                "top_k": st.sampled_from([0, 1, 10]),
                "top_p": st.sampled_from([1.0, 0.3]),
                "min_p": st.just(0.2),
                "typical_p": st.sampled_from([1.0, 0.3]),
                "epsilon_cutoff": st.sampled_from([0.0, 0.1]),
                "eta_cutoff": st.sampled_from([0.0, 0.2]),
                "renormalize_logits": st.booleans(),
                "eos_token_id": st.sampled_from([2, [2], [2, 3]]),
            },
        )
    )
    if "eos_token_id" in fields and draw(st.booleans()):
        fields["exponential_decay_length_penalty"] = (1, 1.3)
    return fields


@given(options(), st.sampled_from([1, 2, 5]), st.booleans(), st.booleans(), SEEDS, st.data())
@settings(max_examples=150)
def test_a_configuration_lines_up_what_transformers_does(fields, prompt, padded, prefixed, seed, data):
    rng = np.random.default_rng(seed)
    rows = 2 * fields.get("num_beams", 1)
    mask = torch.tensor(np.arange(prompt) >= rng.integers(0, prompt, (rows, 1))).long() if padded else None
    prefix = (lambda batch, text: [1, 2, 3, 4 + batch, 9, 13]) if prefixed else None
    own = data.draw(st.lists(st.sampled_from(["Doubled", "TopKLogitsWarper", "InfNanRemoveLogitsProcessor",
                                              "RepetitionPenaltyLogitsProcessor"]), max_size=2))  # fmt: skip
    build = {"TopKLogitsWarper": (4,), "RepetitionPenaltyLogitsProcessor": (2.5,)}
    extra = lambda m: [Doubled() if o == "Doubled" else getattr(m, o)(*build.get(o, ())) for o in own]  # noqa: E731

    mine = processors_for(GenerationConfig(**fields), prompt, device="cpu", prefix_allowed_tokens_fn=prefix,
                          extra=extra(ours), attention_mask=mask, max_position_embeddings=2048)  # fmt: skip
    their = transformers_list(fields, prompt, prefix, extra(theirs), mask)
    assert [type(p).__name__ for p in mine] == [type(p).__name__ for p in their]
    for length in range(prompt, prompt + 4):
        ids = torch.tensor(rng.integers(0, 14, (rows, length)))
        scores = tensor_of(data.draw, rows, 30, torch.float32)
        try:
            expected = their(ids, scores.clone())
        except ValueError:  # eta's Categorical distribution, when no token is left
            continue
        same(mine(ids, scores), expected)


def transformers_list(fields, prompt, prefix=None, extra=(), mask=None, **more):
    """The processors that transformers' `generate` prepares."""
    model = transformers_model(FIELDS, 0)[0]
    model.generation_config = transformers.GenerationConfig()
    config, _ = model._prepare_generation_config(transformers.GenerationConfig(**fields))
    model._prepare_special_tokens(config, True, device="cpu")
    model._prepare_generated_length(config, "max_length" not in fields, True, "input_ids", prompt,
                                    torch.zeros(1, prompt))  # fmt: skip
    kwargs = {} if mask is None else {"attention_mask": mask}
    return model._get_logits_processor(config, prompt, None, prefix, list(extra), "cpu", kwargs, **more)


def test_guidance_comes_first_and_needs_the_model():
    model = transformers_model(FIELDS, 0)[0]
    fields = dict(guidance_scale=1.5, repetition_penalty=1.2, use_cache=False)
    negative = torch.tensor([[4, 5]])
    given_ = dict(negative_prompt_ids=negative, negative_prompt_attention_mask=torch.ones_like(negative))
    mine = processors_for(GenerationConfig(**fields), 3, device="cpu", model=model, **given_)
    their = transformers_list(fields, 3, **given_)
    ids, scores = torch.tensor([[1, 2, 3]]), torch.randn(1, 30)
    with torch.no_grad():
        for _ in range(3):
            same(mine(ids, scores), their(ids, scores))
            ids = torch.cat([ids, ids[:, -1:] + 1], 1)
    with pytest.raises(ValueError, match="`guidance_scale`"):
        processors_for(GenerationConfig(guidance_scale=1.5), 3, device="cpu")


def test_what_is_neutral_is_left_out():
    neutral = GenerationConfig(
        do_sample=True, temperature=1, top_k=0, top_p=1, min_p=0, typical_p=1.0, epsilon_cutoff=0, eta_cutoff=0.0,
        repetition_penalty=1, no_repeat_ngram_size=0, guidance_scale=1.0, min_length=9, min_new_tokens=0,
    )  # fmt: skip
    assert processors_for(neutral, 3, device="cpu") == []
    assert processors_for(GenerationConfig(top_k=3, temperature=0.5), 3, device="cpu") == []  # greedy


def test_the_forced_end_stands_where_writing_ends():
    def place(fields, **limit):
        config = GenerationConfig(forced_eos_token_id=2, **fields)
        return processors_for(config, 5, device="cpu", **limit)[0].max_length

    assert place({"max_new_tokens": 3}) == 8
    assert place({"max_length": 20}) == 20
    assert place({}) == 25
    assert place({}, max_position_embeddings=9) == 9


def test_a_users_own_takes_the_place_of_its_class():
    mine = ours.NoRepeatNGramLogitsProcessor(3)
    config = GenerationConfig(repetition_penalty=1.2, no_repeat_ngram_size=2, suppress_tokens=[1])
    names = lambda made: [type(p).__name__ for p in made]  # noqa: E731
    made = processors_for(config, 3, device="cpu", extra=[mine])
    assert made[1] is mine
    assert names(made) == names(processors_for(config, 3, device="cpu"))


def test_lists_hand_on_what_processors_ask_for():
    class Steered(ours.LogitsProcessor):
        def __call__(self, input_ids, scores, steer):
            return scores + steer

    both = ours.LogitsProcessorList([Steered(), lambda input_ids, scores: scores * 3])
    ids, scores = torch.ones(1, 1), torch.ones(1, 2)
    assert both(ids, scores, steer=1).tolist() == [[6.0, 6.0]]
    with pytest.raises(ValueError, match="Steered needs steer"):
        both(ids, scores)
    with pytest.raises(NotImplementedError, match="LogitsProcessor has to define __call__"):
        ours.LogitsProcessor()(ids, scores)


def test_the_place_of_the_first_token_can_be_moved():
    one = ours.SuppressTokensAtBeginLogitsProcessor([0], 1)
    one.set_begin_index(2)
    scores = torch.zeros(1, 2)
    assert one(torch.ones(1, 1), scores).tolist() == [[0.0, 0.0]]
    assert one(torch.ones(1, 2), scores).tolist() == [[-math.inf, 0.0]]


def test_one_processor_serves_vocabularies_and_types_in_turn():
    suppress, bias = ours.SuppressTokensLogitsProcessor([1]), ours.SequenceBiasLogitsProcessor([[[1], 2.0]])
    for scores in (torch.zeros(1, 3), torch.zeros(1, 5), torch.zeros(2, 5, dtype=torch.float16)):
        assert suppress(torch.ones(1, 1), scores)[:, 1].isneginf().all()
        same(bias(torch.ones(len(scores), 1), scores), scores + 2 * torch.eye(scores.shape[1])[1].to(scores.dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.TemperatureLogitsWarper(0.0), "`temperature` has to be a strictly positive float"),
        (lambda: ours.TemperatureLogitsWarper("hot"), "`temperature` .* 'hot'"),
        (lambda: ours.TopKLogitsWarper(0), "`top_k` has to be an integer of at least 1, but is 0"),
        (lambda: ours.TopKLogitsWarper(3, min_tokens_to_keep=0), "`min_tokens_to_keep`"),
        (lambda: ours.TopPLogitsWarper(1.5), "`top_p` .* 1.5"),
        (lambda: ours.TopPLogitsWarper(-0.1), "`top_p`"),
        (lambda: ours.MinPLogitsWarper(-0.1), "`min_p`"),
        (lambda: ours.MinPLogitsWarper(1.1), "`min_p`"),
        (lambda: ours.TypicalLogitsWarper(0.0), "`typical_p`"),
        (lambda: ours.EpsilonLogitsWarper(1.0), "`epsilon_cutoff`"),
        (lambda: ours.EtaLogitsWarper(-1e-9), "`eta_cutoff`"),
        (lambda: ours.RepetitionPenaltyLogitsProcessor(0.0), "`repetition_penalty`"),
        (lambda: ours.RepetitionPenaltyLogitsProcessor(1.2, -1), "`prompt_ignore_length`"),
        (lambda: ours.RepetitionPenaltyLogitsProcessor(1.2, torch.ones(2, 2)), "`prompt_ignore_length`"),
        (lambda: ours.RepetitionPenaltyLogitsProcessor(1.2, torch.ones(3))(torch.ones(2, 2), torch.ones(2, 2)),
         "`prompt_ignore_length` has to be of shape \\(2,\\)"),
        (lambda: ours.NoRepeatNGramLogitsProcessor(0), "`ngram_size`"),
        (lambda: ours.SequenceBiasLogitsProcessor({}), "`sequence_bias`"),
        (lambda: ours.SequenceBiasLogitsProcessor({(): 1.0}), "`sequence_bias`"),
        (lambda: ours.SequenceBiasLogitsProcessor({1: 1.0}), "`sequence_bias`"),
        (lambda: ours.SequenceBiasLogitsProcessor([[1, 2.0]]), "`sequence_bias`"),
        (lambda: ours.SequenceBiasLogitsProcessor([[[1], "much"]]), "`sequence_bias`"),
        (lambda: ours.SequenceBiasLogitsProcessor({(1, 9): 1.0})(torch.ones(1, 1), torch.ones(1, 9)),
         "`sequence_bias` has to be of tokens below the vocabulary's size, 9, but is \\[9\\]"),
        (lambda: ours.NoBadWordsLogitsProcessor([]), "`bad_words_ids`"),
        (lambda: ours.NoBadWordsLogitsProcessor([[]]), "`bad_words_ids`"),
        (lambda: ours.NoBadWordsLogitsProcessor([[-1]]), "`bad_words_ids`"),
        (lambda: ours.NoBadWordsLogitsProcessor([[2]], [2]), "`bad_words_ids`"),
        (lambda: ours.MinLengthLogitsProcessor(-1, 2), "`min_length`"),
        (lambda: ours.MinNewTokensLengthLogitsProcessor(-1, 2, 2), "`prompt_length_to_skip`"),
        (lambda: ours.MinNewTokensLengthLogitsProcessor(2, -1, 2), "`min_new_tokens`"),
        (lambda: ours.ForcedEOSTokenLogitsProcessor(5, [-1]), "`eos_token_id`"),
        (lambda: ours.ForcedEOSTokenLogitsProcessor(5, torch.tensor([1.5])), "`eos_token_id`"),
        (lambda: ours.ExponentialDecayLengthPenalty((1, 1.5), -1, 3), "`eos_token_id`"),
        (lambda: ours.ExponentialDecayLengthPenalty((1.5, 1), 1, 3), "`exponential_decay_length_penalty`"),
        (lambda: ours.ForcedBOSTokenLogitsProcessor(-1), "`forced_bos_token_id`"),
        (lambda: ours.UnbatchedClassifierFreeGuidanceLogitsProcessor("x", SimpleNamespace()), "`guidance_scale`"),
        (lambda: processors_for(GenerationConfig(exponential_decay_length_penalty=(1, 2.0)), 3, device="cpu"),
         "`exponential_decay_length_penalty` needs an `eos_token_id`"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
