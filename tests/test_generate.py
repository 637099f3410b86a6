"""`generate` writes what transformers does with the same weights and seed; `stream` yields its text."""

import copy
import functools
import gc
import signal
import threading
import time
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import transformers_model
from strategies import SEEDS, configs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache as TheirDynamicCache

from llama import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast, StaticCache
from llama.checkpoints.gguf import sentencepiece_bpe
from llama.generation.stopping import MaxLengthCriteria, StoppingCriteriaList
from llama.generation.streamers import BaseStreamer, TextIteratorStreamer, TextStreamer

FIELDS = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2)  # fmt: skip
NEVER = 29  # an end token that `without` suppresses: rows then end at max_new_tokens
PROMPT = torch.tensor([[1, 7, 3, 9, 3]])
PROMPTS = torch.tensor([[4, 7, 3, 9, 3], [5, 11, 2, 8, 6]])
PADDED = torch.tensor([[0, 0, 3, 9, 3], [5, 11, 2, 8, 6]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def twins(fields, seed, **more):
    """Return our model and transformers', with the same weights."""
    theirs = transformers_model(fields, seed, **more)[0]
    ours = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(fields), **more)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@functools.cache
def toys(seed=0, **more):
    """Return twins shared by several tests, which must not modify them."""
    return twins(FIELDS | more, seed)


def agree(pair, *args, seed=0, theirs=None, **options):
    """Return the output of our `generate`, which must equal transformers' (called with `theirs` as well)."""
    torch.manual_seed(seed)
    mine = pair[0].generate(*args, **options)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # transformers advises to set max_new_tokens
        expected = pair[1].generate(*args, **(options | (theirs or {})))
    same(mine, expected)
    return mine


def same(mine, expected):
    """Assert equal ids, and floats within 1e-4: float32's accuracy for logits around 10 and their sums."""
    if isinstance(mine, torch.Tensor):
        near = 1e-4 if mine.is_floating_point() else 0
        torch.testing.assert_close(mine, expected, rtol=near, atol=near, check_dtype=near > 0)
    elif isinstance(mine, dict):
        assert type(mine).__name__ == type(expected).__name__
        assert set(mine) - {"past_key_values"} == set(expected) - {"past_key_values"}
        for name in set(mine) - {"past_key_values"}:
            same(mine[name], expected[name])
    else:
        assert len(mine) == len(expected)
        for one, other in zip(mine, expected, strict=True):
            same(one, other)


@st.composite
def prompts(draw, vocab_size, longest=9):
    """Draw (ids, mask): one to three texts, padded on the left or not at all."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    rng = np.random.default_rng(draw(SEEDS))
    ids = torch.tensor(rng.integers(0, vocab_size, (rows, length)))
    real = torch.tensor([draw(st.integers(1, length)) for _ in range(rows)])[:, None]
    return ids, draw(st.sampled_from([torch.ones_like(ids), (torch.arange(length) >= length - real).long()]))


def ends(vocab_size, most=3):
    """Draw end tokens: none, one or several."""
    token = st.integers(0, vocab_size - 1)
    return st.one_of(st.none(), token, st.lists(token, min_size=1, max_size=most))


# Greedy search and sampling.


@given(fields=configs(), seed=SEEDS, new=st.integers(1, 12), data=st.data())
@settings(max_examples=50)
def test_greedy_text_of_drawn_models_equals_transformers(fields, seed, new, data):
    """Also past the trained length, where dynamic and longrope change their angles; with a new model each time, since
    transformers' remembers the longest text it has seen."""
    ids, mask = data.draw(prompts(fields["vocab_size"]))
    eos = data.draw(ends(fields["vocab_size"]))
    pair = twins(fields, seed, eos_token_id=None, bos_token_id=None)
    agree(pair, ids, attention_mask=mask, max_new_tokens=new, eos_token_id=eos, pad_token_id=eos and 0)


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [3.0, 5.0],
     "original_max_position_embeddings": 8},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_what_was_written_before_changes_nothing(rope):
    """Angles follow the current text's length; transformers' dynamic ones follow the longest text it has seen."""
    fields = FIELDS | {"max_position_embeddings": 8, "rope_parameters": rope | {"rope_theta": 1e4}}
    ours, theirs = twins(fields, 1)
    long = torch.arange(3, 28)[None]
    options = dict(max_new_tokens=8, eos_token_id=-1)
    first = agree((ours, theirs), PROMPT, **options)
    agree((ours, theirs), long, **options)
    assert torch.equal(ours.generate(PROMPT, **options), first)
    assert torch.equal(ours.generate(first[:, :11], max_new_tokens=2, eos_token_id=-1),
                       twins(fields, 1)[1].generate(first[:, :11], max_new_tokens=2, eos_token_id=-1))  # fmt: skip


FILTERS = {
    "temperature": st.sampled_from([0.3, 0.8, 1.7]),
    "top_k": st.sampled_from([0, 1, 4, 100]),
    "top_p": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "typical_p": st.sampled_from([0.2, 0.9, 1.0]),
    "epsilon_cutoff": st.sampled_from([0.0, 0.03, 0.3]),
    "eta_cutoff": st.sampled_from([0.0, 0.03, 0.3]),
    "renormalize_logits": st.booleans(),
}
RULES = {
    "repetition_penalty": st.sampled_from([0.5, 1.3, 4.0]),
    "no_repeat_ngram_size": st.sampled_from([1, 2, 3]),
    "bad_words_ids": st.lists(st.lists(st.integers(3, 28), min_size=1, max_size=2), max_size=4).map(
        lambda words: [*words, [3, 4]]
    ),
    "sequence_bias": st.dictionaries(
        st.tuples(st.integers(3, 28)) | st.tuples(st.integers(3, 28), st.integers(3, 28)),
        st.sampled_from([-5.0, 3.0]), min_size=1, max_size=5,
    ),
    "min_length": st.integers(0, 12),
    "min_new_tokens": st.integers(0, 8),
    "forced_bos_token_id": st.just(7),
    "forced_eos_token_id": st.sampled_from([5, [5, 6]]),
    "remove_invalid_values": st.booleans(),
    "exponential_decay_length_penalty": st.sampled_from([(2, 1.5), (0, 1.1)]),
    "suppress_tokens": st.just([3, 8]),
    "begin_suppress_tokens": st.just([9, 11]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=4)
def test_each_filter_alone_draws_what_transformers_draws(name, data, seed):
    value = data.draw(FILTERS[name])
    agree(toys(1), PROMPTS, seed=seed, do_sample=True, max_new_tokens=8, pad_token_id=0, **{name: value})


@given(options=st.fixed_dictionaries({}, optional=FILTERS | RULES), batch=prompts(30), eos=ends(30), seed=SEEDS,
       times=st.integers(1, 3), length=st.integers(1, 8))  # fmt: skip
@settings(max_examples=50)
def test_drawn_options_together_draw_what_transformers_draws(options, batch, eos, seed, times, length):
    ids, mask = batch
    if "repetition_penalty" in options:
        mask = torch.ones_like(ids)  # transformers penalises the padding's tokens too; see the test below
    agree(toys(1), ids, seed=seed, attention_mask=mask, do_sample=True, eos_token_id=eos or 4, pad_token_id=0,
          max_new_tokens=length, num_return_sequences=times, **options)  # fmt: skip


@given(options=st.fixed_dictionaries({}, optional=RULES), batch=prompts(30), eos=ends(30), length=st.integers(1, 8))
@settings(max_examples=30)
def test_drawn_rules_of_greedy_search_equal_transformers(options, batch, eos, length):
    ids, mask = batch
    mask = torch.ones_like(ids) if "repetition_penalty" in options else mask
    agree(toys(2), ids, attention_mask=mask, eos_token_id=eos or 4, pad_token_id=0, max_new_tokens=length, **options)


def test_another_seed_draws_another_text():
    model = toys()[0]
    texts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        texts.add(str(model.generate(PROMPT, do_sample=True, temperature=3.0, max_new_tokens=10).tolist()))
    assert len(texts) == 5


def test_a_padded_text_is_written_as_it_is_alone():
    """Also under a repetition penalty, where transformers counts the padding as text."""
    model, theirs = toys(3)
    options = dict(max_new_tokens=12, eos_token_id=None, repetition_penalty=1.5)
    together = model.generate(PADDED, attention_mask=MASK, pad_token_id=0, **options)
    alone = model.generate(PADDED[:1, 2:], **options)
    assert torch.equal(together[:1, 2:], alone)
    assert torch.equal(together[1:], model.generate(PADDED[1:], **options))
    assert torch.equal(alone, theirs.generate(PADDED[:1, 2:], **options))
    bigrams = model.generate(PADDED, attention_mask=MASK, max_new_tokens=12, no_repeat_ngram_size=2)[0, 2:].tolist()
    assert len(set(pairwise(bigrams))) == len(bigrams) - 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_changes_nothing(use_cache):
    pair = toys(1)
    for options in (dict(), dict(do_sample=True), dict(num_beams=3)):
        agree(pair, PADDED, attention_mask=MASK, use_cache=use_cache, max_new_tokens=8, pad_token_id=0, **options)


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True), dict(num_beams=3), dict(prompt_lookup_num_tokens=3)])
def test_the_static_cache_writes_what_the_growing_one_does(options):
    model = toys(1)[0]
    options |= dict(max_new_tokens=9, return_dict_in_generate=True)
    torch.manual_seed(0)
    expected = model.generate(PROMPT, **options)
    torch.manual_seed(0)
    out = model.generate(PROMPT, cache_implementation="static", **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert isinstance(out.past_key_values, StaticCache)
    assert out.past_key_values.max_cache_len == PROMPT.shape[1] + 9
    assert out.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(do_sample=True),
        dict(num_beams=3),
        dict(cache_implementation="static"),
        dict(prompt_lookup_num_tokens=3),
        dict(attention_mask=torch.tensor([[0, 0, 1, 1, 1]])),
        dict(position_ids=torch.tensor([[0, 3, 4, 7, 9]])),
        dict(guidance_scale=1.5),
        dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=4),
    ],
    ids=lambda options: ",".join(options) or "greedy",
)
def test_a_prompt_may_be_read_in_chunks(options, chunk):
    rope = {name: options[name] for name in ("rope_parameters", "max_position_embeddings") if name in options}
    model = twins(FIELDS | rope, 1)[0]
    options = {name: value for name, value in options.items() if name not in rope} | dict(max_new_tokens=9)
    options |= dict(eos_token_id=-1, return_dict_in_generate=True, output_logits=True)
    written = []
    for chunks in (dict(), dict(prefill_chunk_size=chunk)):
        torch.manual_seed(0)
        written.append(model.generate(PROMPT, **chunks, **options))
    same(*written)


