"""KV caches: a text read in chunks equals the text read at once; operations on a cache's rows and tokens."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import both_models, counted_positions, miss
from strategies import SEEDS, batches, configs

from llama import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

STATELESS = ["default", "linear", "yarn", "llama3"]  # RoPE types whose angles do not depend on the length
# The same computation in float64, split differently: only rounding differs.
FLOAT64 = 1e-10
# With output_attentions the softmax runs in float32, as in transformers.
SOFTMAX = 1e-5

SMALL = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return both_models(SMALL, 0)[0].requires_grad_(False).double()


@pytest.fixture(scope="module")
def ids():
    return torch.tensor(np.random.default_rng(0).integers(1, 30, (3, 8)))


def read(model, ids, cache=None, mask=None, **more):
    with torch.no_grad():
        return model(ids, mask, past_key_values=cache, use_cache=True, **more)


def filled(model, ids):
    return read(model, ids).past_key_values


def near(ours, theirs, bar=FLOAT64):
    return miss(ours.detach(), theirs.detach()) < bar


# -- reading in chunks ------------------------------------------------------------------------------------------------


@given(configs(STATELESS), SEEDS, st.data())
@settings(max_examples=80)
def test_pieces_through_a_cache_equal_the_whole(fields, seed, data):
    ids, mask = data.draw(batches(fields["vocab_size"]))
    model = both_models(fields, seed)[0].double()
    see = data.draw(st.booleans())
    bar = SOFTMAX if see else FLOAT64
    ids, length = torch.tensor(ids), ids.shape[1]
    mask = None if mask is None else torch.tensor(mask)
    whole = read(model, ids, mask=mask, output_attentions=see)
    kind = data.draw(st.sampled_from(["dynamic", "static", "tuple", "none"]))
    cache = {"dynamic": DynamicCache(), "static": StaticCache(model.config, length + data.draw(st.integers(0, 9)))}
    cache = cache.get(kind)
    inner = data.draw(st.lists(st.integers(1, length), max_size=4))
    for start, end in pairwise(sorted({0, length, *inner})):
        part_mask = None if mask is None else mask[:, :end]
        if kind == "static" and mask is not None and data.draw(st.booleans()):  # as wide as the cache
            part_mask = torch.cat([mask[:, :end], mask.new_zeros(len(ids), cache.max_cache_len - end)], dim=1)
        given_cache = cache.to_legacy_cache() if kind == "tuple" and cache is not None else cache
        part = read(model, ids[:, start:end], given_cache, part_mask, output_attentions=see)
        if kind in ("dynamic", "static"):
            assert part.past_key_values is cache
        cache = part.past_key_values
        assert near(part.logits, whole.logits[:, start:end], bar)
        if see:
            for mine, full in zip(part.attentions, whole.attentions, strict=True):
                assert near(mine, full[:, :, start:end, :end], bar)
    assert cache.get_seq_length() == length
    for mine, full in zip(cache, whole.past_key_values, strict=True):
        assert near(mine[0], full[0], bar)
        assert near(mine[1], full[1], bar)


@given(configs(STATELESS), SEEDS, st.data())
@settings(max_examples=30)
def test_pieces_in_float32_equal_transformers_pieces(fields, seed, data):
    ids, mask = data.draw(batches(fields["vocab_size"], sides=("none", "left")))
    ours, theirs = both_models(fields, seed)
    cut = data.draw(st.integers(0, ids.shape[1]))
    mask = np.ones_like(ids) if mask is None else mask
    positions, real = counted_positions(ids, mask), torch.tensor(mask == 1)
    mine, their = DynamicCache(), transformers.DynamicCache(config=theirs.config)
    for start, end in pairwise(sorted({0, cut, ids.shape[1]})):
        part, part_mask = torch.tensor(ids[:, start:end]), torch.tensor(mask[:, :end])
        out = read(ours, part, mine, part_mask).logits
        expected = read(theirs, part, their, part_mask, position_ids=positions[:, start:end]).logits
        assert miss(out[real[:, start:end]], expected[real[:, start:end]]) < 1e-4
    for (keys, values), layer in zip(mine, their.layers, strict=True):
        assert miss(keys.transpose(1, 2)[real], layer.keys.transpose(1, 2)[real]) < 1e-4
        assert miss(values.transpose(1, 2)[real], layer.values.transpose(1, 2)[real]) < 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_where_angles_follow_the_length_old_keys_keep_theirs(kind):
    """As in transformers: cached keys keep the rotation for the length at the time."""
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 4}
    ours, theirs = both_models(SMALL | {"max_position_embeddings": 4, "rope_parameters": rope}, 0)
    ids = torch.tensor(np.random.default_rng(0).integers(1, 30, (2, 9)))
    mine, their = DynamicCache(), transformers.DynamicCache(config=theirs.config)
    for start, end in ((0, 3), (3, 4), (4, 6), (6, 9)):
        expected = read(theirs, ids[:, start:end], their).logits
        assert miss(read(ours, ids[:, start:end], mine).logits, expected) < 1e-4
    assert miss(expected, read(ours, ids).logits[:, 6:]) > 1e-3


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_a_cache_grows_by_doubling_and_keeps_the_past(small, steps):
    ids = torch.tensor(np.random.default_rng(0).integers(0, 30, (2, 130)))
    whole, cache, buffers = read(small, ids).logits, DynamicCache(), set()
    for start in range(0, 130, steps):
        out = read(small, ids[:, start : start + steps], cache)
        assert near(out.logits, whole[:, start : start + steps])
        buffers.add(cache[0][0].untyped_storage().data_ptr())
        assert cache[0][0].untyped_storage().nbytes() <= 2 * max(cache[0][0].nbytes, 2 * 2 * steps * 4 * 8)
    assert len(buffers) <= 10  # 1, 2, 4 ... 128 tokens: appending does not copy the past each time


def test_a_static_cache_is_one_allocation(small, ids):
    cache = StaticCache(config=small.config, max_cache_len=8, batch_size=3, device="cpu", dtype=torch.float32)
    assert len(cache) == 2
    assert cache.get_seq_length() == 0
    assert cache.get_max_cache_shape() == cache.get_max_length() == cache.max_cache_len == 8
    assert DynamicCache().get_max_cache_shape() is None
    with pytest.raises(KeyError, match="layer 1 of the cache holds nothing yet"):
        cache[1]
    assert cache.key_cache == [None, None]
    places = set()
    for place in range(8):
        out = read(small, ids[:, place : place + 1], cache, output_attentions=True)
        assert out.attentions[0].shape == (3, 4, 1, place + 1)  # as wide as the text, not as the cache
        places.add(cache[1][1].data_ptr())
    assert len(places) == 1
    assert cache[0][0].dtype == torch.float64  # the keys' dtype wins
    with pytest.raises(ValueError, match="room for 8 tokens and 9 are needed"):
        read(small, ids[:, :1], cache)
    assert cache.get_seq_length() == 8
    for length in (None, 0, -3):
        with pytest.raises(ValueError, match=f"max_cache_len must be a positive number of tokens, got {length}"):
            StaticCache(small.config, length)
    with pytest.raises(ValueError, match="room for 4 tokens and 8 are needed"):
        read(small, ids, StaticCache(small.config, 4))


@pytest.mark.parametrize("width", [9, 12])
def test_a_static_cache_takes_masks_as_wide_as_itself(small, ids, width):
    mask = torch.ones(3, width, dtype=torch.long)
    mask[0, :2] = 0
    plain, cache = DynamicCache(), StaticCache(small.config, width)
    for start, end in ((0, 5), (5, 8)):
        expected = read(small, ids[:, start:end], plain, mask[:, :end]).logits
        assert near(read(small, ids[:, start:end], cache, mask).logits, expected)
    cache.reset()
    wide = torch.ones(1, 1, 8, width, dtype=torch.bool).tril()
    assert near(read(small, ids, cache, wide).logits, read(small, ids).logits)
    with pytest.raises(ValueError, match="attention_mask"):
        read(small, ids[:, :1], cache, mask[:, : width - 1][:, :8])


@pytest.mark.parametrize("seen", [0, 3])
def test_a_mask_of_another_length_than_the_cache_is_an_error(small, ids, seen):
    for cache in (DynamicCache(), StaticCache(small.config, 20)):
        if seen:
            read(small, ids[:, :seen], cache)
        for wrong in (1, seen, seen + 2, seen + 4):
            with pytest.raises(ValueError, match=rf"attention_mask must be \(3, {seen + 3}\)"):
                read(small, ids[:, :3], cache, torch.ones(3, wrong))
        assert cache.get_seq_length() == seen
        read(small, ids[:, :3], cache, torch.ones(3, seen + 3))
        assert cache.get_seq_length() == seen + 3


def test_transformers_caches_serve_as_well(small, ids):
    whole = read(small, ids).logits
    cache = transformers.DynamicCache()
    for start, end in ((0, 4), (4, 5), (5, 8)):
        out = read(small, ids[:, start:end], cache, torch.ones(3, end))
        assert near(out.logits, whole[:, start:end])
        assert out.past_key_values is cache
    assert cache.get_seq_length() == 8
    assert near(cache.layers[1].keys, filled(small, ids)[1][0])
    again = read(small, ids[:, 6:], cache, cache_position=torch.arange(6, 8))
    assert near(again.logits, whole[:, 6:])


def test_transformers_static_cache_serves_or_is_refused(small, ids):
    """It returns all its slots, including empty ones."""
    fields = transformers.LlamaConfig(**SMALL)
    cache = transformers.StaticCache(config=fields, max_cache_len=12)
    try:
        parts = [read(small, ids[:, start:end], cache).logits for start, end in ((0, 4), (4, 5), (5, 8))]
    except ValueError as error:
        assert "StaticCache" in str(error)  # noqa: PT017
    else:
        assert near(torch.cat(parts, 1), read(small, ids).logits)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("cut", [slice(0, 5), slice(-5, None), slice(None)])
@pytest.mark.parametrize("static", [False, True])
def test_what_is_put_into_a_cache_is_read(small, ids, old, cut, static):
    """For code that drops keys or prepends others, in transformers 4.x's way (`old`) or 5.x's."""
    ours, theirs = both_models(SMALL, 0)
    cache = StaticCache(ours.config, 20) if static else DynamicCache()
    expected = transformers.DynamicCache()
    for model, held in ((ours, cache), (theirs, expected)):
        for chunk in (ids[:, :3], ids[:, 3:4], ids[:, 4:7]):  # leaves spare room
            read(model, chunk, held)
        in_front = None
        for index, layer in enumerate(held.layers):
            lists = held if old and held is cache else None
            for kind in ("keys", "values"):
                now = getattr(lists, f"{kind[:-1]}_cache")[index] if lists else getattr(layer, kind)
                in_front = now[:, :, :1] * 0.5
                new = torch.cat([in_front, now[:, :, cut]], dim=2)
                if lists:
                    getattr(lists, f"{kind[:-1]}_cache")[index] = new
                else:
                    setattr(layer, kind, new)
    assert cache.get_seq_length() == expected.get_seq_length()
    before = [(keys.clone(), values.clone()) for keys, values in cache]
    handed = list(cache)
    for chunk in (ids[:, 7:], ids[:, :2]):
        mine, their = (read(m, chunk, held).logits for m, held in ((ours, cache), (theirs, expected)))
        assert near(mine, their, 1e-4)
    for pair, kept in zip(handed, before, strict=True):
        assert all(torch.equal(mine, one) for mine, one in zip(pair, kept, strict=True))


def test_the_lists_of_an_old_cache_take_tensors_and_no_more(small, ids):
    cache = filled(small, ids)
    keys = cache.key_cache
    keys[1] = keys[1] * 2
    assert torch.equal(keys[1], cache.layers[1].keys)
    assert torch.equal(cache.key_cache[1], keys[1])
    with pytest.raises(TypeError, match="update"):
        cache.value_cache.append(keys[1])


def test_our_pairs_serve_transformers(ids):
    ours, theirs = both_models(SMALL, 0)
    cache = transformers.DynamicCache(filled(ours, ids[:, :5]).to_legacy_cache())
    assert miss(read(theirs, ids[:, 5:], cache).logits, read(theirs, ids).logits[:, 5:]) < 1e-4


# -- the interface of a cache -----------------------------------------------------------------------------------------


def test_a_cache_reads_as_a_tuple_of_pairs(small, ids):
    cache = filled(small, ids)
    assert len(cache) == len(list(cache)) == 2
    for (keys, values), pair in zip(cache, cache.to_legacy_cache(), strict=True):
        assert keys.shape == values.shape == (3, 2, 8, 4)
        assert torch.equal(keys, pair[0])
        assert torch.equal(values, pair[1])
    assert type(cache.to_legacy_cache()) is tuple
    assert torch.equal(cache[1][0], cache.key_cache[1])
    assert torch.equal(cache[-1][1], cache.value_cache[1])
    assert torch.equal(cache.layers[0].keys, cache[0][0])
    assert torch.equal(cache.layers[0].values, cache[0][1])
    assert not torch.equal(cache[0][0], cache[0][1])
    assert cache.seen_tokens == cache.get_seq_length() == cache.get_seq_length(1) == 8
    assert cache.get_seq_length(5) == 0
    with pytest.raises(IndexError):
        cache[2]
    empty = DynamicCache()
    assert len(empty) == empty.get_seq_length() == 0
    assert empty  # true although empty
    assert list(empty) == []
    assert empty.to_legacy_cache() == ()
    assert StaticCache(small.config, 3).layers[0].is_initialized is False
    assert cache.layers[0].is_initialized


def test_an_empty_cache_is_filled_not_replaced(small, ids):
    cache = DynamicCache()
    assert read(small, ids, cache).past_key_values is cache
    assert cache.get_seq_length() == 8


def test_a_cache_of_pairs_and_what_else_may_come_first(small, ids):
    pairs = filled(small, ids).to_legacy_cache()
    for cache in (DynamicCache(pairs), DynamicCache.from_legacy_cache(pairs), DynamicCache(ddp_cache_data=list(pairs))):
        assert type(cache) is DynamicCache
        assert cache.get_seq_length() == 8
        assert torch.equal(cache[1][1], pairs[1][1])
    for cache in (DynamicCache(small.config), DynamicCache(config=small.config), DynamicCache.from_legacy_cache(),
                  DynamicCache(None), DynamicCache.from_legacy_cache(())):  # fmt: skip
        assert cache.get_seq_length() == 0
        assert near(read(small, ids, cache).logits, read(small, ids).logits)


def test_an_unknown_keyword_of_a_cache_is_an_error(small, ids):
    """A typo would silently give an empty cache."""
    with pytest.raises(TypeError):
        DynamicCache(ddp_cache_dat=filled(small, ids).to_legacy_cache())
    with pytest.raises(TypeError):
        StaticCache(small.config, max_cache_length=8)


def test_update_gives_all_there_is():
    cache = DynamicCache()
    k, v = torch.randn(2, 1, 2, 3, 4).unbind()
    keys, values = cache.update(k, v, 0)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    keys, values = cache.update(k[:, :, :1], v[:, :, :1], 0, {"cache_position": None})
    assert torch.equal(keys, torch.cat([k, k[:, :, :1]], 2))
    assert torch.equal(values, torch.cat([v, v[:, :, :1]], 2))
    cache.update(k, v, 1)
    assert (cache.get_seq_length(), cache.get_seq_length(1)) == (4, 3)
    with pytest.raises(ValueError, match="the cache holds 1 rows, got 2"):
        cache.update(k.expand(2, 2, 3, 4), v.expand(2, 2, 3, 4), 0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("to", "left"), [(5, 5), (0, 0), (8, 8), (11, 8), (-1, 7), (-8, 0), (-20, 0)])
def test_a_cropped_cache_goes_on_from_there(small, ids, static, to, left):
    cache = StaticCache(small.config, 9) if static else DynamicCache()
    read(small, ids, cache)
    cache.crop(to)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [left, left]
    assert cache[0][0].shape == cache[1][1].shape == (3, 2, left, 4)
    if left < 8:
        assert near(read(small, ids[:, left:], cache).logits, read(small, ids).logits[:, left:])


@pytest.mark.parametrize("static", [False, True])
def test_an_emptied_cache_takes_any_batch(small, ids, static):
    cache = StaticCache(small.config, 9) if static else DynamicCache()
    read(small, ids, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert near(read(small, ids, cache).logits, read(small, ids).logits)
    cache.reset()
    assert near(read(small, ids[:1], cache).logits, read(small, ids[:1]).logits)
    assert cache[0][0].shape[0] == 1


@pytest.mark.parametrize("static", [False, True])
def test_rows_are_reordered_repeated_and_selected(small, ids, static):
    def begun():
        cache = StaticCache(small.config, 9) if static else DynamicCache()
        read(small, ids[:, :5], cache)
        return cache

    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = begun()
        change(cache)
        assert near(cache[1][0], begun()[1][0][rows])
        for place in (5, 6):
            out = read(small, ids[rows, place : place + 1], cache).logits
            assert near(out, read(small, ids[rows, : place + 1]).logits[:, -1:])
    empty = StaticCache(small.config, 9)
    empty.reorder_cache(torch.tensor([0]))
    empty.batch_repeat_interleave(2)
    assert empty.get_seq_length() == 0


def test_a_batch_is_split_into_caches_of_its_rows(small, ids):
    parts = filled(small, ids[:, :5]).batch_split(3, 2)
    assert [type(part) for part in parts] == [DynamicCache] * 2
    assert [part[0][0].shape[0] for part in parts] == [2, 1]
    whole = read(small, ids).logits[:, 5:]
    for part, rows in zip(parts, (slice(0, 2), slice(2, 3)), strict=True):
        assert near(read(small, ids[rows, 5:], part).logits, whole[rows])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_is_another(small, ids, copier):
    cache = filled(small, ids[:, :5])
    other = copier(cache)
    read(small, ids[:, 5:6], cache)
    assert other.get_seq_length() == 5
    assert near(read(small, ids[:, 5:], other).logits, read(small, ids).logits[:, 5:])
    assert cache.get_seq_length() == 6


# -- tensors that others hold -----------------------------------------------------------------------------------------


def test_growing_in_place_leaves_alone_what_was_read_before(small, ids):
    cache = filled(small, ids[:, :3])
    for place in range(3, 8):
        before = cache.to_legacy_cache()
        kept = copy.deepcopy(before)
        read(small, ids[:, place : place + 1], cache)
        for (keys, values), (old_keys, old_values) in zip(before, kept, strict=True):
            assert torch.equal(keys, old_keys)
            assert torch.equal(values, old_values)
            assert keys.shape[2] == place


def test_two_texts_go_on_from_one_prompt(small, ids):
    prompt = filled(small, ids[:, :4]).to_legacy_cache()
    kept = copy.deepcopy(prompt)
    first, second = DynamicCache.from_legacy_cache(prompt), DynamicCache.from_legacy_cache(prompt)
    whole, other = read(small, ids).logits, read(small, torch.cat([ids[:, :4], ids[:, :4].flip(1)], 1)).logits
    for step in range(4):
        out = read(small, ids[:, 4 + step : 5 + step], first).logits
        assert near(out[:, 0], whole[:, 4 + step])
        out = read(small, ids[:, 3 - step : 4 - step], second).logits
        assert near(out[:, 0], other[:, 4 + step])
    assert all(torch.equal(a, b) for one, two in zip(prompt, kept, strict=True) for a, b in zip(one, two, strict=True))


def test_cropping_does_not_write_into_tensors_that_were_handed_in(small, ids):
    """Tokens after a crop must not land in the caller's tuple, nor in the whole that a part was split from."""
    prompt = filled(small, ids[:, :6]).to_legacy_cache()
    kept = copy.deepcopy(prompt)
    shorter = DynamicCache.from_legacy_cache(prompt)
    shorter.crop(4)
    read(small, ids[:, :2], shorter)
    assert torch.equal(prompt[0][0], kept[0][0])

    whole = filled(small, ids[:, :6])
    before = whole[1][1].clone()
    part = whole.batch_split(3, 1)[0]
    part.crop(4)
    read(small, ids[:1, :2], part)
    assert torch.equal(whole[1][1], before)


