"""apply_rope and apply_rope_to_cache against the reference."""

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
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llama import reference
from llama.kernels.rope import apply_rope, apply_rope_to_cache

memory = guard_memory()
head_dims = st.sampled_from([2, 6, 8, 16, 24, 40, 64, 80, 100, 128])


@st.composite
def turns(draw, dtype=None):
    """(q, k, cos, sin): heads of every kind, possibly no rows or tokens, tables per row or shared.

    The tables are not real cosines: their halves differ, so that reading the wrong half shows.
    """
    dtype = dtype or draw(st.sampled_from(DTYPES))
    B, K, G, T = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 6))
    D, rng = draw(head_dims), np.random.default_rng(draw(SEEDS))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e2]))
    q, k = normal(rng, (B, K * G, T, D), dtype, scale), normal(rng, (B, K, T, D), dtype, scale)
    table_dtype = draw(st.sampled_from([dtype, torch.float32]))
    rows = B if draw(st.booleans()) else 1
    cos, sin = (torch.tensor(rng.uniform(-1, 1, (rows, T, D))).to(table_dtype).to(DEVICE) for _ in range(2))
    return q, k, cos, sin


def spread(draw, tensors):
    return [laid_out(x, draw(layouts)) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
@examples(80)
def test_apply_rope_is_as_close_to_the_reference_as_transformers(dtype, data):
    q, k, cos, sin = spread(data.draw, data.draw(turns(dtype)))
    ours = apply_rope(q, k, cos, sin)
    plain = apply_rotary_pos_emb(q, k, cos, sin)
    truth = reference.apply_rope(*map(exact, (q, k, cos, sin)))
    for x, y, y_plain, y_truth in zip((q, k), ours, plain, truth, strict=True):
        assert y.dtype == x.dtype
        terms = np.abs(exact(x)).max(axis=-1, initial=0) * 2  # two products are summed
        assert_no_worse(y, y_plain.to(dtype), y_truth, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_the_reference_at_far_and_unordered_positions(dtype):
    config = reference.Config(
        vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=200_000,
    )  # fmt: skip
    positions = np.array([[0, 1, 131_071, 7], [99_999, 5, 5, 0]])
    cos, sin = (torch.tensor(table).to(dtype).to(DEVICE) for table in reference.rope_tables(config, positions))
    rng = np.random.default_rng(0)
    q, k = normal(rng, (2, 3, 4, 64), dtype), normal(rng, (2, 1, 4, 64), dtype)
    truth = reference.apply_rope(*map(exact, (q, k, cos, sin)))
    turned, eager = apply_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    for ours, plain, expected in zip(turned, eager, truth, strict=True):
        assert_no_worse(ours, plain, expected, terms=2 * np.abs(exact(q)).max())


@given(turns(), st.lists(st.sampled_from(LAYOUTS[1:]), min_size=4, max_size=4))
@examples(60)
def test_layout_changes_no_bit(drawn, layout):
    expected = apply_rope(*drawn)
    for ours, theirs in zip(apply_rope(*map(laid_out, drawn, layout)), expected, strict=True):
        assert same_bits(ours, theirs)


@given(turns(), layouts, layouts)
@examples(60)
def test_in_place_gives_the_same_bits_in_the_tensors_themselves_and_nowhere_else(drawn, q_layout, k_layout):
    q, k, cos, sin = drawn
    expected = apply_rope(q, k, cos, sin)
    q, k = laid_out(q, q_layout), laid_out(k, k_layout)
    slabs = [x.new_empty(0).set_(x.untyped_storage()) for x in (q, k)]  # their storage, with NaN in the gaps
    turned = [slab.clone() for slab in slabs]
    for slab, x, y in zip(turned, (q, k), expected, strict=True):
        slab.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(y)
    out = apply_rope(q, k, cos, sin, in_place=True)
    assert out[0] is q
    assert out[1] is k
    assert all(map(same_bits, slabs, turned))


def test_in_place_refuses_tensors_whose_elements_share_memory():
    x, table = torch.ones(1, 1, 3, 4, device=DEVICE), torch.ones(1, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="apply_rope: k is expanded and cannot be modified in place; clone it first"):
        apply_rope(x, x[:, :, :1].expand(1, 1, 3, 4), table, table, in_place=True)
    with pytest.raises(ValueError, match="apply_rope: q is expanded"):
        apply_rope(x.expand(1, 5, 3, 4), x, table, table, in_place=True)
    one = torch.ones(1, 1, 1, 4, device=DEVICE).expand(1, 1, 1, 4)  # an expanded axis of length 1 shares nothing
    apply_rope(one, one.clone(), table[:, :1], table[:, :1], in_place=True)


@st.composite
def writes(draw):
    """(q, k, cos, sin) of turns(), v, slabs that hold the caches, and positions: distinct cache slots in any order, and
    others outside."""
    q, k, cos, sin = draw(turns())
    B, K, T, D = k.shape
    rng = np.random.default_rng(draw(SEEDS))
    S = draw(st.integers(0, 9))
    places = [rng.permutation(np.r_[np.arange(S), [-1, S] * 3])[:T] for _ in range(B)]
    cache_dtype = draw(st.sampled_from([k.dtype, torch.float32, torch.bfloat16]))
    slabs = [normal(rng, (B + 1, K + 1, S + 2, D), cache_dtype) for _ in range(2)]
    if draw(st.booleans()):  # (B, S, K, D) in memory
        slabs = [slab.transpose(1, 2).contiguous().transpose(1, 2) for slab in slabs]
    return q, k, normal(rng, k.shape, k.dtype), cos, sin, slabs, integers(np.array(places).reshape(B, T))


@given(writes(), st.lists(layouts, min_size=5, max_size=5))
@examples(120)
def test_to_cache_writes_the_places_inside_and_nothing_else(drawn, layout):
    q, k, v, cos, sin, slabs, positions = drawn
    expected_q, turned_k = apply_rope(q, k, cos, sin)
    B, K = k.shape[:2]
    expected = [slab.clone() for slab in slabs]
    inside = [slab[1:, :K, 1:-1] for slab in expected]
    for cache, x in zip(inside, (turned_k, v), strict=True):
        for b, t in np.ndindex(*positions.shape):
            if 0 <= positions[b, t] < cache.shape[2]:
                cache[b, :, positions[b, t]] = x[b, :, t].to(cache.dtype)
    k_cache, v_cache = (slab[1 : 1 + B, :K, 1:-1] for slab in slabs)
    q, k, v, cos, sin = map(laid_out, (q, k, v, cos, sin), layout)
    if layout[0] == "sliced":
        positions = positions.int()
    out = apply_rope_to_cache(q, k, v, cos, sin, k_cache, v_cache, laid_out(positions, layout[1]))
    assert same_bits(out, expected_q)
    if k_cache.dtype == k.dtype:
        assert same_bits(slabs[0], expected[0])
    else:  # rounded once, from float32; the expected value was first rounded to k's dtype
        coarse = max(torch.finfo(k.dtype).eps / torch.finfo(k_cache.dtype).eps, 1)
        terms = np.abs(exact(expected[0])).max(axis=-1) * coarse
        assert_no_worse(slabs[0], expected[0], exact(expected[0]), terms=terms)
    assert same_bits(slabs[1], expected[1])


@given(writes())
@examples(40)
def test_to_cache_does_what_the_reference_does(drawn):
    q, k, v, cos, sin, (k_cache, v_cache), positions = drawn
    k_cache, v_cache = k_cache[1:, :-1], v_cache[1:, :-1]
    truth = [exact(k_cache).copy(), exact(v_cache).copy()]
    expected = reference.apply_rope_to_cache(*map(exact, (q, k, v, cos, sin)), *truth, exact(positions))
    out = apply_rope_to_cache(q, k, v, cos, sin, k_cache, v_cache, positions)
    plain = apply_rotary_pos_emb(q, k, cos, sin)[0]
    assert_no_worse(out, plain.to(q.dtype), expected, terms=2 * np.abs(exact(q)).max(axis=-1, initial=0))
    largest = max(float(k.abs().max()) if k.numel() else 0, float(k_cache.abs().max()) if k_cache.numel() else 0)
    for cache, expected in zip((k_cache, v_cache), truth, strict=True):
        coarse = max(torch.finfo(k.dtype).eps / torch.finfo(cache.dtype).eps, 1)
        assert_no_worse(cache, cache.new_tensor(expected).to(cache.dtype), expected, terms=2 * largest * coarse)


def test_positions_far_outside_are_dropped():
    q, table = torch.ones(1, 1, 6, 4, device=DEVICE), torch.ones(1, 6, 4, device=DEVICE)
    caches = torch.zeros(2, 1, 1, 3, 4, device=DEVICE)
    apply_rope_to_cache(q, q, q, table, table, *caches, integers([[2**31, 2**32 + 1, -(2**32), 2**40, -(2**63), 5]]))
    assert (caches == 0).all()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(70, 3, 64), (33, 33, 256), (9, 3, 96)])