@pytest.mark.parametrize(("chunk", "calls"), [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (9, [5])])
def test_a_chunk_is_the_most_that_is_read_at_once(chunk, calls):
    model, _ = twins(FIELDS, 1)
    read = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    model.generate(PROMPT, max_new_tokens=4, eos_token_id=-1, prefill_chunk_size=chunk)
    assert read == [*calls, 1, 1, 1]
    read.clear()
    model.generate(PROMPT, max_new_tokens=4, eos_token_id=-1, prefill_chunk_size=chunk, prompt_lookup_num_tokens=2)
    assert read[: len(calls) - 1] == calls[:-1]
    assert max(read) <= chunk + 3  # drafted tokens are read and checked along with the last chunk


def test_embeddings_and_the_rest_of_a_chat_may_be_read_in_chunks():
    model = toys(1)[0]
    options = dict(max_new_tokens=6, eos_token_id=-1)
    embeds = model.get_input_embeddings().weight.detach()[PROMPT] * 1.5
    expected = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(model.generate(inputs_embeds=embeds, prefill_chunk_size=2, **options), expected)
    first = model.generate(PROMPTS, return_dict_in_generate=True, prefill_chunk_size=2, **options)
    longer = torch.cat((first.sequences, PROMPTS), dim=1)
    again = model.generate(longer, past_key_values=first.past_key_values, prefill_chunk_size=2, **options)
    assert torch.equal(again, model.generate(longer, **options))


def test_a_record_is_of_the_whole_prompt_whatever_the_chunks():
    options = dict(max_new_tokens=4, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True)
    same(toys(1)[0].generate(PROMPT, prefill_chunk_size=2, **options), toys(1)[0].generate(PROMPT, **options))


# Ends, padding and lengths.


def test_rows_end_with_any_end_token_and_are_filled_up():
    pair = toys(4)
    free = pair[0].generate(PROMPTS, max_new_tokens=12, eos_token_id=None)[:, 5:]
    late = next(int(token) for token in free[1] if token not in free[0, :3])
    for eos in ([int(free[0, 1])], [int(free[0, 1]), late], [late, int(free[0, 1])]):
        for pad in (None, 0, 17):
            out = agree(pair, PROMPTS, max_new_tokens=12, eos_token_id=eos, pad_token_id=pad)
            first = int((torch.isin(out[0, 5:], torch.tensor(eos))).nonzero()[0])
            assert first == next(i for i, token in enumerate(free[0].tolist()) if token in eos)
            assert (out[0, 6 + first :] == (eos[0] if pad is None else pad)).all()


def test_end_tokens_may_be_a_tensor_and_minus_one_never_comes():
    model, theirs = toys(4)
    free = model.generate(PROMPTS, max_new_tokens=6, eos_token_id=-1)
    assert free.shape == (2, 11)
    eos = torch.tensor([int(free[0, 6]), int(free[0, 8])])
    same(model.generate(PROMPTS, max_new_tokens=6, eos_token_id=eos, pad_token_id=0),
         theirs.generate(PROMPTS, max_new_tokens=6, eos_token_id=eos, pad_token_id=0))  # fmt: skip


def test_lengths():
    pair = toys(1)
    options = dict(eos_token_id=None, pad_token_id=0)
    assert agree(pair, PROMPT, **options).shape == (1, 25)  # 20 more, as in transformers 5
    assert agree(pair, PROMPT, max_length=8, **options).shape == (1, 8)
    assert agree(pair, PROMPT, max_length=8, max_new_tokens=9, **options).shape == (1, 14)
    assert agree(toys(1, max_position_embeddings=16), PROMPT, **options).shape == (1, 16)
    assert agree(toys(1, max_position_embeddings=16), PROMPT, max_new_tokens=20, **options).shape == (1, 25)
    end = int(agree(pair, PROMPT, max_new_tokens=1, **options)[0, -1])
    for options in (
        dict(min_new_tokens=4),
        dict(min_length=9),
        dict(min_length=3),
        dict(min_length=3, min_new_tokens=4),
    ):
        out = agree(pair, PROMPT, max_new_tokens=7, eos_token_id=end, pad_token_id=0, **options)
        least = max(options.get("min_new_tokens", 0), options.get("min_length", 0) - 5, 0)
        assert (out[0, 5 : 5 + least] != end).all()
        assert least or out.shape == (1, 6)


@pytest.mark.parametrize("length", [5, 3])
def test_no_room_for_a_token_is_an_error(length):
    for model in toys():
        with pytest.raises(ValueError, match=f"Input length of input_ids is 5, but `max_length` is set to {length}"):
            model.generate(PROMPT, max_length=length)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # transformers'
@pytest.mark.parametrize("room", [5, 4])
def test_the_default_length_leaves_no_room_at_the_end_of_the_positions(room):
    for model in toys(1, max_position_embeddings=room):
        with pytest.raises(ValueError, match="Input length of input_ids is 5, but `max_length` is set to"):
            model.generate(PROMPT)


def test_a_forced_end_stands_at_the_last_place_whatever_sets_it():
    agree(toys(1), PROMPT, max_new_tokens=4, forced_eos_token_id=6)
    agree(toys(1), PROMPT, max_length=9, forced_eos_token_id=6)
    out = agree(toys(1, max_position_embeddings=16), PROMPT, forced_eos_token_id=6, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 16)
    assert out[0, -1] == 6


def test_max_time_ends_the_text():
    assert toys()[0].generate(PROMPT, max_time=0.0, max_new_tokens=500, eos_token_id=None).shape == (1, 6)


# Beams.


