"""decode_attention against the reference: lengths, masks, pages, and caches split into pieces."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_no_worse,
    exact,
    examples,
    guard_memory,
    integers,
    laid_out,
    layouts,
    normal,
    same_bits,
)
from strategies import SEEDS

from llama import reference
from llama.kernels import tiles
from llama.kernels.decode_attention import decode_attention
from llama.kernels.flash_attention import flash_attention

memory = guard_memory()
head_dims = st.sampled_from([1, 3, 8, 8, 16, 16, 24, 40, 64, 80, 100, 128])
splits = st.sampled_from([1, 2, 3, 32])


@st.composite
def steps(draw, dtype=None, rows=(0, 1, 1, 2, 3)):
    """(q, k, v, lengths, mask): a cache of S slots, perhaps with a length per row and a mask with holes."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    B, K, G = draw(st.sampled_from(rows)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    S, D = draw(st.integers(0, 100) | st.sampled_from([1, 15, 16, 17, 32, 33, 64])), draw(head_dims)
    rng = np.random.default_rng(draw(SEEDS))
    q = normal(rng, (B, K * G, 1, D), dtype, draw(st.sampled_from([1e-3, 1.0, 1e2])))
    k = normal(rng, (B, K, S, D), dtype)
    v = normal(rng, (B, K, S, D), dtype, draw(st.sampled_from([1e-3, 1.0, 1e2])))
    lengths = mask = None
    if draw(st.booleans()):
        length = st.integers(0, S) | st.sampled_from([0, min(S, 1), S])
        lengths = np.array(draw(st.lists(length, min_size=B, max_size=B)), int)
    if draw(st.booleans()):
        mask = rng.random((B, S)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return q, k, v, lengths, mask


def hidden(lengths, mask, B, S):
    """(B, S): the slots that are not visible."""
    unseen = np.arange(S) >= (np.full(B, S) if lengths is None else lengths)[:, None]
    return unseen if mask is None else unseen | ~mask


def spoiled(x, unseen, value):
    x = x.clone()
    for b, places in enumerate(unseen):
        x[b, :, places] = value
    return x


def beyond(lengths, B, S):
    """(B, S): the slots beyond a row's length."""
    return hidden(lengths, None, B, S)


def paged(x, size, rng, unused=2):
    """Return x (B, K, S, D) as shuffled pages, with `unused` pages of NaN among them, and the page table."""
    B, K, S, D = x.shape
    n = -(-S // size)
    padded = torch.cat([x, x.new_full((B, K, n * size - S, D), float("nan"))], dim=2)
    pages = padded.unflatten(2, (n, size)).transpose(1, 2).reshape(B * n, K, size, D)
    order = rng.permutation(B * n + unused)  # page i is stored at order[i]
    pool = x.new_full((B * n + unused, K, size, D), float("nan"))
    pool[integers(order[: B * n])] = pages
    return pool, order[: B * n].reshape(B, n)


def plain_attention(q, k, v, unseen):
    """transformers' eager attention, with its softmax in float32; zeros where a row sees nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.tensor(unseen, device=q.device)[:, None, None], float("-inf"))
    return scores.float().softmax(-1).nan_to_num(0).to(q.dtype) @ v


def assert_right(ours, q, k, v, lengths, mask):
    """A score's rounding in float32 gives its weight an error proportional to the score."""
    if not k.numel():
        assert (ours == 0).all()
        assert ours.shape == q.shape
        return
    truth = reference.decode_attention(*map(exact, (q, k, v)), lengths, mask)
    plain = plain_attention(q, k, v, hidden(lengths, mask, len(q), k.shape[2]))
    largest_q, largest_k, largest_v = (float(x.abs().max()) if x.numel() else 0.0 for x in (q, k, v))
    score = 1 + largest_q * largest_k * q.shape[-1] ** 0.5
    assert_no_worse(ours, plain, truth, terms=largest_v, float32_terms=4 * score * largest_v)
    assert ours.transpose(1, 2).is_contiguous()


def tables(draw, lengths, mask):
    lengths = None if lengths is None else integers(lengths, draw(st.sampled_from([torch.int32, torch.int64])))
    mask = None if mask is None else integers(mask, draw(st.sampled_from([torch.bool, torch.int64, torch.uint8])))
    return [None if table is None else laid_out(table, draw(layouts)) for table in (lengths, mask)]


garbage = st.sampled_from([float("nan"), float("inf"), float("-inf")])


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data(), splits, garbage)
@examples(60)
def test_decode_attention_is_as_close_to_the_reference_as_eager_attention(dtype, data, pieces, value):
    """Hidden slots hold garbage, and the cache is a view of a larger tensor. Only the values of padding are finite, if
    large: they are what a model computed there."""
    q, k, v, lengths, mask = data.draw(steps(dtype))
    unseen, after = hidden(lengths, mask, len(q), k.shape[2]), beyond(lengths, len(q), k.shape[2])
    bad_k, bad_v = spoiled(k, unseen, value), spoiled(spoiled(v, unseen, 1e4), after, value)
    given_q, *given_kv = (laid_out(x, data.draw(layouts)) for x in (q, bad_k, bad_v))
    with mock.patch.object(tiles, "SPLITS", pieces):
        ours = decode_attention(given_q, *given_kv, *tables(data.draw, lengths, mask))
    assert_right(ours, q, k, v, lengths, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data(), st.sampled_from([1, 5, 16, 32]), splits, SEEDS)
@examples(40)
def test_pages_in_any_order_give_the_same_bits_as_one_cache(dtype, data, size, pieces, seed):
    """Unused pages hold NaN, and table entries beyond a row's length are out of range."""
    q, k, v, lengths, mask = data.draw(steps(dtype, rows=(1, 2, 3)))
    rng, (B, _, S, _) = np.random.default_rng(seed), k.shape
    lengths = np.full(B, S) if lengths is None else lengths
    (k_pages, table), (v_pages, _) = (paged(x, size, np.random.default_rng(seed), 2) for x in (k, v))
    room = table.shape[1] * size
    if mask is not None:
        mask = np.concatenate([mask, rng.random((B, room - S)) < 0.5], axis=1)
    table[np.arange(table.shape[1]) * size >= lengths[:, None]] = 10**6
    whole_k, whole_v = (torch.cat([x, x.new_zeros((B, x.shape[1], room - S, x.shape[3]))], dim=2) for x in (k, v))
    lengths_t, mask_t = tables(data.draw, lengths, mask)
    table_t = laid_out(integers(table, data.draw(st.sampled_from([torch.int32, torch.int64]))), data.draw(layouts))
    with mock.patch.object(tiles, "SPLITS", pieces):
        ours = decode_attention(
            q, laid_out(k_pages, data.draw(layouts)), laid_out(v_pages, data.draw(layouts)), lengths_t, mask_t, table_t
        )
        assert same_bits(ours, decode_attention(q, whole_k, whole_v, lengths_t, mask_t))
    assert_right(ours, q, whole_k, whole_v, lengths, mask)
    if not room:
        return
    truth_table = np.where(table == 10**6, 0, table)
    k_pages, v_pages = k_pages.nan_to_num(0), v_pages.nan_to_num(0)
    truth = reference.decode_attention(*map(exact, (q, k_pages, v_pages)), lengths, mask, truth_table)
    plain = reference.decode_attention(*map(exact, (q, whole_k, whole_v)), lengths, mask)
    np.testing.assert_allclose(truth, plain, rtol=0, atol=1e-12 * (1 + float(v.abs().max())))


def test_rows_may_share_pages():
    """A common prompt is stored once."""
    rng = np.random.default_rng(0)
    q, pages = normal(rng, (2, 4, 1, 16), torch.float32), normal(rng, (4, 2, 5, 16), torch.float32)
    table = np.array([[3, 0, 1], [3, 0, 2]])
    ours = decode_attention(q, pages, pages + 1, integers([15, 12]), None, integers(table))
    k = pages[integers(table)].transpose(1, 2).reshape(2, 2, 15, 16)
    assert same_bits(ours, decode_attention(q, k, k + 1, integers([15, 12])))
    assert_right(ours, q, k, k + 1, np.array([15, 12]), None)


@given(steps(rows=(1, 2)), st.lists(st.sampled_from(LAYOUTS[1:]), min_size=3, max_size=3))
@examples(30)
def test_layout_changes_no_bit(drawn, layout):
    q, k, v, lengths, mask = drawn
    args = [None if table is None else integers(table) for table in (lengths, mask)]
    whole = decode_attention(q, k, v, *args)
    assert same_bits(decode_attention(*map(laid_out, (q, k, v), layout), *args), whole)


def test_one_cache_for_all_rows():
    rng = np.random.default_rng(0)
    q, k = normal(rng, (3, 4, 1, 8), torch.float16), normal(rng, (1, 2, 40, 8), torch.float16)
    lengths = integers([40, 0, 17])
    shared = decode_attention(q, k.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), lengths)
    assert same_bits(shared, decode_attention(q, k.repeat(3, 1, 1, 1), k.repeat(3, 1, 1, 1), lengths))
    every = decode_attention(q, k.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), integers([17]).expand(3))
    assert same_bits(every[2], shared[2])


