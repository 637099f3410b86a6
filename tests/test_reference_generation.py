"""Generation: greedy decoding and sampling filters equal transformers', and batches equal their rows."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import as_float64, transformers_model
from strategies import SEEDS, configs
from transformers.generation import logits_process as theirs

from llama import reference
from llama.reference import Config, KVCache, Sampler, generate, stream
from llama.reference import sampling as ours
from llama.reference.generation import PREFILL_CHUNK

FIELDS = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
STATELESS = ["default", "linear", "yarn", "llama3"]


@st.composite
def prompts(draw, kinds=STATELESS):
    """(fields, seed of the weights, left-padded ids, mask)"""
    fields = draw(configs(kinds))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(SEEDS))
    real = np.array([draw(st.integers(1, length)) for _ in range(rows)])[:, None]
    mask = (np.arange(length) >= length - real).astype(int)
    return fields, draw(SEEDS), rng.integers(0, fields["vocab_size"], (rows, length)), mask


@given(prompts(), st.integers(1, 8), st.data())
@settings(max_examples=40)
def test_greedy_equals_transformers(drawn, new, data):
    fields, seed, ids, mask = drawn
    eos = data.draw(st.one_of(st.none(), st.lists(st.integers(0, fields["vocab_size"] - 1), min_size=1, max_size=3)))
    model, params = transformers_model(fields, seed)
    expected = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=new, do_sample=False,
        eos_token_id=eos, pad_token_id=eos[0] if eos else 0,
    )  # fmt: skip
    out = generate(as_float64(params), Config.from_dict(fields), ids, new, eos, mask)
    np.testing.assert_array_equal(out, expected.numpy())


@given(prompts(), st.sampled_from([Sampler(), Sampler(temperature=0.8, seed=3), Sampler(repetition_penalty=1.5)]))
@settings(max_examples=30)
def test_a_batch_writes_what_its_rows_write_alone(drawn, sampler):
    fields, seed, ids, mask = drawn
    params, config = as_float64(transformers_model(fields, seed)[1]), Config.from_dict(fields)
    rows = slice(0, 1) if sampler.temperature else slice(None)  # the rows of a batch share one random generator
    together = generate(params, config, ids[rows], 6, None, mask[rows], sampler=sampler)
    for row in range(len(together)):
        alone = generate(params, config, ids[row : row + 1, mask[row] == 1], 6, sampler=sampler)
        np.testing.assert_array_equal(together[row, ids.shape[1] :], alone[0, int(mask[row].sum()) :])


@given(prompts(), st.integers(1, 8))
@settings(max_examples=20)
def test_cached_writing_equals_reading_everything_anew_each_time(drawn, new):
    fields, seed, ids, mask = drawn
    params, config = as_float64(transformers_model(fields, seed)[1]), Config.from_dict(fields)
    text, seen = ids, mask
    for _ in range(new):
        token = reference.forward(params, config, text, seen).logits[:, -1].argmax(-1)
        text, seen = np.c_[text, token], np.c_[seen, np.ones(len(ids), int)]
    np.testing.assert_array_equal(generate(params, config, ids, new, attention_mask=mask), text)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "longrope", "llama3"])
def test_long_prompts_past_the_trained_length_equal_transformers(kind):
    """Longer than a prefill chunk and the trained length, beyond which dynamic and longrope change frequencies."""
    extra = {
        "dynamic": {"factor": 2.0},
        "linear": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
        "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
                     "original_max_position_embeddings": PREFILL_CHUNK + 20},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 32},
    }.get(kind, {})  # fmt: skip
    fields = FIELDS | {
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | extra,
    }
    model, params = transformers_model(fields, 0)
    length = PREFILL_CHUNK + 50
    ids = np.random.default_rng(0).integers(0, 30, (2, length))
    mask = (np.arange(length) >= np.array([[0], [20]])).astype(int)
    expected = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    out = generate(as_float64(params), Config.from_dict(fields), ids, 12, attention_mask=mask)
    np.testing.assert_array_equal(out, expected.numpy())


@pytest.fixture(scope="module")
def model():
    return as_float64(transformers_model(FIELDS, 1)[1]), Config.from_dict(FIELDS)


def test_a_conversation_goes_on_from_its_cache(model):
    ids = np.array([[1, 2, 3, 4]])
    cache = KVCache(2)
    first = generate(*model, ids, 5, cache=cache)
    more = np.c_[first, [[7, 8]]]
    np.testing.assert_array_equal(generate(*model, more, 4, cache=cache), generate(*model, more, 4))
    cache.crop(3)
    np.testing.assert_array_equal(generate(*model, ids, 5, cache=cache), first)


def test_stream_gives_what_generate_gives_as_it_comes(model):
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    tokens = np.stack(list(stream(*model, ids, 5)), axis=1)
    np.testing.assert_array_equal(np.c_[ids, tokens], generate(*model, ids, 5))
    assert tokens.shape == (2, 5)


def test_rows_end_with_any_of_the_end_tokens_and_wait_as_padding(model):
    ids, sampler = np.array([[1, 2, 3], [4, 5, 6]]), Sampler(temperature=3.0, seed=0)
    free = generate(*model, ids, 12, sampler=sampler)[:, 3:]
    ends = [int(free[0, 2]), int(free[1, 7])]
    first = [int(np.argmax(np.isin(row, ends))) for row in free]
    assert first == [2, 7]  # rows that end at different steps
    for pad in (None, 0, 29):
        out = generate(*model, ids, 12, ends, pad_token_id=pad, sampler=sampler)[:, 3:]
        assert out.shape[1] == 8
        np.testing.assert_array_equal(out[1], free[1, :8])
        np.testing.assert_array_equal(out[0, :3], free[0, :3])
        assert (out[0, 3:] == (ends[0] if pad is None else pad)).all()


def test_the_same_seed_writes_the_same_and_others_write_otherwise(model):
    ids = np.array([[1, 2, 3]])
    write = lambda seed: generate(*model, ids, 20, sampler=Sampler(temperature=1.5, seed=seed)).tolist()  # noqa: E731
    assert write(5) == write(5)
    assert len({str(write(seed)) for seed in range(5)}) > 1
    assert write(None) != write(None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: generate(*m, np.ones(3, int), 2), "input_ids must be of shape"),
        (lambda m: generate(*m, np.ones((1, 3), int), 0), "max_new_tokens must be an integer of at least 1"),
        (lambda m: generate(*m, np.ones((1, 3), int), 2, attention_mask=np.array([[1, 1, 0]])), "on the left"),
        (lambda m: generate(*m, np.ones((1, 3), int), 2, attention_mask=np.ones((1, 2))), "attention_mask must be"),
        (lambda m: generate(*m, np.ones((1, 3), int), 2, [3, 30]), "eos_token_id must be .* 0 to 29, got 30"),
        (lambda m: generate(*m, np.ones((1, 3), int), 2, 3, pad_token_id=-1), "pad_token_id must be a token id"),
        (lambda m: generate(*m, np.ones((1, 2), int), 2, attention_mask=np.array([[0.5, 1]])), "only 0"),
        (lambda m: generate(*m, np.ones((1, 3), int), 2, cache=reference.forward(*m, np.ones((1, 3), int)).cache),
         "those and at least one more"),
        (lambda m: generate(*m, np.ones((2, 2), int), 2, attention_mask=np.array([[1, 1], [1, 0]])), "on the left"),
        (lambda m: Sampler(temperature=-1), "temperature must be 0"),
        (lambda m: Sampler(temperature=np.inf), "temperature must be 0"),
        (lambda m: Sampler(top_p=1.5), "top_p must be above 0"),
        (lambda m: Sampler(min_p=-0.1), "min_p must be from 0 to 1"),
        (lambda m: Sampler(repetition_penalty=np.inf), "repetition_penalty must be from 1e-6 to 1e6, got inf"),
        (lambda m: Sampler(temperature=float("nan")), "temperature"),
        (lambda m: Sampler(top_k=0), "top_k must be None"),
        (lambda m: Sampler(top_p=0), "top_p must be above 0"),
        (lambda m: Sampler(min_p=2), "min_p must be from 0 to 1"),
        (lambda m: Sampler(repetition_penalty=0), "repetition_penalty must be from 1e-6 to 1e6, got 0"),
        (lambda m: Sampler(repetition_penalty=1e-300), "repetition_penalty must be from 1e-6 to 1e6, got 1e-300"),
        (lambda m: Sampler(seed=-1), "seed must be"),
        (lambda m: Sampler(seed=2**64), r"seed must be None or an integer from 0 to 2\*\*64 - 1, got 18446744"),
        (lambda m: Sampler(temperature=1e-37), r"temperature must be 0 \(greedy\) or from 1e-6 to 1e6, got 1e-37"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Sampler(seed=1.5), "seed must be None or an integer .* got 1.5"),
        (lambda m: Sampler(top_k=2.5), "top_k must be None .* or an integer of at least 1, got 2.5"),
        (lambda m: Sampler(temperature="0.7"), "temperature must be 0 .* got '0.7'"),
        (lambda m: Sampler(temperature=None), "temperature must be 0 .* got None"),
        (lambda m: generate(*m, np.ones((1, 3), int), 2.5), "max_new_tokens must be an integer of at least 1, got 2.5"),
        (lambda m: generate(*m, np.ones((1, 3), int), "2"), "max_new_tokens must be an integer of at least 1, got '2'"),
    ],
)
def test_arguments_of_another_type_are_named(model, call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # annotations are checked in these tests only
    with pytest.raises(ValueError, match=message):
        call(model)
    sampler = Sampler(np.float32(0.5), np.int64(2), seed=np.int64(3))
    assert generate(*model, np.ones((1, 3), int), np.int64(2), sampler=sampler).shape == (1, 5)


@pytest.mark.filterwarnings("error")
def test_the_widest_values_that_are_taken_stay_within_float32():
    """With logits of 1000, larger than those of any model."""
    scores, seen = np.float32([[1000, -1000, 999]]), np.array([[0, 1]])
    for temperature in (1e-6, 1e6):
        for penalty in (1e-6, 1e6):
            sampler = Sampler(temperature, top_k=2, repetition_penalty=penalty, seed=2**64 - 1)
            left = sampler.filter(scores, seen)
            assert left.dtype == np.float32
            assert np.isfinite(left).sum() == 2
            assert sampler.pick(scores, np.random.default_rng(sampler.seed), seen)[0] in np.flatnonzero(left > -np.inf)


@st.composite
def logits(draw):
    rng = np.random.default_rng(draw(SEEDS))
    return rng.normal(
        scale=draw(st.sampled_from([0.1, 1.0, 5.0])), size=(draw(st.integers(1, 3)), draw(st.integers(2, 50)))
    )


FILTERS = {
    "temperature": (ours.temperature, theirs.TemperatureLogitsWarper, [0.3, 1.0, 2.0]),
    "top_k": (ours.top_k, theirs.TopKLogitsWarper, [1, 3, 100]),
    "top_p": (ours.top_p, theirs.TopPLogitsWarper, [0.1, 0.5, 0.95, 1.0]),
    "min_p": (ours.min_p, theirs.MinPLogitsWarper, [0.0, 0.05, 0.5, 1.0]),
}


@pytest.mark.parametrize("name", FILTERS)
@given(scores=logits(), data=st.data())
def test_filters_equal_transformers(name, scores, data):
    mine, their, values = FILTERS[name]
    value = data.draw(st.sampled_from(values))
    expected = their(value)(None, torch.tensor(scores)).numpy()
    np.testing.assert_allclose(mine(scores, value), expected, rtol=1e-12)


@given(logits(), SEEDS, st.sampled_from([0.5, 1.2, 3.0]))
def test_repetition_penalty_equals_transformers(scores, seed, penalty):
    seen = np.random.default_rng(seed).integers(0, scores.shape[1], (len(scores), 7))
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), torch.tensor(scores)).numpy()
    np.testing.assert_allclose(ours.repetition_penalty(scores, seen, penalty), expected, rtol=1e-12)
    # Unlike transformers, we do not penalise padding tokens, so that a padded row generates what it would alone.
    mask = np.ones_like(seen)
    mask[:, :3] = 0
    np.testing.assert_array_equal(
        ours.repetition_penalty(scores, seen, penalty, mask), ours.repetition_penalty(scores, seen[:, 3:], penalty)
    )


@given(logits(), SEEDS, st.sampled_from([0.5, 2.0]), st.sampled_from([2, 10]), st.sampled_from([0.4, 0.9]))
def test_all_filters_together_keep_transformers_order(scores, seed, temperature, k, p):
    seen = np.random.default_rng(seed).integers(0, scores.shape[1], (len(scores), 3))
    chain = theirs.LogitsProcessorList(
        [theirs.RepetitionPenaltyLogitsProcessor(1.3), theirs.TemperatureLogitsWarper(temperature),
         theirs.TopKLogitsWarper(k), theirs.TopPLogitsWarper(p), theirs.MinPLogitsWarper(0.05)]
    )  # fmt: skip
    sampler = Sampler(temperature, k, p, 0.05, 1.3)
    expected = chain(torch.tensor(seen), torch.tensor(scores)).numpy()
    np.testing.assert_allclose(sampler.filter(scores, seen), expected, rtol=1e-12)


def test_draws_follow_the_probabilities():
    scores = np.log(np.array([[0.5, 0.3, 0.2, 0.0]]) + 1e-300)
    rng = np.random.default_rng(0)
    counts = np.bincount(ours.draw(np.repeat(scores, 20_000, axis=0), rng), minlength=4) / 20_000
    # Five standard deviations of a frequency over 20,000 draws: 5 · sqrt(0.25 / 20000) = 0.018.
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2, 0.0], atol=0.018)
    assert counts[3] == 0


def test_corners_of_the_filters():
    flat, sharp = np.zeros((1, 4)), np.array([[50.0, 0.0]])
    assert np.isfinite(ours.top_p(flat, 0.75)).sum() == 3  # reaching p exactly is enough
    assert np.isfinite(ours.top_p(sharp, 1e-18)).sum() == 1  # the likeliest token stays, however small p is
    assert np.isneginf(ours.top_p(np.array([[0.0, -np.inf]]), 1.0)[0, 1])
    assert np.isfinite(ours.top_k(flat, 2)).sum() == 4  # ties with the k-th are kept
    greedy = Sampler(repetition_penalty=4.0).pick(np.array([[2.0, 1.0]]), np.random.default_rng(0), np.array([[0]]))
    assert greedy[0] == 1