BEAMS = {
    "num_beams": st.integers(2, 4),
    "length_penalty": st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "use_cache": st.booleans(),
}


@given(options=st.fixed_dictionaries(BEAMS, optional=RULES), batch=prompts(30), eos=ends(30, most=12),
       new=st.integers(1, 10), data=st.data(), seed=SEEDS)  # fmt: skip
@settings(max_examples=120)
def test_beams_equal_transformers(options, batch, eos, new, data, seed):
    ids, mask = batch
    mask = torch.ones_like(ids) if "repetition_penalty" in options else mask
    times = data.draw(st.integers(1, options["num_beams"]))
    if "exponential_decay_length_penalty" in options:
        eos = eos or 4
    out = agree(toys(seed % 5), ids, attention_mask=mask, eos_token_id=eos, pad_token_id=17, max_new_tokens=new,
                num_return_sequences=times, return_dict_in_generate=True, output_scores=True, **options)  # fmt: skip
    assert len(out.sequences) == len(ids) * times


@given(options=st.fixed_dictionaries(BEAMS, optional=FILTERS), batch=prompts(30), eos=ends(30), new=st.integers(1, 10),
       seed=SEEDS)  # fmt: skip
@settings(max_examples=40)
def test_beam_sampling_equals_transformers(options, batch, eos, new, seed):
    ids, mask = batch
    if options.get("top_p") == 0.0 or options.get("top_k") == 1:
        options["num_beams"] = 2
    agree(toys(seed % 5), ids, attention_mask=mask, eos_token_id=eos, pad_token_id=17, max_new_tokens=new, seed=seed,
          do_sample=True, **options)  # fmt: skip


@given(fields=configs(), seed=SEEDS, new=st.integers(1, 12), data=st.data())
@settings(max_examples=15)
def test_beams_of_drawn_models_equal_transformers(fields, seed, new, data):
    ids, mask = data.draw(prompts(fields["vocab_size"]))
    pair = twins(fields, seed, eos_token_id=3, bos_token_id=None)
    agree(pair, ids, attention_mask=mask, max_new_tokens=new, pad_token_id=4, num_beams=2)


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_beams_of_which_many_end_equal_transformers(early, penalty):
    """Prompts of a batch finish at different steps; later beams may or may not beat those that have ended."""
    options = dict(eos_token_id=list(range(3, 24, 3)), pad_token_id=17, max_new_tokens=8, num_return_sequences=2,
                   length_penalty=penalty, early_stopping=early)  # fmt: skip
    options |= dict(return_dict_in_generate=True, output_scores=True)
    for seed in range(10):
        ids = PROMPTS.repeat(2, 1) + torch.arange(4)[:, None] + seed
        agree(toys(seed % 5), ids, attention_mask=torch.ones_like(ids), num_beams=2 + seed % 3, **options)


def test_beams_find_a_likelier_text_than_greedy_search():
    """Also, `sequences_scores` agrees with its definition when the text is scored again."""
    model = toys(2)[0]
    found = []
    for beams in (1, 6):
        out = model.generate(PROMPT, num_beams=beams, max_new_tokens=6, eos_token_id=None, length_penalty=0.7,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
        logs = model(out.sequences).logits.log_softmax(-1)[0, 4:-1]
        found.append(logs.gather(-1, out.sequences[0, 5:, None]).sum().item())
    assert found[1] > found[0]
    assert out.sequences_scores.item() == pytest.approx(found[1] / 6**0.7, rel=1e-5)


def test_beams_that_ended_are_filled_up_with_the_padding():
    """Also with token 0, which transformers treats as unset here, padding with the end token instead."""
    for pad in (0, 17):
        options = dict(num_beams=3, max_new_tokens=8, eos_token_id=[4, 5], pad_token_id=pad, length_penalty=-2.0)
        out = toys(3)[0].generate(PROMPTS.repeat(2, 1) + torch.tensor([[0], [1], [9], [12]]), **options)
        rest = [row[1 + next((i for i, t in enumerate(row) if t in (4, 5)), 8) :] for row in out[:, 5:].tolist()]
        assert any(rest)
        assert {token for row in rest for token in row} == {pad}


def test_criteria_end_beams():
    pair = toys(2)
    mine = StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] % 3 == 0])
    theirs = transformers.StoppingCriteriaList(mine)
    for early in (True, False, "never"):
        agree(pair, PROMPTS, num_beams=3, num_return_sequences=2, max_new_tokens=9, early_stopping=early,
              stopping_criteria=mine, theirs={"stopping_criteria": theirs}, pad_token_id=17)  # fmt: skip


# Hooks.


class Log(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True), dict(use_cache=False)])
def test_a_streamer_hears_the_prompts_each_step_and_the_end(options):
    mine, expected = Log(), Log()
    out = agree(toys(4), PROMPTS, max_new_tokens=6, pad_token_id=0, streamer=mine, theirs={"streamer": expected},
                **options)  # fmt: skip
    assert mine.heard == expected.heard == [PROMPTS.tolist(), *out[:, 5:].T.tolist(), "end"]


def test_a_streamer_hears_a_step_before_the_next_begins():
    calls = []

    class Slow(Log):
        def put(self, value):
            calls.append("put")

    model, _ = twins(FIELDS, 0)
    model.register_forward_pre_hook(lambda *_: calls.append("forward"))
    model.generate(PROMPT, max_new_tokens=3, eos_token_id=None, streamer=Slow())
    assert calls == ["put", *["forward", "put"] * 3]


def test_beams_refuse_a_streamer():
    for model in toys():
        with pytest.raises(ValueError, match="streamer"):
            model.generate(PROMPT, num_beams=2, streamer=Log(), max_new_tokens=2)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda ids, scores, **_: ids.shape[1] >= 8,  # one bool for all
        lambda ids, scores, **_: ids[:, -1] > 12,
        lambda ids, scores, **_: torch.tensor([True, ids.shape[1] > 8]),
        lambda ids, scores, **_: (scores[-1].argmax(-1) > 20) | (ids.shape[1] > 9),
    ],
)
def test_stopping_criteria_stop_rows(criterion):
    def theirs(ids, scores, **kwargs):
        done = criterion(ids, scores, **kwargs)
        return torch.full((len(ids),), done) if isinstance(done, bool) else done

    options = dict(max_new_tokens=12, pad_token_id=0, eos_token_id=NEVER, bad_words_ids=[[NEVER, 1]],
                   return_dict_in_generate=True, output_scores=True)  # fmt: skip
    pair = toys(4)
    agree(pair, PROMPTS, stopping_criteria=[criterion], **options,
          theirs={"stopping_criteria": transformers.StoppingCriteriaList([theirs])})  # fmt: skip


def test_a_max_length_among_the_criteria_takes_the_place_of_ours():
    model, theirs = toys(1)
    for length in (7, 30, 3):  # shorter than ours, longer, and within the prompt, where one token is written
        out = model.generate(PROMPT, eos_token_id=None, max_new_tokens=9, stopping_criteria=[MaxLengthCriteria(length)])
        own = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(length)])
        same(out, theirs.generate(PROMPT, eos_token_id=None, max_new_tokens=9, stopping_criteria=own))


def test_logits_processors_see_the_text_and_change_the_scores():
    seen = []

    def next_of_last(ids, scores):
        seen.append(ids.clone())
        return scores.index_fill(1, (ids[0, -1:] + 1) % 29, 1e4)

    out = agree(toys(1), PROMPT, logits_processor=[next_of_last], max_new_tokens=4, do_sample=True, temperature=0.5)
    assert out[0].tolist() == [*PROMPT[0].tolist(), 4, 5, 6, 7]
    assert [len(ids[0]) for ids in seen] == [5, 6, 7, 8] * 2
    assert all(torch.equal(ids, out[:, : ids.shape[1]]) for ids in seen)


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True), dict(num_beams=3)])
def test_prefixes_allow_what_a_function_says(options):
    def allowed(row, ids):
        assert ids.dim() == 1
        return [3 + row, 5, 7, 9 + len(ids) % 2]

    out = agree(toys(1), PROMPTS, prefix_allowed_tokens_fn=allowed, max_new_tokens=7, pad_token_id=0, **options)
    for row in range(2):
        assert set(out[row, 5:].tolist()) <= {3 + row, 5, 7, 9, 10}