def test_many_heads(heads, kv_heads, head_dim):
    """More heads than one program rotates at a time."""
    rng = np.random.default_rng(heads)
    q, k, v = (normal(rng, (1, count, 2, head_dim), torch.bfloat16) for count in (heads, kv_heads, kv_heads))
    cos, sin = normal(rng, (1, 2, head_dim), torch.float32), normal(rng, (1, 2, head_dim), torch.float32)
    cache = torch.zeros(2, 1, kv_heads, 2, head_dim, dtype=torch.bfloat16, device=DEVICE)
    out = apply_rope_to_cache(q, k, v, cos, sin, cache[0], cache[1], integers([[1, 0]]))
    expected = reference.apply_rope(*map(exact, (q, k, cos, sin)))
    for ours, truth in zip((out, cache[0].flip(2)), expected, strict=True):
        assert_no_worse(ours, ours.new_tensor(truth), truth, terms=np.abs(truth).max(axis=-1))
    assert same_bits(cache[1].flip(2), v)


@given(turns(), st.data())
@examples(30)
def test_a_rows_bits_do_not_depend_on_its_batch(drawn, data):
    q, k, cos, sin = drawn
    if len(q) == 0:
        return
    b = data.draw(st.integers(0, len(q) - 1))
    table = slice(b, b + 1) if len(cos) > 1 else slice(None)
    alone = apply_rope(q[b : b + 1], k[b : b + 1], cos[table], sin[table])
    for ours, whole in zip(alone, apply_rope(q, k, cos, sin), strict=True):
        assert same_bits(ours, whole[b : b + 1])


