"""Drafting writes the model's own text: transformers' for the same seed, and exactly that of greedy search."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, configs
from test_generate import EVERYTHING, FIELDS, Log, agree, ends, same, saying, toys, twins

from llama import LlamaConfig, LlamaForCausalLM, StaticCache
from llama.generation import speculative

PROMPT = torch.tensor([[1, 7, 3, 9, 3, 7, 3]])


def nearly(model, noise, seed=0):
    """Return a copy that agrees with `model` most of the time, but not always."""
    torch.manual_seed(seed)
    other = type(model)(model.config).eval()
    weights = model.state_dict()
    other.load_state_dict({name: w + noise * w.std(correction=0) * torch.randn_like(w) for name, w in weights.items()})
    return other


@functools.cache
def assistants(noise=0.2, seed=0, **more):
    """Return assistants (ours, transformers') of the models of `toys(1)`, with `more` options."""
    pair = tuple(nearly(model, noise, seed) for model in toys(1))
    pair[0].load_state_dict(pair[1].state_dict())
    for model in pair:
        for name, value in more.items():
            setattr(model.generation_config, name, value)
    return pair


def agree_drafting(pair, helpers, *args, **options):
    return agree(pair, *args, assistant_model=helpers[0], theirs={"assistant_model": helpers[1]}, **options)


RULES = {
    "repetition_penalty": st.sampled_from([0.8, 1.3]),
    "no_repeat_ngram_size": st.sampled_from([2, 3]),
    "bad_words_ids": st.just([[4], [7, 3]]),
    "min_new_tokens": st.integers(0, 8),
    "forced_eos_token_id": st.just(5),
    "suppress_tokens": st.just([3, 8]),
    "begin_suppress_tokens": st.just([9, 11]),
}


@st.composite
def texts(draw, vocab_size=30):
    """Draw texts of few distinct tokens, so that phrases recur."""
    rng = np.random.default_rng(draw(SEEDS))
    return torch.tensor(
        rng.integers(0, min(vocab_size, draw(st.sampled_from([2, 4, 30]))), (1, draw(st.integers(1, 12))))
    )


@given(ids=texts(), eos=ends(30), new=st.integers(1, 20), guesses=st.integers(1, 6), ngram=st.integers(1, 4),
       seed=SEEDS, options=st.fixed_dictionaries({}, optional=RULES))  # fmt: skip
@settings(max_examples=50)
def test_prompt_lookup_writes_what_greedy_search_writes(ids, eos, new, guesses, ngram, seed, options):
    pair = toys(seed % 5)
    options |= dict(eos_token_id=eos, max_new_tokens=new, pad_token_id=17, attention_mask=torch.ones_like(ids))
    plain = pair[0].generate(ids, **options)
    lookup = dict(prompt_lookup_num_tokens=guesses, max_matching_ngram_size=ngram)
    assert torch.equal(agree(pair, ids, **options, **lookup), plain)


@given(ids=texts(), eos=ends(30), new=st.integers(1, 20), guesses=st.integers(1, 6), seed=SEEDS,
       schedule=st.sampled_from(["constant", "heuristic", "heuristic_transient"]),
       options=st.fixed_dictionaries({}, optional=RULES), threshold=st.sampled_from([0.0, 0.4, 0.9]),
       noise=st.sampled_from([0.0, 0.2, 2.0]))  # fmt: skip
@settings(max_examples=50)
def test_an_assistant_changes_no_token_of_greedy_search(
    ids, eos, new, guesses, seed, schedule, options, threshold, noise
):
    pair = toys(1)
    helpers = tuple(assistants(noise, seed % 3))
    for helper in helpers:
        helper.generation_config.num_assistant_tokens = guesses
        helper.generation_config.num_assistant_tokens_schedule = schedule
        helper.generation_config.assistant_confidence_threshold = threshold
    options |= dict(eos_token_id=eos, max_new_tokens=new, pad_token_id=17, attention_mask=torch.ones_like(ids))
    plain = pair[0].generate(ids, **options)
    assert torch.equal(pair[0].generate(ids, assistant_model=helpers[0], **options), plain)
    if "min_new_tokens" not in options:
        agree_drafting(pair, helpers, ids, **options)


@given(fields=configs(["default", "linear", "yarn", "llama3"]), seed=SEEDS, new=st.integers(1, 12), data=st.data())
@settings(max_examples=15)
def test_drafting_of_drawn_models_changes_no_token(fields, seed, new, data):
    """Except RoPE types whose angles follow the length: a draft is read at its own length, as in transformers."""
    ids = data.draw(texts(fields["vocab_size"]))
    model, _ = twins(fields, seed, eos_token_id=3, bos_token_id=None)
    plain = model.generate(ids, max_new_tokens=new)
    assert torch.equal(model.generate(ids, max_new_tokens=new, prompt_lookup_num_tokens=4), plain)
    helper = nearly(model, 0.1, seed % 1000)
    assert torch.equal(model.generate(ids, max_new_tokens=new, assistant_model=helper), plain)


@pytest.mark.parametrize("options", [dict(top_k=0), dict(top_k=6), dict(top_k=0, eos_token_id=[2, 4])], ids=str)
def test_an_assistants_first_draft_draws_what_transformers_draws(options):
    """Only the first: after it, transformers' assistant has lost its position in the text, so its drafts differ (their
    probabilities are not those that it assigns when it reads the whole text)."""
    options = dict(do_sample=True, max_new_tokens=2, eos_token_id=-1, pad_token_id=17) | options
    helpers = assistants(0.2, num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    for seed in range(25):
        agree_drafting(toys(1), helpers, PROMPT, seed=seed, **options)


def test_a_draft_has_the_assistants_own_probabilities(monkeypatch):
    model, helper = toys(1)[0], assistants(0.2, num_assistant_tokens=3, assistant_confidence_threshold=0.0)[0]
    rounds, check = [], speculative._check

    def watched(run, guesses, scores, odds):
        text = torch.cat((run.text, guesses[None]), 1)
        rounds.append(len(guesses))
        same(scores.softmax(-1), model(text).logits[0, run.length - 1 :].softmax(-1))
        if len(guesses):
            same(odds, helper(text).logits[0, run.length - 1 : -1].softmax(-1))
        return check(run, guesses, scores, odds)

    monkeypatch.setattr(speculative, "_check", watched)
    for seed in range(8):
        torch.manual_seed(seed)
        model.generate(PROMPT, assistant_model=helper, do_sample=True, top_k=0, max_new_tokens=14, eos_token_id=[2, 4])
    assert len(rounds) > 20
    assert set(rounds) >= {1, 2, 3}


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_k=5), dict(max_matching_ngram_size=1)], ids=str)
def test_looking_up_draws_what_transformers_draws(options):
    """Except for the last three tokens: transformers drafts past the end, and draws for the tokens it drops."""
    options |= dict(do_sample=True, max_new_tokens=20, eos_token_id=-1, prompt_lookup_num_tokens=3)
    for seed in range(8):
        out = []
        for model in toys(seed):
            torch.manual_seed(seed)
            out.append(model.generate(PROMPT, **options))
        assert torch.equal(out[0][:, :-3], out[1][:, :-3])
        assert out[0].shape == out[1].shape