def test_guidance_equals_transformers():
    negative = torch.tensor([[2, 5, 7]])
    for options in (
        dict(),
        dict(negative_prompt_ids=negative),
        dict(negative_prompt_ids=negative, negative_prompt_attention_mask=torch.tensor([[0, 1, 1]])),
        dict(negative_prompt_ids=negative, use_cache=False),
        dict(do_sample=True, negative_prompt_ids=negative),
    ):
        for scale in (0.5, 1.0, 3.0):
            guided = agree(toys(1), PROMPT, guidance_scale=scale, max_new_tokens=8, eos_token_id=None, **options)
    assert not torch.equal(guided, toys(1)[0].generate(PROMPT, max_new_tokens=8, eos_token_id=None))


# Records.


EVERYTHING = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True,
                  output_hidden_states=True)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [dict(), dict(do_sample=True, top_k=5, num_return_sequences=2), dict(use_cache=False), dict(num_beams=3),
     dict(num_beams=3, num_return_sequences=2, do_sample=True), dict(num_beams=2, use_cache=False),
     dict(min_new_tokens=4, temperature=0.5, do_sample=True, num_return_sequences=1)],
    ids=str,
)  # fmt: skip
def test_records_hold_what_transformers_records(options):
    out = agree(toys(4), PROMPTS, max_new_tokens=7, pad_token_id=17, **EVERYTHING, **options)
    rows = 2 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    steps = len(out.scores)
    assert len(out.logits) == len(out.attentions) == len(out.hidden_states) == steps
    assert out.scores[0].shape == out.logits[0].shape == (rows, 30)
    for step in range(steps):
        read = 5 + step if step == 0 or options.get("use_cache") is False else 1
        assert [a.shape for a in out.attentions[step]] == [(rows, 4, read, 5 + step)] * 2
        assert [h.shape for h in out.hidden_states[step]] == [(rows, read, 16)] * 3
    assert ("past_key_values" in out) == options.get("use_cache", True)
    if "past_key_values" in out:
        assert out.past_key_values.get_seq_length() == 5 + steps - 1


def test_a_record_holds_what_was_asked_for_and_no_more():
    model = toys(1)[0]
    assert isinstance(model.generate(PROMPT, output_scores=True, max_new_tokens=2), torch.Tensor)
    out = model.generate(PROMPT, return_dict_in_generate=True, max_new_tokens=2)
    assert list(out) == ["sequences", "past_key_values"]
    out = model.generate(PROMPT, return_dict_in_generate=True, output_logits=True, max_new_tokens=2, num_beams=2)
    assert list(out) == ["sequences", "logits", "beam_indices", "past_key_values"]
    agree(toys(1), PROMPT, return_dict_in_generate=True, output_logits=True, max_new_tokens=2, num_beams=2)


@pytest.mark.parametrize("drafts", [dict(), dict(prompt_lookup_num_tokens=3)])
@pytest.mark.parametrize("in_place", [False, True])
def test_logits_are_those_before_the_processors_and_scores_those_after(in_place, drafts):
    def suppress(ids, scores):
        scores[:, [4, 5]] = -torch.inf
        return scores

    model = toys(1)[0]
    options = dict(logits_processor=[suppress]) if in_place else dict(suppress_tokens=[4, 5])
    out = model.generate(PROMPT, max_new_tokens=3, **options, **drafts, **EVERYTHING)
    expected = model(out.sequences[:, :-1]).logits[0, 4:]
    same(torch.cat(out.logits), expected)
    for scores, logits in zip(out.scores, expected, strict=True):
        assert scores[0, [4, 5]].isneginf().all()
        same(scores[0, 6:], logits[6:])


@given(options=st.fixed_dictionaries(BEAMS), eos=ends(30), seed=SEEDS, normalised=st.booleans())
@settings(max_examples=12)
def test_transition_scores_of_beams_equal_transformers(options, eos, seed, normalised):
    ours, theirs = pair = toys(seed % 5)
    out = agree(pair, PROMPTS, eos_token_id=eos, pad_token_id=17, max_new_tokens=6, num_return_sequences=2,
                return_dict_in_generate=True, output_scores=True, **options)  # fmt: skip
    arguments = (out.sequences, out.scores, out.beam_indices)
    scores = ours.compute_transition_scores(*arguments, normalize_logits=normalised)
    same(scores, theirs.compute_transition_scores(*arguments, normalize_logits=normalised))
    if not normalised:
        lengths = (out.beam_indices >= 0).sum(-1)
        same(scores.sum(-1) / lengths ** options["length_penalty"], out.sequences_scores)


def test_transition_scores_are_0_behind_the_end_of_a_beam():
    ours, theirs = pair = toys(3)
    out = agree(pair, PROMPTS, num_beams=4, num_return_sequences=4, eos_token_id=list(range(3, 24, 3)), pad_token_id=17,
                max_new_tokens=8, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    behind = out.beam_indices < 0
    assert behind.any()
    scores = ours.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    assert torch.equal(scores == 0, behind)
    same(scores, theirs.compute_transition_scores(out.sequences, out.scores, out.beam_indices))


@pytest.mark.parametrize("normalised", [True, False])
def test_transition_scores_of_one_text_equal_transformers(normalised):
    ours, theirs = toys(4)
    for options in (dict(), dict(do_sample=True), dict(do_sample=True, num_return_sequences=3)):
        out = ours.generate(PROMPTS, max_new_tokens=6, return_dict_in_generate=True, output_scores=True, **options)
        scores = ours.compute_transition_scores(out.sequences, out.scores, normalize_logits=normalised)
        same(scores, theirs.compute_transition_scores(out.sequences, out.scores, normalize_logits=normalised))
        assert scores.shape == (len(out.sequences), 6)
        assert not normalised or (scores < 0).all()


# Where options come from.


def with_defaults(**options):
    pair = twins(FIELDS, 1)
    for model in pair:
        model.generation_config = type(model.generation_config)(eos_token_id=2, bos_token_id=1, **options)
    return pair


def test_options_come_from_keywords_then_the_given_config_then_the_models_own():
    pair = with_defaults(max_new_tokens=4, do_sample=True, temperature=2.0, top_k=7)
    own = lambda **options: {  # noqa: E731
        "generation_config": GenerationConfig(**options),
        "theirs": {"generation_config": transformers.GenerationConfig(**options)},
    }
    assert agree(pair, PROMPT, eos_token_id=-1).shape == (1, 9)
    assert agree(pair, PROMPT, max_new_tokens=6, eos_token_id=-1).shape == (1, 11)
    assert agree(pair, PROMPT, **own(max_new_tokens=5, eos_token_id=-1)).shape == (1, 10)
    assert agree(pair, PROMPT, **own(max_new_tokens=5, eos_token_id=-1), max_new_tokens=7).shape == (1, 12)
    again = own(max_new_tokens=5, eos_token_id=-1)
    assert agree(pair, PROMPT, **again, max_new_tokens=None).shape == (1, 25)  # overrides the model's own value too
    greedy = agree(pair, PROMPT, do_sample=False, eos_token_id=-1)
    for seed in range(4):
        torch.manual_seed(seed)
        assert torch.equal(pair[0].generate(PROMPT, do_sample=False, eos_token_id=-1), greedy)
    drawn = [agree(pair, PROMPT, seed=seed, **own(eos_token_id=-1)).tolist() for seed in range(4)]
    assert len(set(map(str, drawn))) > 1  # the model's do_sample applies where the given config leaves it unset


def test_keywords_are_judged_together_with_the_models_own_options():
    """Llama 3's files set do_sample; num_return_sequences=2 alone would be rejected."""
    pair = with_defaults(do_sample=True)
    assert agree(pair, PROMPT, num_return_sequences=2, max_new_tokens=3).shape == (2, 8)
    pair = with_defaults(num_beams=3)
    assert agree(pair, PROMPT, num_return_sequences=2, max_new_tokens=3).shape == (2, 8)


def test_none_takes_an_option_back():
    pair = toys(1)
    for name in ("temperature", "top_p", "max_length", "min_length", "repetition_penalty", "eos_token_id"):
        agree(pair, PROMPT, do_sample=True, max_new_tokens=6, **{name: None})
    for name in ("num_beams", "num_return_sequences", "use_cache", "do_sample", "top_k"):  # some fail in transformers
        expected = pair[0].generate(PROMPT, max_new_tokens=6)
        assert torch.equal(pair[0].generate(PROMPT, max_new_tokens=6, **{name: None}), expected)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=2), dict(do_sample=True), dict(prompt_lookup_num_tokens=2)])
