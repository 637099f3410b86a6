"""The whole reference model against transformers, and against itself in other chunks and batches."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import as_float64, classifier, miss, transformers_model
from strategies import SEEDS, batches, configs

from llama import reference
from llama.reference import Config, KVCache, forward

# transformers computes in float32 (its norms and softmax do so even in a float64 model): 6e-8 per operation, times the
# few hundred operations and the sharp attention of these models. A wrong convention shows at 1e-2 and above.
FLOAT32 = 1e-4
# The same float64 computation, split differently: rounding only.
FLOAT64 = 1e-10

STATELESS = ["default", "linear", "yarn", "llama3"]  # RoPE types whose frequencies do not depend on the length


@st.composite
def models(draw, kinds=None, **options):
    """(transformers' fields, ids, mask, seed of the weights)"""
    fields = draw(configs(kinds))
    ids, mask = draw(batches(fields["vocab_size"], **options))
    return fields, ids, mask, draw(SEEDS)


def tensor(array):
    return None if array is None else torch.tensor(array)


def positions(ids, mask):
    """The positions that transformers' generate derives from a mask; its forward has to be given them."""
    return np.maximum(np.cumsum(np.ones_like(ids) if mask is None else mask, axis=1) - 1, 0)


@given(models())
@settings(max_examples=400)
def test_forward_equals_transformers(drawn):
    fields, ids, mask, seed = drawn
    model, params = transformers_model(fields, seed)
    with torch.no_grad():
        theirs = model(
            tensor(ids),
            attention_mask=tensor(mask),
            position_ids=tensor(positions(ids, mask)),
            output_hidden_states=True,
            output_attentions=True,
        )
    ours = forward(
        as_float64(params), Config.from_dict(fields), ids, mask, output_hidden_states=True, output_attentions=True
    )
    real = np.ones(ids.shape, bool) if mask is None else mask == 1  # outputs at padding are undefined
    assert miss(ours.logits[real], theirs.logits.numpy()[real]) < FLOAT32
    assert len(ours.hidden_states) == len(theirs.hidden_states) == fields["num_hidden_layers"] + 1
    for mine, their in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert miss(mine[real], their.numpy()[real]) < FLOAT32
    for mine, their in zip(ours.attentions, theirs.attentions, strict=True):
        assert miss(mine.swapaxes(1, 2)[real], their.numpy().swapaxes(1, 2)[real]) < FLOAT32


@given(models())
@settings(max_examples=60)
def test_float32_misses_the_truth_by_no_more_than_transformers(drawn):
    fields, ids, mask, seed = drawn
    model, params = transformers_model(fields, seed)
    config = Config.from_dict(fields)
    truth = forward(as_float64(params), config, ids, mask).logits
    with torch.no_grad():
        theirs = model(tensor(ids), tensor(mask), tensor(positions(ids, mask))).logits.numpy()
    ours = forward(params, config, ids, mask).logits
    assert ours.dtype == np.float32
    real = np.ones(ids.shape, bool) if mask is None else mask == 1
    # Twice theirs, plus the noise floor below which two float32 computations are equally good.
    assert miss(ours[real], truth[real]) <= 2 * miss(theirs[real], truth[real]) + 1e-6


@given(models())
@settings(max_examples=60)
def test_loss_equals_transformers(drawn):
    fields, ids, _, seed = drawn
    labels = np.where(np.random.default_rng(seed).random(ids.shape) < 0.3, -100, ids)
    model, params = transformers_model(fields, seed)
    with torch.no_grad():
        theirs = model(tensor(ids), labels=tensor(labels)).loss.item()
    ours = reference.causal_lm_loss(forward(as_float64(params), Config.from_dict(fields), ids).logits, labels)
    assert ours == pytest.approx(theirs, rel=FLOAT32, abs=FLOAT32, nan_ok=True)
    assert np.isnan(ours) == (not (labels[:, 1:] != -100).any())


@given(models(), st.integers(1, 5), st.data())
@settings(max_examples=40)
def test_classification_equals_transformers(drawn, num_labels, data):
    fields, ids, mask, seed = drawn
    pad = data.draw(st.integers(0, fields["vocab_size"] - 1))
    ids = ids if mask is None else np.where(mask == 1, ids, pad)
    fields = fields | {"pad_token_id": pad}
    model, params = classifier(fields, seed, num_labels)
    with torch.no_grad():
        theirs = model(tensor(ids), tensor(mask), tensor(positions(ids, mask))).logits.numpy()
    ours = reference.classify(as_float64(params), Config.from_dict(fields), ids, mask)
    last = np.max(np.arange(ids.shape[1]) * (ids != pad), axis=1)
    read = np.ones(len(ids), bool) if mask is None else mask[np.arange(len(ids)), last] == 1
    assert ours.shape == (len(ids), num_labels)
    assert miss(ours[read], theirs[read]) < FLOAT32


def test_classification_of_a_batch_needs_a_padding_token():
    fields = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model, params = classifier(fields, 0, 3)
    config = Config.from_dict(fields)
    one = np.array([[1, 2, 3]])
    with torch.no_grad():
        assert miss(reference.classify(params, config, one), model(tensor(one)).logits.numpy()) < FLOAT32
    with pytest.raises(ValueError, match="pad_token_id"):
        reference.classify(params, config, np.array([[1, 2], [3, 4]]))
    with pytest.raises(ValueError, match=r"score\.weight"):
        reference.classify({n: a for n, a in params.items() if n != "score.weight"}, config, one)
    with pytest.raises(ValueError, match=r"score\.weight must be \(labels, 8\)"):
        reference.classify(params | {"score.weight": np.ones((3, 7))}, config, one)


@given(models(kinds=STATELESS), st.data())
@settings(max_examples=60)
def test_chunks_through_a_cache_equal_the_whole(drawn, data):
    fields, ids, mask, seed = drawn
    params, config = as_float64(transformers_model(fields, seed)[1]), Config.from_dict(fields)
    whole = forward(params, config, ids, mask, output_attentions=True)
    cuts = sorted({0, ids.shape[1], *data.draw(st.lists(st.integers(0, ids.shape[1]), max_size=4))})
    cache = KVCache(config.num_hidden_layers)
    for start, end in pairwise(cuts):
        part_mask = None if mask is None else mask[:, :end]
        part = forward(params, config, ids[:, start:end], part_mask, cache=cache, output_attentions=True)
        assert part.cache is cache
        assert cache.length == end
        assert miss(part.logits, whole.logits[:, start:end]) < FLOAT64
        for mine, full in zip(part.attentions, whole.attentions, strict=True):
            assert miss(mine, full[:, :, start:end, :end]) < FLOAT64


@given(models(kinds=STATELESS))
@settings(max_examples=40)
def test_a_batch_equals_its_rows_alone(drawn):
    fields, ids, mask, seed = drawn
    params, config = as_float64(transformers_model(fields, seed)[1]), Config.from_dict(fields)
    together = forward(params, config, ids, mask).logits
    for row in range(len(ids)):
        real = np.ones(ids.shape[1], bool) if mask is None else mask[row] == 1
        alone = forward(params, config, ids[row : row + 1, real]).logits[0]
        assert miss(together[row, real], alone) < FLOAT64


@given(models(kinds=STATELESS), st.integers(1, 1000))
@settings(max_examples=30)
def test_only_relative_positions_matter(drawn, shift):
    fields, ids, mask, seed = drawn
    params, config = as_float64(transformers_model(fields, seed)[1]), Config.from_dict(fields)
    here = forward(params, config, ids, mask, positions(ids, mask)).logits
    there = forward(params, config, ids, mask, positions(ids, mask) + shift).logits
    # Angles are float32: at position 1000 their spacing is 6e-5 radians.
    assert miss(here, there) < 1e-2


@given(models(sides=("none",)), st.integers(1, 24))
@settings(max_examples=20)
def test_embeddings_in_place_of_ids_and_the_last_logits_alone(drawn, keep):
    fields, ids, _, seed = drawn
    params, config = transformers_model(fields, seed)[1], Config.from_dict(fields)
    from_ids = forward(params, config, ids).logits
    embeds = params["model.embed_tokens.weight"][ids]
    np.testing.assert_array_equal(forward(params, config, inputs_embeds=embeds).logits, from_ids)
    last = forward(params, config, ids, logits_to_keep=keep).logits
    assert last.shape[1] == min(keep, ids.shape[1])
    assert miss(last, from_ids[:, -keep:]) < 1e-5  # a different matrix shape sums in a different order


def test_two_models_in_one_process_keep_their_own_angles():
    fields = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    _, params = transformers_model(fields, 0)
    ids = np.array([[1, 2, 3, 4]])
    slow, fast = (Config(**fields, rope_parameters={"rope_theta": theta}) for theta in (1e6, 1e2))
    first = forward(params, slow, ids).logits
    assert miss(forward(params, fast, ids).logits, first) > 1e-3
    np.testing.assert_array_equal(forward(params, slow, ids).logits, first)


SMALL = Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def small():
    return {name: np.ones(shape, np.float32) for name, shape in reference.parameter_shapes(SMALL)}


def a_cache(small, rows=1, tokens=3):
    return forward(small, SMALL, np.ones((rows, tokens), int)).cache


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: forward(p, SMALL), "exactly one of input_ids and inputs_embeds"),
        (lambda p: forward(p, SMALL, np.ones((1, 2), int), inputs_embeds=np.ones((1, 2, 8))), "exactly one"),
        (lambda p: forward(p, SMALL, np.ones(3, int)), r"input_ids must be integers of shape \(batch, length > 0\)"),
        (lambda p: forward(p, SMALL, np.ones((1, 0), int)), "length > 0"),
        (lambda p: forward(p, SMALL, np.ones((1, 2))), "input_ids must be integers"),
        (lambda p: forward(p, SMALL, np.ones((0, 3), int)), "length > 0"),
        (lambda p: forward(p, SMALL, inputs_embeds=np.ones((0, 3, 8))), "inputs_embeds must be"),
        (lambda p: forward(p | {"model.layers.0.mlp.up_proj.bias": np.ones(8)}, SMALL, np.ones((1, 1), int)),
         r"up_proj\.bias is present, but the configuration says"),
        (lambda p: forward(p | {"model.layers.0.self_attn.q_proj.bias": np.ones(8)}, SMALL, np.ones((1, 1), int)),
         r"q_proj\.bias is present, but the configuration says"),
        (lambda p: forward(p, SMALL, np.array([[1, 9]])), r"0 \.\.\. 8, got 1 \.\.\. 9"),
        (lambda p: forward(p, SMALL, np.array([[-1, 3]])), r"0 \.\.\. 8, got -1 \.\.\. 3"),
        (lambda p: forward(p, SMALL, inputs_embeds=np.ones((1, 2, 7))), r"inputs_embeds must be \(batch, length, 8\)"),
        (lambda p: forward(p, SMALL, np.ones((1, 2), int), np.ones((1, 3), int)), r"attention_mask must be \(1, 2\)"),
        (lambda p: forward(p, SMALL, np.ones((1, 2), int), np.ones(2, int)), r"attention_mask must be \(1, 2\)"),
        (lambda p: forward(p, SMALL, np.ones((1, 2), int), np.array([[1, 2]])), "only 0"),
        (lambda p: forward(p, SMALL, np.ones((1, 2), int), position_ids=np.ones((1, 3), int)), "position_ids must be"),
        (lambda p: forward(p, SMALL, np.ones((1, 2), int), position_ids=np.ones((1, 2))), "position_ids must be"),
        (lambda p: forward(p, SMALL, np.ones((1, 2), int), logits_to_keep=-1), "logits_to_keep"),
        (lambda p: forward(p, SMALL, np.ones((2, 1), int), cache=a_cache(p)), "cache holds a batch of 1"),
        (lambda p: forward(p, SMALL, np.ones((1, 1), int), cache=KVCache(5)), "cache has 5 layers, the model 2"),
        (lambda p: forward(p, SMALL, np.ones((1, 1), int), np.ones((1, 1), int), cache=a_cache(p)), "3 tokens and 1"),
        (lambda p: forward({n: a for n, a in p.items() if n != "model.norm.weight"}, SMALL, np.ones((1, 1), int)),
         r"model\.norm\.weight is missing"),
        (lambda p: forward(p | {"lm_head.weight": np.ones((9, 7))}, SMALL, np.ones((1, 1), int)),
         r"lm_head\.weight has shape \(9, 7\)"),
        (lambda p: a_cache(p).crop(4), "cannot crop a cache of 3 tokens to 4"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(small, call, message):
    with pytest.raises(ValueError, match=message):
        call(small)


def test_a_pass_that_breaks_off_leaves_the_cache_as_it_was(small):
    cache = a_cache(small)
    broken = dict(small) | {"model.layers.1.mlp.down_proj.weight": np.ones((8, 3), np.float32)}
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever NumPy or the shape check raises)
        forward(broken, SMALL, np.ones((1, 2), int), cache=cache)
    assert cache.length == 3
    again = forward(small, SMALL, np.ones((1, 2), int), cache=cache).logits
    np.testing.assert_allclose(again, forward(small, SMALL, np.ones((1, 5), int)).logits[:, 3:], rtol=1e-5)