def test_shapes_that_do_not_fit_are_named():
    q, table = torch.ones(2, 4, 3, 8, device=DEVICE), torch.ones(1, 3, 8, device=DEVICE)
    cache, places = torch.ones(2, 4, 5, 8, device=DEVICE), integers(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"apply_rope: cos must be \(2, 3, 8\) or \(1, 3, 8\), got \(1, 2, 8\)"):
        apply_rope(q, q, table[:, :2], table)
    with pytest.raises(ValueError, match="apply_rope: sin must be"):
        apply_rope(q, q, table, table[..., :4])
    with pytest.raises(ValueError, match=r"must match but for heads, with D even; got \(2, 4, 3, 8\) and \(1,"):
        apply_rope(q, q[:1], table, table)
    with pytest.raises(ValueError, match="D even"):
        apply_rope(q[..., :7], q[..., :7], table[..., :7], table[..., :7])
    with pytest.raises(ValueError, match=r"v must be .* and both caches"):
        apply_rope_to_cache(q, q, q, table, table, cache, cache[..., :4], places)
    with pytest.raises(ValueError, match="v must be"):
        apply_rope_to_cache(q, q, q[:, :1], table, table, cache, cache, places)
    for wrong in (places[:1], places.float(), places.bool()):
        with pytest.raises(ValueError, match=r"positions must be \(2, 3\) integers"):
            apply_rope_to_cache(q, q, q, table, table, cache, cache, wrong)