def test_drafts_follow_the_distribution_of_the_model():
    """Also with filters, where transformers' assistant applies the temperature twice."""
    model, helper = toys(1)[0], assistants(0.5, num_assistant_tokens=2, assistant_confidence_threshold=0.0)[0]
    options = dict(do_sample=True, temperature=1.6, top_k=4, max_new_tokens=2, eos_token_id=-1)
    first = model(PROMPT).logits[0, -1]
    kept = torch.topk(first, 4)
    expected = torch.zeros(30, 30)
    for token, chance in zip(kept.indices, (kept.values / 1.6).softmax(-1), strict=True):
        second = torch.topk(model(torch.cat([PROMPT, token.view(1, 1)], 1)).logits[0, -1], 4)
        expected[token, second.indices] = chance * (second.values / 1.6).softmax(-1)
    counts, draws = torch.zeros(30, 30), 800
    torch.manual_seed(0)
    for _ in range(draws):
        a, b = model.generate(PROMPT, assistant_model=helper, **options)[0, -2:]
        counts[a, b] += 1
    # Five standard deviations of a frequency: 5 · sqrt(p (1 - p) / draws) <= 5 · sqrt(0.25 / 800) = 0.088.
    bar = 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9
    assert ((counts / draws - expected).abs() <= bar).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_records_of_drafting_are_those_of_single_steps(sampled):
    """And those of transformers, except hidden states and attentions, which its first pass takes from the prompt."""
    pair, helpers = toys(1), assistants(0.2, num_assistant_tokens=4, assistant_confidence_threshold=0.0)
    options = dict(max_new_tokens=10, eos_token_id=-1, pad_token_id=17, do_sample=sampled, top_k=0)
    scores = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    if not sampled:
        agree_drafting(pair, helpers, PROMPT, **options, **scores)
    options |= EVERYTHING
    for drafting in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=helpers[0])):
        out = pair[0].generate(PROMPT, **options, **drafting)
        steps = out.sequences.shape[1] - 7
        assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == steps > 3
        for step in range(steps):
            read = 7 if step == 0 else 1
            assert [a.shape for a in out.attentions[step]] == [(1, 4, read, 7 + step)] * 2
            assert [h.shape for h in out.hidden_states[step]] == [(1, read, 16)] * 3
        again = saying(out.sequences[0, 7:].tolist(), PROMPT) | dict(max_new_tokens=10)
        single = pair[0].generate(PROMPT, **(options | again | dict(do_sample=False)))  # the same text, step by step
        assert torch.equal(single.sequences, out.sequences)
        same(out.logits, single.logits)
        same(out.scores, single.logits)
        same(out.attentions, single.attentions)
        same(out.hidden_states, single.hidden_states)
        scores = pair[0].compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        same(scores, pair[1].compute_transition_scores(out.sequences, out.scores, normalize_logits=True))
        assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