def test_an_emptied_cache_takes_any_batch(small):
    cache = a_cache(small, rows=3)
    assert cache.batch_size == 3
    cache.crop(0)
    assert cache.batch_size is None
    again = forward(small, SMALL, np.ones((1, 2), int), cache=cache).logits
    np.testing.assert_array_equal(again, forward(small, SMALL, np.ones((1, 2), int)).logits)


@pytest.fixture(scope="module")
def sharp():
    fields = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return as_float64(transformers_model(fields, 0)[1]), Config.from_dict(fields)


def test_a_cache_that_grows_keeps_the_past(sharp):
    ids = np.random.default_rng(0).integers(0, 30, (2, 300))
    whole, cache = forward(*sharp, ids).logits, KVCache(2)
    for start, end in pairwise((0, 60, 70, 290, 300)):
        part = forward(*sharp, ids[:, start:end], cache=cache).logits
        assert part.dtype == np.float64
        assert miss(part, whole[:, start:end]) < FLOAT64
    with pytest.raises(ValueError, match="cannot crop a cache of 300 tokens to -1"):
        cache.crop(-1)


def test_masks_and_positions_of_other_kinds(sharp):
    ids = np.random.default_rng(0).integers(0, 30, (2, 5))
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for kind in (bool, np.uint8, np.float32):
        np.testing.assert_array_equal(forward(*sharp, ids, mask.astype(kind)).logits, forward(*sharp, ids, mask).logits)
    one_row = forward(*sharp, ids, position_ids=np.arange(5)[None]).logits
    np.testing.assert_array_equal(one_row, forward(*sharp, ids).logits)