@given(steps(rows=(2, 3)), splits)
@examples(30)
def test_a_rows_bits_do_not_depend_on_its_batch(drawn, pieces):
    q, k, v, lengths, mask = drawn
    tables = [None if table is None else integers(table) for table in (lengths, mask)]
    with mock.patch.object(tiles, "SPLITS", pieces):
        whole = decode_attention(q, k, v, *tables)
        for b in range(len(q)):
            row = slice(b, b + 1)
            mine = [None if table is None else table[row] for table in tables]
            assert same_bits(decode_attention(q[row], k[row], v[row], *mine), whole[row])


@given(steps(rows=(1, 2)), splits)
@examples(30)
def test_it_is_flash_attention_of_the_last_token(drawn, pieces):
    q, k, v, lengths, mask = drawn
    lengths = None if lengths is None else integers(lengths)
    mask = None if mask is None else integers(mask)
    with mock.patch.object(tiles, "SPLITS", pieces):
        ours = decode_attention(q, k, v, lengths, mask)
    other = flash_attention(q, k, v, lengths=lengths, mask=mask, causal=False)
    score = 1 + float(q.abs().max() * k.abs().max() if k.numel() else 0) * q.shape[-1] ** 0.5
    largest = float(v.abs().max()) if v.numel() else 0.0
    assert_no_worse(ours, ours, exact(other), terms=largest, float32_terms=4 * score * largest, factor=0)