def test_an_end_token_within_a_draft_ends_the_text():
    model = toys(1)[0]
    helper = assistants(0.0, num_assistant_tokens=6, assistant_confidence_threshold=0.0)[0]
    for eos in (25, [24, 25]):
        options = saying([7, 8, 25, 9, 9, 9], PROMPT) | dict(eos_token_id=eos, max_new_tokens=12)
        for drafting in (dict(assistant_model=helper), dict(prompt_lookup_num_tokens=5)):
            out = model.generate(PROMPT, **options, **drafting, return_dict_in_generate=True)
            assert out.sequences[0, 7:].tolist() == [7, 8, 25]
            assert out.past_key_values.get_seq_length() == 9
    text = torch.tensor([[5, 6, 25, 7, 5, 6, 25, 7, 5]])  # an end token within what is looked up
    agree(toys(1), text, eos_token_id=25, pad_token_id=17, prompt_lookup_num_tokens=5, max_new_tokens=10)


def test_criteria_are_asked_at_every_token():
    pair = toys(1)
    helper = assistants(0.0, num_assistant_tokens=6, assistant_confidence_threshold=0.0)[0]
    lengths = []

    def enough(ids, scores, **_):
        lengths.append((ids.shape[1], scores and len(scores)))
        return ids.shape[1] == 10

    out = pair[0].generate(PROMPT, assistant_model=helper, stopping_criteria=[enough], eos_token_id=None,
                           max_new_tokens=20, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    assert lengths == [(8, 1), (9, 2), (10, 3)]
    assert torch.equal(out.sequences, pair[0].generate(PROMPT, max_new_tokens=3, eos_token_id=None))
    assert len(out.scores) == 3


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6])
def test_drafts_do_not_pass_the_last_place(new):
    model = toys(1)[0]
    helper = assistants(0.0, num_assistant_tokens=4, assistant_confidence_threshold=0.0)[0]
    read = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    room = StaticCache(model.config, 7 + new - 1)  # the last token is never read
    out = model.generate(PROMPT, assistant_model=helper, max_new_tokens=new, eos_token_id=-1, past_key_values=room)
    hook.remove()
    assert out.shape[1] == 7 + new
    first = min(4, new - 1)
    assert read == [7 + first] + ([1 + new - first - 2] if new > first + 1 else [])