def test_generate_leaves_configs_and_inputs_as_they_were(options):
    model, _ = twins(FIELDS, 1)
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], max_length=12)
    own = GenerationConfig(num_return_sequences=1, pad_token_id=0, **options)
    before = model.generation_config.to_dict(), own.to_dict(), model.config.to_dict()
    ids, mask = PADDED[:1].clone(), MASK[:1].clone()
    weights = copy.deepcopy(model.state_dict())
    out = model.generate(ids, own, attention_mask=mask, top_k=4, max_new_tokens=5, length_penalty=2.0)
    assert (model.generation_config.to_dict(), own.to_dict(), model.config.to_dict()) == before
    assert torch.equal(ids, PADDED[:1])
    assert torch.equal(mask, MASK[:1])
    out.zero_()
    assert torch.equal(ids, PADDED[:1])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("name", ["foo", "max_new_token", "token_type_ids", "temprature"])
def test_unknown_keywords_are_named(name):
    for model in toys():
        with pytest.raises(ValueError, match=rf"`model_kwargs` are not used by the model: \['{name}'\]"):
            model.generate(PROMPT, max_new_tokens=2, **{name: 1})


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([PROMPTS], dict(attention_mask=torch.tensor([[1, 1, 1, 1, 0], [1] * 5])), "pad prompts on the left"),
        ([PROMPTS], dict(attention_mask=torch.ones(2, 1, 5, 5)), "`attention_mask` passed to `generate` must be"),
        ([PROMPTS], dict(attention_mask=torch.ones(2, 4)), "`attention_mask` passed to `generate` must be"),
        ([PROMPT], dict(input_ids=PROMPT), "the same argument"),
        ([PROMPT[0]], dict(), r"\(batch, length\) of integers, got \(5,\)"),
        ([PROMPT.float()], dict(), "of integers"),
        ([[1, 2]], dict(), "of integers, got list"),
        ([PROMPT[:, :0]], dict(), "at least one token"),
        ([PROMPT], dict(eos_token_id=30), "eos_token_id is 30, but the model only knows ids below 30"),
        ([PROMPT], dict(pad_token_id=30), "pad_token_id is 30"),
        ([PROMPT], dict(num_return_sequences=2), "num_return_sequences"),
        ([PROMPT], dict(num_beams=2, num_return_sequences=3), "num_return_sequences"),
        ([PROMPT], dict(stop_strings="x"), "tokenizer"),
        ([PROMPT], dict(do_sample=True, temperature=0.0), "strictly positive float"),
        ([PROMPT], dict(penalty_alpha=0.6), "not supported"),
        ([PROMPT], dict(prefill_chunk_size=0), "prefill_chunk_size"),
        ([PROMPT], dict(prefill_chunk_size=2, use_cache=False), "prefill_chunk_size needs use_cache"),
        ([], dict(bos_token_id=None), None),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, options, message):
    if message is None:
        model = LlamaForCausalLM(LlamaConfig(**FIELDS, bos_token_id=None))
        with pytest.raises(ValueError, match="nor a bos_token_id to begin with"):
            model.generate(max_new_tokens=2)
    else:
        with pytest.raises(ValueError, match=message):
            toys()[0].generate(*arguments, max_new_tokens=2, **options)


# Inputs.


def test_without_a_prompt_the_text_begins_with_bos():
    assert agree(toys(1), max_new_tokens=5)[0, 0] == 1
    assert agree(toys(1), max_new_tokens=5, bos_token_id=9, eos_token_id=-1).shape == (1, 6)
    assert agree(toys(1), max_new_tokens=5, do_sample=True, num_return_sequences=3, pad_token_id=0).shape[0] == 3


def test_the_prompt_may_come_by_name():
    agree(toys(1), inputs=PROMPT, max_new_tokens=4)
    agree(toys(1), input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=4)
    agree(toys(1), PROMPT, attention_mask=torch.ones(1, 5, dtype=torch.bool), max_new_tokens=4)
    assert torch.equal(toys(1)[0].generate(PROMPT.int(), max_new_tokens=4), agree(toys(1), PROMPT, max_new_tokens=4))


def test_padding_is_inferred_where_it_can_be_told_from_text():
    pair = toys(3)
    told = agree(pair, PADDED, attention_mask=MASK, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(agree(pair, PADDED, max_new_tokens=8, pad_token_id=0), told)
    assert not torch.equal(agree(pair, PADDED, max_new_tokens=8), told)  # no pad_token_id: text
    given = agree(pair, PADDED, attention_mask=MASK, max_new_tokens=8, pad_token_id=0, eos_token_id=0)
    with pytest.warns(UserWarning, match="pass attention_mask"):  # transformers silently reads the padding as text
        guessed = pair[0].generate(PADDED, max_new_tokens=8, pad_token_id=0, eos_token_id=0)
    assert not torch.equal(guessed, given)
    same(guessed, pair[1].generate(PADDED, max_new_tokens=8, pad_token_id=0, eos_token_id=0))


def test_a_pad_token_of_minus_one_is_none():
    """As in the first LLaMA's files: nothing is padding, not even token 0."""
    ids = torch.tensor([[5, 0, 3, 9, 3]])
    for seed in range(3):
        model = toys(seed, eos_token_id=None)[0]
        expected = model.generate(ids, max_new_tokens=8)
        assert torch.equal(model.generate(ids, max_new_tokens=8, pad_token_id=-1), expected)


def test_a_prompt_may_end_with_what_is_the_pad_token():
    ids = torch.tensor([[5, 3, 0]])
    out = toys(1)[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0)
    assert torch.equal(out, agree(toys(1), ids, max_new_tokens=4))
    with pytest.raises(ValueError, match="on the left"):  # transformers masks it and continues from the token before
        toys(1)[0].generate(ids, max_new_tokens=4, pad_token_id=0)


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True, num_return_sequences=2), dict(num_beams=2)])
def test_positions_may_be_given(options):
    positions = torch.tensor([[0, 3, 4, 7, 9]])
    options |= dict(max_new_tokens=6, pad_token_id=17, eos_token_id=-1)
    out = agree(toys(1), PROMPT, position_ids=positions, **options)
    model = toys(1)[0]
    if out.shape == (1, 11) and "num_beams" not in options:
        text, places = PROMPT, positions
        for _ in range(6):
            token = model(text, position_ids=places).logits[:, -1].argmax(-1, keepdim=True)
            text, places = torch.cat([text, token], 1), torch.cat([places, places[:, -1:] + 1], 1)
        assert torch.equal(out, text)
    agree(toys(1), PADDED, attention_mask=MASK, position_ids=torch.tensor([[1, 1, 0, 5, 6], [2, 3, 4, 5, 6]]),
          **options)  # fmt: skip


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True, num_return_sequences=2), dict(num_beams=2)])
def test_embeddings_alone_give_the_new_tokens(options):
    pair = toys(1)
    table = pair[0].get_input_embeddings().weight.detach()
    options |= dict(max_new_tokens=6, pad_token_id=17)
    torch.manual_seed(0)
    plain = pair[0].generate(PROMPTS, **options)
    new = agree(pair, inputs_embeds=table[PROMPTS], **options)
    assert torch.equal(new, plain[:, 5:])
    assert torch.equal(agree(pair, PROMPTS, inputs_embeds=table[PROMPTS], **options), plain)
    both = agree(pair, PROMPTS, inputs_embeds=table[PROMPTS] * 0.5, **options)
    assert torch.equal(both[:, :5], plain[:, :5])
    assert not torch.equal(both, plain)
    agree(pair, inputs_embeds=table[PADDED], attention_mask=MASK, **options)
    agree(pair, inputs_embeds=table[PROMPTS], use_cache=False, **options)