def test_a_tied_head_is_the_embedding_whatever_else_is_there(sharp):
    params, config = sharp
    tied, x = dataclasses.replace(config, tie_word_embeddings=True), np.ones((1, 1, 16))
    np.testing.assert_allclose(reference.lm_head(params, tied, x), x @ params["model.embed_tokens.weight"].T)
    without = {name: array for name, array in params.items() if name != "lm_head.weight"}
    forward(without, tied, np.ones((1, 1), int))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        forward(without, config, np.ones((1, 1), int))


@pytest.mark.parametrize("shape", [(2, 16), (1, 0, 16), (1, 2, 15)])
def test_embeddings_of_a_wrong_shape_are_named(sharp, shape):
    with pytest.raises(ValueError, match=r"inputs_embeds must be \(batch, length, 16\)"):
        forward(*sharp, inputs_embeds=np.ones(shape))


@given(configs())
@settings(max_examples=30)
def test_parameter_shapes_are_transformers_state_dict(fields):
    state = transformers_model(fields, 0)[0].state_dict()
    ours = dict(reference.parameter_shapes(Config.from_dict(fields)))
    assert ours == {n: tuple(t.shape) for n, t in state.items() if n in ours or not fields["tie_word_embeddings"]}


def test_classification_heeds_positions(sharp):
    params, config = sharp
    params = params | {"score.weight": np.random.default_rng(0).normal(size=(2, 16))}
    ids = np.array([[1, 2, 3]])
    moved = reference.classify(params, config, ids, position_ids=np.array([[0, 5, 9]]))
    assert miss(moved, reference.classify(params, config, ids)) > 1e-3