def test_a_good_draft_saves_calls_and_schedules_learn_from_it():
    model, _ = twins(FIELDS, 1)
    calls = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    for schedule, expected in (("constant", [9, 3, 3, 3, 3, 3, 3]), ("heuristic", [9, 5, 7, 6])):
        helper, _ = twins(FIELDS, 1)
        helper.generation_config.num_assistant_tokens = 2
        helper.generation_config.num_assistant_tokens_schedule = schedule
        helper.generation_config.assistant_confidence_threshold = 0.0
        calls.clear()
        model.generate(PROMPT, assistant_model=helper, max_new_tokens=21, eos_token_id=-1)
        assert calls == expected
        assert helper.generation_config.num_assistant_tokens == 2  # transformers' "heuristic" persists its changes
    wrong = LlamaForCausalLM(LlamaConfig(**FIELDS)).eval()
    wrong.generation_config.num_assistant_tokens = 4
    wrong.generation_config.num_assistant_tokens_schedule = "heuristic"
    wrong.generation_config.assistant_confidence_threshold = 0.0
    calls.clear()
    wrong.lm_head.weight.data.copy_(-model.lm_head.weight)
    wrong.model.load_state_dict(model.model.state_dict())  # its favourite is what the model likes least
    model.generate(PROMPT, assistant_model=wrong, max_new_tokens=8, eos_token_id=-1)
    assert calls == [11, 4, 3, 2, 2, 2, 2, 1]


def test_the_assistant_reads_every_token_once():
    model, _ = twins(FIELDS, 1)
    helper, _ = twins(FIELDS, 1)
    helper.generation_config.num_assistant_tokens = 3
    helper.generation_config.assistant_confidence_threshold = 0.0
    read = []
    helper.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    model.generate(PROMPT, assistant_model=helper, max_new_tokens=12, eos_token_id=-1)
    assert read == [7, 1, 1, 2, 1, 1, 2, 1, 1]


def test_an_assistant_drafts_nothing_behind_an_end_token():
    model, (helper, _) = toys(1)[0], twins(FIELDS, 1)
    helper.generation_config.num_assistant_tokens = 6
    helper.generation_config.assistant_confidence_threshold = 0.0
    read = []
    helper.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    out = model.generate(PROMPT, assistant_model=helper, eos_token_id=25, **saying([7, 8, 25, 9, 9, 9, 9, 9], PROMPT))
    assert out[0, 7:].tolist() == [7, 8, 25]
    assert read == [7, 1, 1]