def test_lengths_of_embeddings_count_as_transformers_counts_them():
    pair = toys(1)
    embeds = pair[0].get_input_embeddings().weight.detach()[PROMPT]
    end = int(agree(pair, PROMPT, max_new_tokens=1)[0, -1])
    options = dict(inputs_embeds=embeds, pad_token_id=0)
    assert agree(pair, **options, max_length=9, eos_token_id=-1).shape == (1, 4)
    assert agree(pair, **options, eos_token_id=-1).shape == (1, 20)
    assert agree(pair, PROMPT, **options, max_length=9, eos_token_id=-1).shape == (1, 9)
    assert agree(pair, **options, max_new_tokens=6, min_new_tokens=3, eos_token_id=end).shape[1] > 3
    assert agree(pair, **options, max_new_tokens=6, min_length=8, eos_token_id=end).shape[1] > 3
    assert agree(pair, **options, max_new_tokens=6, min_length=5, eos_token_id=end).shape == (1, 1)
    assert agree(pair, **options, max_length=9, forced_eos_token_id=6, eos_token_id=-1)[0].tolist()[-1] == 6


def test_embeddings_go_on_from_a_cache_and_fit_a_static_one():
    model = toys(1)[0]
    options = dict(inputs_embeds=model.get_input_embeddings().weight.detach()[PROMPT] * 1.5, max_new_tokens=6)
    options |= dict(eos_token_id=-1)
    expected = model.generate(**options)
    cache = model(inputs_embeds=options["inputs_embeds"][:, :3], use_cache=True).past_key_values
    assert torch.equal(model.generate(past_key_values=cache, **options), expected)
    assert cache.get_seq_length() == 10
    assert torch.equal(model.generate(cache_implementation="static", **options), expected)


def test_embeddings_without_room_are_an_error():
    embeds = toys(1)[0].get_input_embeddings().weight.detach()[PROMPT]
    with pytest.raises(ValueError, match="Input length of input_ids is 5, but `max_length` is set to 5"):
        toys(1)[0].generate(inputs_embeds=embeds, max_length=5)


# Caches.


def tuple_of(cache):
    return tuple((keys.clone(), values.clone()) for keys, values in cache)


@pytest.mark.parametrize("kind", ["dynamic", "static", "tuple", "theirs"])
@pytest.mark.parametrize("options", [dict(), dict(do_sample=True), dict(num_beams=2), dict(use_cache=True)], ids=str)
def test_writing_goes_on_from_a_cache(kind, options):
    model = toys(1)[0]
    torch.manual_seed(0)
    expected = model.generate(PROMPT, max_new_tokens=7, eos_token_id=-1, **options)
    cache = {"static": StaticCache(model.config, 20), "theirs": TheirDynamicCache()}.get(kind, DynamicCache())
    model(PROMPT[:, :3], past_key_values=cache, use_cache=True)
    handed = tuple_of(cache) if kind == "tuple" else cache
    read = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    torch.manual_seed(0)
    out = model.generate(PROMPT, past_key_values=handed, max_new_tokens=7, eos_token_id=-1, **options)
    hook.remove()
    assert torch.equal(out, expected)
    assert read == [2, 1, 1, 1, 1, 1, 1]  # no token is read twice
    if kind != "tuple":
        assert cache.get_seq_length() == 11


def test_a_cache_goes_on_for_padded_rows_and_for_several_texts():
    model = toys(1)[0]
    for options in (dict(), dict(num_beams=2), dict(do_sample=True, num_return_sequences=2)):
        cache = DynamicCache()
        model(PADDED[:, :3], attention_mask=MASK[:, :3], past_key_values=cache)
        options |= dict(attention_mask=MASK, max_new_tokens=6, pad_token_id=0)
        torch.manual_seed(0)
        out = model.generate(PADDED, past_key_values=cache, **options)
        torch.manual_seed(0)
        assert torch.equal(out, model.generate(PADDED, **options))


@pytest.mark.parametrize("options", [dict(), dict(prompt_lookup_num_tokens=3), dict(cache_implementation="static")])
def test_a_chat_keeps_its_cache_from_turn_to_turn(options):
    model = toys(4)[0]
    text, cache, read = PROMPT, None, []
    for turn in range(4):
        hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
        kept = None if "cache_implementation" in options else cache
        out = model.generate(text, past_key_values=kept, max_new_tokens=6, return_dict_in_generate=True, **options)
        hook.remove()
        assert torch.equal(out.sequences, model.generate(text, max_new_tokens=6))
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        text = torch.cat([out.sequences, torch.tensor([[turn, 5, 8]])], 1)
    if not options:
        assert sum(read) == text.shape[1] - 4  # each once, but not the last answer's last token and the user's three


def test_a_cache_that_holds_the_whole_prompt_is_an_error():
    model = toys(1)[0]
    for length in (5, 4):
        cache = model(PROMPT, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="those and at least one more"):
            model.generate(PROMPT[:, :length], past_key_values=cache, max_new_tokens=2)


def test_a_static_cache_that_is_too_small_is_an_error():
    model = toys(1)[0]
    with pytest.raises(ValueError, match="room for 8 tokens"):
        model.generate(PROMPT, past_key_values=StaticCache(model.config, 8), max_new_tokens=9, eos_token_id=-1)
    assert model.generate(PROMPT, past_key_values=StaticCache(model.config, 8), max_new_tokens=4).shape[1] <= 9


def test_a_cache_of_inference_mode_goes_on_outside():
    model = toys(1)[0]
    with torch.inference_mode():
        cache = DynamicCache()
        first = model.generate(PROMPT, past_key_values=cache, max_new_tokens=3, eos_token_id=-1)
    out = model.generate(first.clone(), past_key_values=cache, max_new_tokens=5, eos_token_id=-1)
    assert torch.equal(out, model.generate(PROMPT, max_new_tokens=8, eos_token_id=-1))


# Modes, cost.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("options", [dict(), dict(num_beams=2), dict(prompt_lookup_num_tokens=2)])
def test_no_mode_changes_the_text(mode, options):
    model, _ = twins(FIELDS, 1)
    expected = model.generate(PROMPT, max_new_tokens=8, **options)
    with mode():
        out = model.generate(PROMPT, max_new_tokens=8, return_dict_in_generate=True, output_logits=True, **options)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(out.sequences, expected)
    assert not out.logits[0].requires_grad
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, **options), expected)
    assert model.training