@pytest.mark.parametrize("grown", [False, True])
def test_cropping_does_not_write_into_what_was_read_before(small, ids, grown):
    cache = filled(small, ids[:, :6])
    if grown:  # a buffer with spare room
        read(small, ids[:, 6:7], cache)
    before = cache.to_legacy_cache()
    kept = copy.deepcopy(before)
    cache.crop(4)
    read(small, ids[:, :2], cache)
    assert torch.equal(before[0][0], kept[0][0])


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("trained", ["", "q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "embed_tokens"])
def test_gradients_pass_through_a_cache(ids, trained, static):
    """In chunks as at once, whichever projection an adapter trains; buffers saved by autograd are not overwritten."""
    model = both_models(SMALL, 0)[0].double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    found = []
    for pieces in ([8], [2, 2, 1, 1, 1, 1], [1] * 8):
        model.zero_grad()
        cache = StaticCache(model.config, 12) if static else DynamicCache()
        logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(pieces, dim=1)]
        torch.cat(logits, 1).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    for name, expected in found[0].items():
        assert near(found[1][name], expected), name
        assert near(found[2][name], expected), name


def test_a_prefix_that_is_trained_gets_its_gradient(ids):
    """As in prefix tuning: the cache passed in consists of parameters."""
    ours, theirs = both_models(SMALL, 0)
    found = []
    for model, make in ((ours, DynamicCache), (ours, tuple), (theirs, transformers.DynamicCache)):
        torch.manual_seed(0)
        prefix = [tuple(torch.randn(3, 2, 2, 4, requires_grad=True) for _ in range(2)) for _ in range(2)]
        model(ids, torch.ones(3, 10), past_key_values=make(prefix)).logits.square().mean().backward()
        found.append(torch.stack([t.grad for pair in prefix for t in pair]))
    assert miss(found[0], found[2]) < 1e-4
    assert torch.equal(found[0], found[1])


def test_reading_on_without_gradients_spares_what_training_saved(ids):
    model = both_models(SMALL, 0)[0].double()
    model(ids).logits.sum().backward()
    expected = model.lm_head.weight.grad.clone(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    for crop in (None, 5):
        model.zero_grad()
        out = model(ids, use_cache=True)
        if crop is not None:
            out.past_key_values.crop(crop)
        for _ in range(3):
            read(model, ids[:, :1], out.past_key_values)
        out.logits.sum().backward()
        assert near(model.lm_head.weight.grad, expected[0])
        assert near(model.model.layers[0].self_attn.q_proj.weight.grad, expected[1])


def test_training_may_go_on_from_a_cache_without_gradients(ids):
    model = both_models(SMALL, 0)[0].double()
    for cache in (filled(model, ids[:, :3]), StaticCache(model.config, 9)):
        if cache.get_seq_length() == 0:
            read(model, ids[:, :3], cache)
        read(model, ids[:, 3:4], cache)  # a buffer with spare room
        kept = copy.deepcopy(cache.to_legacy_cache())
        model.zero_grad()
        out = model(ids[:, 4:6], past_key_values=cache)
        out = torch.cat([out.logits, model(ids[:, 6:], past_key_values=cache).logits], 1)
        out.square().mean().backward()
        found = model.model.layers[0].self_attn.v_proj.weight.grad.clone()
        model.zero_grad()
        model(ids[:, 4:], past_key_values=kept).logits.square().mean().backward()
        assert near(found, model.model.layers[0].self_attn.v_proj.weight.grad)


def test_what_was_read_in_inference_mode_can_be_read_on_outside(small, ids):
    """Inference tensors may not be written outside inference mode."""
    for static in (False, True):
        cache = StaticCache(small.config, 9) if static else DynamicCache()
        with torch.inference_mode():
            for start, end in ((0, 4), (4, 5)):  # the second leaves spare room
                small(ids[:, start:end], past_key_values=cache)
        for place in (5, 6):
            out = read(small, ids[:, place : place + 1], cache)
            assert near(out.logits, read(small, ids).logits[:, place : place + 1])
        assert near(small(ids[:, 7:], past_key_values=cache).logits, read(small, ids).logits[:, 7:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_an_emptied_cache_takes_another_dtype(kind):
    config = LlamaConfig(50, 32, 40, num_hidden_layers=1, num_attention_heads=4)
    model, half = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval().bfloat16()
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=8)
    ids = torch.tensor([[1, 2, 3]])
    model(ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(half(ids, past_key_values=cache).logits, half(ids).logits)