def test_an_assistant_sees_no_padding():
    """Its drafts after padding are as good as without."""
    model = toys(1)[0]
    helper = assistants(0.0, num_assistant_tokens=3, assistant_confidence_threshold=0.0)[0]
    read = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    padded = torch.cat([torch.tensor([[21, 22, 23, 24]]), PROMPT], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    model.generate(padded, attention_mask=mask, assistant_model=helper, max_new_tokens=12, eos_token_id=-1)
    hook.remove()
    assert read == [14, 4, 4]


def test_an_unsure_assistant_stops_early():
    model, helper = toys(1)[0], assistants(0.0, num_assistant_tokens=5, assistant_confidence_threshold=1.0)[0]
    read = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    model.generate(PROMPT, assistant_model=helper, max_new_tokens=6, eos_token_id=-1)
    hook.remove()
    assert read == [8, 2, 2]


@pytest.mark.parametrize("drafting", ["lookup", "assistant"])
def test_drafting_goes_on_from_a_cache_behind_padding_and_after_given_positions(drafting):
    model = toys(1)[0]
    drafting = dict(assistant_model=assistants(0.1)[0]) if drafting == "assistant" else dict(prompt_lookup_num_tokens=3)
    options = dict(max_new_tokens=9, eos_token_id=-1, pad_token_id=17)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    out = model.generate(PROMPT, attention_mask=mask, **options, **drafting)
    assert torch.equal(out, model.generate(PROMPT, attention_mask=mask, **options))
    assert torch.equal(out[:, 2:], model.generate(PROMPT[:, 2:], **options))
    positions = torch.tensor([[0, 2, 3, 5, 8, 9, 12]])
    out = model.generate(PROMPT, position_ids=positions, **options, **drafting)
    assert torch.equal(out, model.generate(PROMPT, position_ids=positions, **options))
    cache = model(PROMPT[:, :4], use_cache=True).past_key_values
    out = model.generate(PROMPT, past_key_values=cache, **options, **drafting)
    assert torch.equal(out, model.generate(PROMPT, **options))
    assert cache.get_seq_length() == 15


def test_guidance_under_drafting_is_refused_or_right():
    """Its processor caches what it is called with; rejected tokens must not stay in its cache."""
    model = toys(1)[0]
    options = dict(guidance_scale=2.0, max_new_tokens=14, eos_token_id=-1)
    plain = model.generate(PROMPT, **options)
    for drafting in (dict(prompt_lookup_num_tokens=4), dict(assistant_model=assistants(0.3)[0])):
        try:
            out = model.generate(PROMPT, **options, **drafting)
        except ValueError as error:
            assert "guidance_scale" in str(error)  # noqa: PT017
        else:
            assert torch.equal(out, plain)


@pytest.mark.parametrize("drafting", ["lookup", "assistant"])
def test_a_streamer_hears_every_token_of_a_draft(drafting):
    model, log = toys(1)[0], Log()
    drafting = dict(assistant_model=assistants(0.1)[0]) if drafting == "assistant" else dict(prompt_lookup_num_tokens=3)
    out = model.generate(PROMPT, max_new_tokens=9, eos_token_id=-1, streamer=log, **drafting)
    assert log.heard == [PROMPT.tolist(), *([token] for token in out[0, 7:].tolist()), "end"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_cache=False), "use_cache=True"),
        (dict(do_sample=True, num_return_sequences=2), "one text"),
        (dict(input_ids=PROMPT.repeat(2, 1)), "one text"),
        (dict(inputs_embeds=torch.zeros(1, 7, 16)), "inputs_embeds"),
    ],
)
def test_what_cannot_be_drafted_is_refused(options, message):
    model = toys(1)[0]
    options = dict(input_ids=PROMPT) | options
    for drafting in (dict(prompt_lookup_num_tokens=2), dict(assistant_model=assistants()[0])):
        with pytest.raises(ValueError, match=message):
            model.generate(max_new_tokens=3, **options, **drafting)


@pytest.mark.parametrize("drafting", ["lookup", "assistant"])
def test_beams_cannot_be_drafted(drafting):
    drafting = dict(assistant_model=assistants()[0]) if drafting == "assistant" else dict(prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match=r"num_beams|beams|one text"):
        toys(1)[0].generate(PROMPT, num_beams=2, max_new_tokens=3, **drafting)


def test_an_assistant_of_another_vocabulary_is_refused():
    other = LlamaForCausalLM(LlamaConfig(**FIELDS | {"vocab_size": 31}))
    with pytest.raises(ValueError, match="assistant_model has 31 tokens and the model 30"):
        toys(1)[0].generate(PROMPT, assistant_model=other, max_new_tokens=3)