def test_dropout_acts_in_training_alone():
    model, _ = twins(FIELDS | {"attention_dropout": 0.9}, 1)
    write = lambda: model.generate(PROMPT, max_new_tokens=12, eos_token_id=-1).tolist()  # noqa: E731
    assert write() == write()
    model.train()
    assert len({str(write()) for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        (dict(), 15),
        (dict(do_sample=True), 15),
        (dict(num_beams=3), 15),
        (dict(num_return_sequences=2, do_sample=True), 15),
    ],
)
def test_every_token_costs_one_call_of_one_token(options, calls):
    model, _ = twins(FIELDS, 1)
    read, scored = [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    model.lm_head.register_forward_hook(lambda _, args, out: scored.append(out.shape[1]))
    model.generate(PROMPT, max_new_tokens=15, eos_token_id=-1, **options)
    assert read == [5] + [1] * (calls - 1)
    assert not scored or set(scored) == {1}


def test_an_end_token_costs_no_further_call():
    model, _ = twins(FIELDS, 4)
    end = int(model.generate(PROMPT, max_new_tokens=3, eos_token_id=-1)[0, 7])
    read = []
    model.model.register_forward_pre_hook(lambda *_: read.append(1))
    out = model.generate(PROMPT, max_new_tokens=50, eos_token_id=end)
    assert len(read) == out.shape[1] - 5 <= 3


def bytes_alive():
    """Return the bytes held by all tensors created since `gc.freeze`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects() if isinstance(t, torch.Tensor)}  # fmt: skip
    return sum(storages.values())


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True), dict(cache_implementation="static")])
def test_a_long_text_takes_its_cache_and_nothing_more_per_token(options):
    model, _ = twins(FIELDS, 1)
    alive = []

    class Scale(BaseStreamer):
        def put(self, value):
            alive.append(bytes_alive())

        def end(self):
            pass

    token = 2 * 2 * (2 * 4) * 4  # bytes: keys and values, layers, heads × head_dim, float32
    assert model.config.head_dim == 4
    gc.collect()
    gc.freeze()
    try:
        before = bytes_alive()
        model.generate(PROMPT, max_new_tokens=200, eos_token_id=-1, streamer=Scale(), **options)
        gc.disable()
        after = bytes_alive()
    finally:
        gc.enable()
        gc.unfreeze()
    assert len(alive) == 201
    ids = 205 * 8
    slack = 4096  # one step's logits, probabilities and tokens
    for written, held in enumerate(alive):
        assert held - before <= 2 * (5 + max(written, 200 * ("cache_implementation" in options))) * token + ids + slack
    assert after <= before + slack  # everything is freed with the call, without the garbage collector


# Text.


def byte_tokenizer():
    """One token per byte and a special one: every non-ASCII character is split."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return LlamaTokenizerFast(tokenizer, {"eos_token": "<|end|>"})


def piece_tokenizer():
    """Like SentencePiece's: pieces with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "st", "op", "▁stop", "opera", "字"]
    scores = [0.0] * 259 + [-float(n) for n in range(1, len(pieces) - 258)]
    return LlamaTokenizerFast(sentencepiece_bpe(pieces, scores, add_space_prefix=True), {"eos_token": "</s>"})


TOKENIZERS = {"bytes": byte_tokenizer(), "pieces": piece_tokenizer()}


@functools.cache
def speaker(name):
    return toys(0, vocab_size=len(TOKENIZERS[name]) + 5)[0]  # plus ids without a token, as in padded vocabularies


def saying(script, prompt=PROMPT):
    """Return options that make a model write `script`."""
    return dict(prefix_allowed_tokens_fn=lambda _, ids: [script[min(len(ids) - prompt.shape[1], len(script) - 1)]],
                max_new_tokens=len(script))  # fmt: skip


def streamed(model, *args, **options):
    """Return all pieces, within ten seconds."""

    def give_up(*_):
        raise TimeoutError("the stream does not end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        return list(model.stream(*args, **options))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


TEXTS = st.text(st.sampled_from("ab cé字🦙👩\u200d🚀\n") | st.characters(codec="utf-8"), min_size=1, max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
@settings(max_examples=20)
def test_a_stream_is_the_text_in_whole_characters(name, text):
    tokenizer, model = TOKENIZERS[name], speaker(name)
    script = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(model, PROMPT, tokenizer=tokenizer, eos_token_id=-1, **saying(script))
    assert "".join(pieces) == tokenizer.decode(script)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "" not in pieces


def test_a_stream_gives_a_piece_as_soon_as_it_is_certain():
    tokenizer, model = TOKENIZERS["bytes"], speaker("bytes")
    script = tokenizer.encode("né🦙!")
    assert streamed(model, PROMPT, tokenizer=tokenizer, **saying(script)) == ["n", "é", "🦙", "!"]
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    stream = model.stream(PROMPT, tokenizer=tokenizer, **saying(script))
    assert not calls
    assert [(next(stream), len(calls)) for _ in range(3)] == [("n", 1), ("é", 3), ("🦙", 7)]
    hook.remove()


def test_a_stream_of_half_a_character_ends_with_the_sign_for_it():
    tokenizer = TOKENIZERS["bytes"]
    pieces = streamed(speaker("bytes"), PROMPT, tokenizer=tokenizer, **saying(tokenizer.encode("a🦙")[:3]))
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]


STOPS = st.lists(
    st.sampled_from(["stop", "st", "op", "é", "字", "a b", "ab", "bc"]), min_size=1, max_size=3, unique=True
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text("abcstop é字", min_size=1, max_size=15), stops=STOPS)
@settings(max_examples=25)
def test_a_stream_ends_before_its_stop_string(name, text, stops):
    tokenizer, model = TOKENIZERS[name], speaker(name)
    script = tokenizer.encode(text, add_special_tokens=False)
    prompt = torch.tensor([tokenizer.encode("字", add_special_tokens=False)])
    options = saying(script, prompt) | dict(stop_strings=stops, eos_token_id=-1)
    pieces = streamed(model, prompt, tokenizer=tokenizer, **options)
    whole = tokenizer.decode(script)
    first = min((place for stop in stops if (place := whole.find(stop)) >= 0), default=len(whole))
    assert "".join(pieces) == whole[:first]
    assert "" not in pieces
    out = model.generate(prompt, tokenizer=tokenizer, **options)  # keeps the token that completes the string
    written = tokenizer.decode(out[0, prompt.shape[1] :])
    assert any(stop in written for stop in stops) == any(stop in whole for stop in stops)
    assert out.shape[1] - prompt.shape[1] <= len(script)
    assert not any(stop in tokenizer.decode(out[0, prompt.shape[1] : -1]) for stop in stops)


def test_a_stop_string_may_lie_across_tokens_and_within_one():
    tokenizer, model = TOKENIZERS["pieces"], speaker("pieces")
    vocab = tokenizer._tokenizer.get_vocab()

    def say(*pieces):
        options = saying([vocab[piece] for piece in pieces])
        return options | dict(stop_strings=["stop"], tokenizer=tokenizer, eos_token_id=-1)

    assert "".join(streamed(model, PROMPT, **say("a", "st", "opera", "b"))) == "a"
    assert model.generate(PROMPT, **say("a", "st", "opera", "b")).shape == (1, 8)
    assert "".join(streamed(model, PROMPT, **say("a", "▁stop", "b"))) == "a "
    assert "".join(streamed(model, PROMPT, **say("a", "st", "a", "st"))) == "astast"  # held back, then emitted
    assert streamed(model, PROMPT, **say("a", "b", "st", "b", "op", "c")) == ["a", "b", "stb", "op", "c"]


def test_smollm2_stops_at_a_string_across_its_tokens(smollm2):
    tokenizer = LlamaTokenizerFast.from_pretrained("smollm2")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(smollm2)
    pair = toys(0, vocab_size=len(tokenizer))
    script = tokenizer.encode("It is a lovely day, isn't it? Yes 🦙")
    for stops in (["lovely day"], ["vely", "day"], ["n't it?"], ["nothing"]):
        options = saying(script) | dict(stop_strings=stops, eos_token_id=-1, pad_token_id=0)
        agree(pair, PROMPT, tokenizer=tokenizer, theirs={"tokenizer": theirs}, **options)
        text = "".join(streamed(pair[0], PROMPT, tokenizer=tokenizer, **options))
        assert text == "It is a lovely day, isn't it? Yes 🦙".partition(stops[0])[0]


def test_a_stream_leaves_out_special_tokens_unless_told():
    tokenizer = TOKENIZERS["bytes"]
    end = tokenizer.eos_token_id
    script = [*tokenizer.encode("a"), end, 258, *tokenizer.encode("b")]
    options = dict(tokenizer=tokenizer, eos_token_id=-1, **saying(script))
    assert streamed(speaker("bytes"), PROMPT, **options) == ["a", "b"]
    assert streamed(speaker("bytes"), PROMPT, skip_special_tokens=False, **options) == ["a", "<|end|>", "b"]
    options["eos_token_id"] = end
    assert streamed(speaker("bytes"), PROMPT, **options) == ["a"]


def test_a_stream_draws_what_generate_draws():
    tokenizer, model = TOKENIZERS["bytes"], speaker("bytes")
    for options in (dict(do_sample=True), dict(prompt_lookup_num_tokens=3), dict(assistant_model=model)):
        options |= dict(max_new_tokens=15, eos_token_id=-1, suppress_tokens=list(range(257, 262)))
        torch.manual_seed(3)
        pieces = streamed(model, PROMPT, tokenizer=tokenizer, **options)
        torch.manual_seed(3)
        assert "".join(pieces) == tokenizer.decode(model.generate(PROMPT, **options)[0, 5:])


@pytest.mark.parametrize(
    "options", [dict(num_beams=2), dict(do_sample=True, num_return_sequences=2), dict(prompt=PROMPTS)]
)
def test_a_stream_is_of_one_text(options):
    prompt = options.pop("prompt", PROMPT)
    with pytest.raises(ValueError, match="stream generates one text"):
        next(toys()[0].stream(prompt, tokenizer=TOKENIZERS["bytes"], max_new_tokens=2, **options))


def test_a_stream_that_is_not_read_to_its_end_does_no_harm():
    tokenizer, model = TOKENIZERS["bytes"], speaker("bytes")
    stream = model.stream(PROMPT, tokenizer=tokenizer, **saying(tokenizer.encode("abc")))
    assert next(stream) == "a"
    assert torch.is_grad_enabled()
    stream.close()
    assert model(PROMPT).logits.requires_grad


# Streamers.


def theirs_of(tokenizer):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("options", [dict(), dict(skip_prompt=True), dict(skip_prompt=True, skip_special_tokens=True)])
def test_a_text_streamer_prints_what_transformers_prints(name, options, capsys):
    tokenizer, model = TOKENIZERS[name], speaker(name)
    prompt = torch.tensor([tokenizer.encode("ab é字")])
    script = [*tokenizer.encode(" a🦙\nstop 字b", add_special_tokens=False), tokenizer.eos_token_id]
    saying_it = saying(script, prompt) | dict(eos_token_id=tokenizer.eos_token_id)
    mine = TextStreamer(tokenizer, **options)
    printed = []
    for _ in range(2):  # one object can be reused
        model.generate(prompt, streamer=mine, **saying_it)
        printed.append(capsys.readouterr().out)
    model.generate(prompt, streamer=transformers.TextStreamer(theirs_of(tokenizer), **options), **saying_it)
    expected = capsys.readouterr().out
    assert printed == [expected] * 2
    assert expected.endswith("\n")
    assert ("é" in expected) == ("skip_prompt" not in options)


def test_a_text_streamer_gives_whole_characters_at_once():
    tokenizer, model = TOKENIZERS["bytes"], speaker("bytes")

    class Pieces(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            heard.append((text, stream_end))

    heard = []
    model.generate(PROMPT, streamer=Pieces(tokenizer, skip_prompt=True), **saying(tokenizer.encode("né🦙")[:-1]))
    whole = [("n", False), ("", False), ("é", False), ("", False), ("", False), ("", False)]
    assert heard == [*whole, ("\N{REPLACEMENT CHARACTER}", True)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_iterator_hands_the_text_to_another_thread(name):
    tokenizer, model = TOKENIZERS[name], speaker(name)
    script = tokenizer.encode("a🦙 字b", add_special_tokens=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    for _ in range(2):
        thread = threading.Thread(
            target=model.generate, args=[PROMPT], kwargs=dict(streamer=streamer, **saying(script))
        )
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert "".join(pieces) == tokenizer.decode(script)
        assert "" not in pieces
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_iterator_waits_no_longer_than_told():
    import queue

    streamer, begun = TextIteratorStreamer(TOKENIZERS["bytes"], timeout=0.01), time.perf_counter()
    with pytest.raises(queue.Empty):
        next(streamer)
    assert time.perf_counter() - begun < 10


def test_text_streamers_take_one_text_and_known_options():
    tokenizer, model = TOKENIZERS["bytes"], speaker("bytes")
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(PROMPTS, streamer=TextStreamer(tokenizer), max_new_tokens=2)
    with pytest.raises(ValueError, match="`skip_special_token` is not supported"):
        TextStreamer(tokenizer, skip_special_token=True)
    with pytest.raises(ValueError, match="clean_up_tokenization_spaces"):
        TextStreamer(tokenizer, clean_up_tokenization_spaces=True)
    assert TextStreamer(tokenizer, True, clean_up_tokenization_spaces=False).skip_prompt
    for call in (lambda: BaseStreamer().put(PROMPT), BaseStreamer().end):
        with pytest.raises(NotImplementedError, match="BaseStreamer has to define"):
            call()


def test_steps_give_the_tokens_of_generate_as_they_come():
    model = toys(4)[0]
    for ids, options in (
        (PROMPTS, dict()),
        (PROMPTS, dict(do_sample=True)),
        (PROMPT, dict(prompt_lookup_num_tokens=2)),
    ):
        torch.manual_seed(1)
        steps = list(model.steps(ids, max_new_tokens=7, pad_token_id=0, **options))
        torch.manual_seed(1)
        assert torch.equal(
            torch.stack(steps, 1), model.generate(ids, max_new_tokens=7, pad_token_id=0, **options)[:, 5:]
        )
    with pytest.raises(ValueError, match="num_beams=1"):
        next(model.steps(PROMPT, num_beams=2))


# Compatibility with transformers' interface.


def with_own_inputs(cls):
    """Return a subclass that reads every token at position 0 and can negate its logits."""

    class Own(cls):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, turns=None, **kwargs):
            out = super().forward(input_ids, attention_mask, position_ids, **kwargs)
            if turns is not None:
                out.logits = out.logits * turns[:, None, None]
            return out

        def prepare_inputs_for_generation(
            self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
        ):
            made = super().prepare_inputs_for_generation(
                input_ids, past_key_values=past_key_values, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                **kwargs,
            )  # fmt: skip
            new = made["inputs_embeds"] if made.get("input_ids") is None else made["input_ids"]
            assert made["position_ids"].shape == new.shape[:2]
            made["position_ids"] = torch.zeros(new.shape[:2], dtype=torch.long)
            return made

    return Own


@pytest.mark.parametrize(
    "options",
    [dict(), dict(num_beams=3), dict(use_cache=False), dict(attention_mask=MASK), dict(inputs_embeds=True),
     dict(turns=torch.tensor([-1.0, 1])), dict(turns=torch.tensor([-1.0, 1]), num_beams=2),
     dict(prompt_lookup_num_tokens=2), dict(do_sample=True), dict(return_dict_in_generate=True, output_logits=True)],
)  # fmt: skip
def test_a_subclass_may_prepare_the_inputs_of_every_step(options):
    plain = toys(3)
    pair = []
    for model in plain:
        own = with_own_inputs(type(model))(model.config).eval()
        own.load_state_dict(model.state_dict())
        pair.append(own)
    prompts = PADDED if "attention_mask" in options else PROMPT if "prompt_lookup_num_tokens" in options else PROMPTS
    options = dict(max_new_tokens=6, eos_token_id=-1, pad_token_id=0) | options
    if "inputs_embeds" in options:
        options["inputs_embeds"] = plain[0].get_input_embeddings()(prompts).detach()
    else:
        options["input_ids"] = prompts
    agree(pair, **options)


def test_a_subclass_that_prepares_inputs_reads_prompts_in_chunks_too_and_is_not_recorded():
    model = with_own_inputs(LlamaForCausalLM)(LlamaConfig(**FIELDS)).eval()
    options = dict(max_new_tokens=4, eos_token_id=-1)
    same(model.generate(PROMPTS, prefill_chunk_size=2, **options), model.generate(PROMPTS, **options))
    embeds = model.get_input_embeddings()(PROMPTS).detach()
    same(model.generate(inputs_embeds=embeds, prefill_chunk_size=2, **options),
         model.generate(inputs_embeds=embeds, **options))  # fmt: skip
    with pytest.raises(ValueError, match="plain LlamaForCausalLM"):
        model.generate(PROMPTS, decoding="static", **options)
    with pytest.raises(ValueError, match="turn"):
        model.generate(PROMPTS, turn=torch.ones(2), **options)


def test_labels_of_a_batch_are_passed_over():
    agree(toys(1), PROMPTS, labels=PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=3)


@pytest.mark.parametrize(
    "said", [dict(max_new_tokens=3), dict(max_new_tokens=5, num_beams=2, num_return_sequences=2),
             dict(do_sample=True, temperature=0.7, top_k=5, max_length=9)],
)  # fmt: skip
def test_transformers_generation_config_serves(said):
    agree(toys(1), PROMPTS, generation_config=transformers.GenerationConfig(**said))


def test_something_else_than_a_generation_config_is_named():
    with pytest.raises(ValueError, match="generation_config must be a GenerationConfig, got dict"):
        toys(1)[0].generate(PROMPT, generation_config={"max_new_tokens": 3})