@pytest.mark.parametrize("group", [15, 16, 17, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_larger_than_a_matrix_unit(dtype, group):
    rng = np.random.default_rng(group)
    q, (k, v) = normal(rng, (2, 2 * group, 1, 16), dtype), (normal(rng, (2, 2, 50, 16), dtype) for _ in range(2))
    lengths = np.array([50, 33])
    assert_right(decode_attention(q, k, v, integers(lengths)), q, k, v, lengths, None)


@pytest.mark.parametrize("head_dim", [192, 256])
def test_large_heads(head_dim):
    rng = np.random.default_rng(head_dim)
    q, (k, v) = normal(rng, (1, 2, 1, head_dim), torch.bfloat16), normal(rng, (2, 1, 1, 40, head_dim), torch.bfloat16)
    assert_right(decode_attention(q, k, v, None), q, k, v, None, None)


@pytest.mark.parametrize("S", [496, 512, 513, 700])
def test_a_long_cache_in_as_many_pieces_as_there_may_be(S):
    """Pieces of one block and of two, the last one partial, and most of them empty for the short rows."""
    rng = np.random.default_rng(S)
    q, (k, v) = normal(rng, (3, 2, 1, 16), torch.float32), normal(rng, (2, 3, 1, S, 16), torch.float32)
    lengths = np.array([S, 17, 0])
    assert_right(decode_attention(q, k, v, integers(lengths)), q, k, v, lengths, None)


@pytest.mark.parametrize("attend", [decode_attention, partial(flash_attention, causal=False)], ids=["decode", "flash"])
def test_a_length_beyond_the_cache_ends_with_it(attend):
    rng = np.random.default_rng(0)
    q, k = normal(rng, (2, 4, 1, 8), torch.float32), normal(rng, (2, 2, 64, 8), torch.float32)
    k[:, :, 40:] = torch.nan
    seen = k[:, :, :40]
    assert same_bits(
        attend(q, seen, seen, lengths=integers([41, 140])), attend(q, seen, seen, lengths=integers([40, 40]))
    )


def test_huge_scores_overflow_nothing():
    q, k = (torch.full((1, 2, n, 16), 1e3, device=DEVICE) for n in (1, 40))
    v = normal(np.random.default_rng(0), (1, 2, 40, 16), torch.float32)
    for query in (q, -q):
        out = decode_attention(query, k, v, None)
        truth = exact(v).mean(axis=2, keepdims=True)
        assert_no_worse(out, out, truth, terms=float(v.abs().max()), factor=0)


def test_arguments_that_do_not_fit_are_named():
    q, k = torch.ones(2, 4, 1, 8, device=DEVICE), torch.ones(2, 2, 5, 8, device=DEVICE)
    for expected, args in [
        ("one token per row, got 3; use flash_attention for more", (q.repeat(1, 1, 3, 1), k, k, None)),
        ("q has 2 rows, but the caches have 1", (q, k[:1], k[:1], None)),
        (r"lengths must be \(2,\) integers, got \(1,\)", (q, k, k, integers([1]))),
        (r"lengths must be \(2,\) integers", (q, k, k, torch.ones(2, device=DEVICE))),
        (r"mask must be \(2, 5\) integers, got \(2, 4\)", (q, k, k, None, integers(np.ones((2, 4))))),
        (r"mask must be \(2, 10\) integers", (q, k, k, None, integers(np.ones((2, 5))), integers([[0, 1], [1, 0]]))),
        (r"block_table must be \(2, pages\) integers, got \(1, 2\)", (q, k, k, None, None, integers([[0, 1]]))),
        ("block_table must be", (q, k, k, None, None, torch.ones(2, 1, device=DEVICE))),
        ("3 query heads are not a multiple of 2", (q[:, :3], k, k, None)),
        ("the same dtype", (q, k.half(), k.half(), None)),
    ]:
        with pytest.raises(ValueError, match=f"decode_attention: .*{expected}"):
            decode_attention(*args)
