"""flash_attention against the reference: every kind of mask, any layout, and no influence of hidden keys."""

from itertools import pairwise
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
    ulps,
)
from strategies import SEEDS

from llama import reference
from llama.kernels import flash_attention as module
from llama.kernels import launch, tiles
from llama.kernels.flash_attention import flash_attention

memory = guard_memory()
BLOCK = 16 if launch.INTERPRETED else 128  # the largest block of queries or keys
head_dims = st.sampled_from([1, 3, 8, 8, 16, 16, 24, 40, 64, 80, 100, 128])
lengths_in_tokens = st.integers(0, 40) | st.sampled_from([15, 16, 17, 31, 32, 33, 47, 48, 49, 65])


@st.composite
def attentions(draw, dtype=None, rows=(0, 1, 1, 2, 3)):
    """(q, k, v): MHA, GQA and MQA, sharp and flat softmaxes, T and S independent and possibly 0."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    B, K, G = draw(st.sampled_from(rows)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T, S, D = draw(lengths_in_tokens), draw(lengths_in_tokens), draw(head_dims)
    rng = np.random.default_rng(draw(SEEDS))
    q = normal(rng, (B, K * G, T, D), dtype, draw(st.sampled_from([1e-3, 1.0, 1e2])))
    k = normal(rng, (B, K, S, D), dtype)
    return q, k, normal(rng, (B, K, S, D), dtype, draw(st.sampled_from([1e-3, 1.0, 1e2])))


@st.composite
def borders(draw, T):
    """cu_seqlens: texts of any length, including 0 and 1, with boundaries at and next to those of blocks."""
    near = [b + d for b in range(0, T + 1, 16) for d in (-1, 0, 1) if 0 <= b + d <= T]
    inner = draw(st.lists(st.integers(0, T) | st.sampled_from(near), max_size=5))
    return np.array([0, *sorted(inner), T])


@st.composite
def sights(draw, q, k):
    """Keyword arguments that determine visibility, in any allowed combination."""
    (B, _, T, _), S = q.shape, k.shape[2]
    per_row = st.lists(st.integers(0, S), min_size=B, max_size=B)
    args = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        args["offset"] = draw(st.integers(-T - 3, S + 3) | st.sampled_from([0, S - T, 1 - T, S]))
    if draw(st.booleans()):
        args["starts"] = draw(per_row)
    if draw(st.booleans()):
        args["lengths"] = draw(per_row)
    packing = draw(st.sampled_from([None, None, "cu_seqlens", "first_keys"]))
    if packing == "cu_seqlens":
        args["cu_seqlens"] = draw(borders(T))
    elif packing == "first_keys":
        rng = np.random.default_rng(draw(SEEDS))
        args["first_keys"] = rng.integers(-2, draw(st.integers(0, S + 20)) + 1, (B, T))
        if draw(st.booleans()):
            args["first_keys"].sort(axis=1)
    if draw(st.sampled_from([False, False, True])):
        rng = np.random.default_rng(draw(SEEDS))
        args["mask"] = rng.random((B, S)) < draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    return args


def for_kernel(args, draw=None):
    """Convert args to tensors; with `draw`, of any dtype and layout."""
    out = {}
    for name, value in args.items():
        if name in ("causal", "offset"):
            out[name] = value
            continue
        dtypes = [torch.bool, torch.int64, torch.uint8] if name == "mask" else [torch.int32, torch.int64]
        table = integers(value, draw(st.sampled_from(dtypes)) if draw else dtypes[0])
        out[name] = laid_out(table, draw(layouts)) if draw else table
    return out


def for_reference(args):
    return {name: np.asarray(x, int) if isinstance(x, list) else x for name, x in args.items()}


def first_keys_of(args, B, T):
    if "cu_seqlens" in args:
        return np.repeat(args["cu_seqlens"][:-1], np.diff(args["cu_seqlens"]))[None].repeat(B, 0)
    return args.get("first_keys", np.zeros((B, T), int))


def visible(args, B, T, S):
    """(B, T, S): the definition of visibility, written out."""
    key, place = np.arange(S), np.arange(T)[:, None] + args.get("offset", S - T)
    seen = key >= np.asarray(args.get("starts", np.zeros(B)))[:, None, None]
    seen = seen & (key < np.asarray(args.get("lengths", np.full(B, S)))[:, None, None])
    seen = seen & (key >= first_keys_of(args, B, T)[:, :, None])
    if "mask" in args:
        seen = seen & (args["mask"] != 0)[:, None]
    return seen & (key <= place) if args.get("causal", True) else seen


def plain_attention(q, k, v, seen):
    """transformers' eager attention, with its softmax in float32; zeros where a query sees nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = torch.tensor(seen, device=q.device)[:, None]
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.float().softmax(-1).nan_to_num(0).to(q.dtype) @ v


def assert_right(ours, lse, q, k, v, args):
    """Check `ours` and `lse`. A score's rounding in float32 gives its weight an error proportional to the score."""
    B, _, T, D = q.shape
    truth, lse_truth = reference.flash_attention(*map(exact, (q, k, v)), **for_reference(args), return_lse=True)
    plain = plain_attention(q, k, v, visible(args, B, T, k.shape[2]))
    largest_q, largest_k, largest_v = (float(x.abs().max()) if x.numel() else 0.0 for x in (q, k, v))
    score = 1 + largest_q * largest_k * D**0.5  # Cauchy-Schwarz: at least the largest score
    assert_no_worse(ours, plain, truth, terms=largest_v, float32_terms=4 * score * largest_v)
    assert ours.transpose(1, 2).is_contiguous()
    if lse is None:
        return
    assert lse.dtype == torch.float32
    blind = np.isneginf(lse_truth)
    assert (blind == (exact(lse) == -np.inf)).all()
    off = np.abs(np.where(blind, 0, exact(lse)) - np.where(blind, 0, lse_truth))
    assert (off <= 4 * ulps(torch.float32, score + np.log(k.shape[2] + 1))).all()


def spoiled(k, v, args, T, value):
    """Return k and v with garbage where no query of the row can look: before its start and every first key, and from
    its length or the last query's position on. Masked keys are large but finite: they are what a model computed."""
    B, S = k.shape[0], k.shape[2]
    k, v, key = k.clone(), v.clone(), np.arange(S)
    first = np.maximum(args.get("starts", [0] * B), first_keys_of(args, B, T).min(axis=1, initial=S))
    last = np.asarray(args.get("lengths", [S] * B))
    if args.get("causal", True):
        last = np.minimum(last, args.get("offset", S - T) + T)
    unseen = (key < first[:, None]) | (key >= last[:, None])
    for b in range(B):
        if "mask" in args:
            k[b, :, args["mask"][b] == 0] = v[b, :, args["mask"][b] == 0] = 1e4
        k[b, :, unseen[b]] = v[b, :, unseen[b]] = value
    return k, v


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter shows what is read")
@pytest.mark.parametrize("hole", [None, 3, 60])
def test_a_block_of_queries_reads_no_mask_beyond_the_last_key_that_it_sees(hole, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    S, seen, load = 64, [], InterpreterBuilder.create_masked_load
    q, k = (normal(np.random.default_rng(0), (1, 1, n, 16), torch.float32) for n in (16, S))
    mask = torch.ones(1, S, dtype=torch.uint8)
    if hole is not None:
        mask[0, hole] = 0
    start = mask.data_ptr()

    def watched(self, pointers, wanted, *rest):
        read = pointers.data[wanted.data].astype(np.int64) - start
        seen.extend(read[(read >= 0) & (read < S)])
        return load(self, pointers, wanted, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    out = flash_attention(q, k, k, offset=10, mask=mask)
    assert set(seen) == set(range(26))
    assert_right(out, None, q, k, k, {"offset": 10, "mask": exact(mask)})


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
@examples(90)
def test_flash_attention_is_as_close_to_the_reference_as_eager_attention(dtype, data):
    q, k, v = data.draw(attentions(dtype))
    args = data.draw(sights(q, k))
    garbage = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    given_k, given_v = spoiled(k, v, args, q.shape[2], garbage)
    layout = data.draw(st.lists(layouts, min_size=3, max_size=3))
    given_q, given_k, given_v = map(laid_out, (q, given_k, given_v), layout)
    return_lse = data.draw(st.booleans())
    out = flash_attention(given_q, given_k, given_v, **for_kernel(args, data.draw), return_lse=return_lse)
    ours, lse = out if return_lse else (out, None)
    assert_right(ours, lse, q, k, v, args)


@pytest.mark.parametrize("moved", ["offset", "starts", "lengths", "border"])
def test_every_place_of_a_bound_against_the_borders_of_blocks(moved):
    rng, T, S = np.random.default_rng(0), 18, 52
    q, (k, v) = normal(rng, (1, 1, T, 8), torch.float32), (normal(rng, (1, 1, S, 8), torch.float32) for _ in range(2))
    for at in range(36):
        args = {
            "offset": {"offset": at},
            "starts": {"starts": [at], "offset": 30},
            "lengths": {"lengths": [at], "offset": 20},
            "border": {"first_keys": np.where(np.arange(T) < 9, 0, at)[None], "offset": 30},
        }[moved]
        given_k, given_v = spoiled(k, v, args, T, float("nan"))
        assert_right(*flash_attention(q, given_k, given_v, **for_kernel(args), return_lse=True), q, k, v, args)


@pytest.mark.parametrize("head_dim", [160, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_heads(dtype, head_dim):
    rng = np.random.default_rng(head_dim)
    q, (k, v) = normal(rng, (1, 2, 20, head_dim), dtype), (normal(rng, (1, 1, 20, head_dim), dtype) for _ in range(2))
    assert_right(*flash_attention(q, k, v, return_lse=True), q, k, v, {})


@given(attentions(rows=(1, 2)), st.data(), st.lists(st.sampled_from(LAYOUTS[1:]), min_size=3, max_size=3))
@examples(25)
def test_layout_changes_no_bit(drawn, data, layout):
    args = for_kernel(data.draw(sights(*drawn[:2])))
    whole, lse = flash_attention(*drawn, **args, return_lse=True)
    other, other_lse = flash_attention(*map(laid_out, drawn, layout), **args, return_lse=True)
    assert same_bits(other, whole)
    assert same_bits(other_lse, lse)


def test_views_of_a_projection_and_expanded_rows():
    B, T, H, K, D = 2, 19, 4, 2, 8
    qkv = normal(np.random.default_rng(0), (B, T, (H + 2 * K) * D), torch.float32)
    q, k, v = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in qkv.split([H * D, K * D, K * D], dim=-1))
    expected = flash_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert same_bits(flash_attention(q, k, v), expected)
    one = flash_attention(q, k[:1].repeat(B, 1, 1, 1), v[:1].repeat(B, 1, 1, 1))
    assert same_bits(flash_attention(q, k[:1].expand(B, -1, -1, -1), v[:1].expand(B, -1, -1, -1)), one)
    heads = flash_attention(q[:1, :1].expand(B, H, T, D), k, v, lengths=integers([9]).expand(B))
    assert same_bits(heads, flash_attention(q[:1, :1].repeat(B, H, 1, 1), k, v, lengths=integers([9, 9])))


@given(attentions(rows=(2, 3)), st.data())
@examples(25)
def test_a_rows_bits_do_not_depend_on_its_batch(drawn, data):
    args = data.draw(sights(*drawn[:2]))
    args = {name: np.asarray(x) if isinstance(x, list) else x for name, x in args.items()}
    whole, lse = flash_attention(*drawn, **for_kernel(args), return_lse=True)
    per_row = ("starts", "lengths", "first_keys", "mask")
    for b in range(len(whole)):
        row = slice(b, b + 1)
        mine = for_kernel({name: x[row] if name in per_row else x for name, x in args.items()})
        alone, alone_lse = flash_attention(*(x[row] for x in drawn), **mine, return_lse=True)
        assert same_bits(alone, whole[row])
        assert same_bits(alone_lse, lse[row])


def assert_equal_but_for_rounding(a, b, v):
    """Assert that a and b differ by at most two ulps of the largest value."""
    assert_no_worse(a, a, exact(b), terms=float(v.abs().max()) if v.numel() else 0.0, factor=0.0)


@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 50), min_size=1, max_size=3), st.booleans(), SEEDS)
@examples(25)
def test_padding_on_either_side_changes_nothing(dtype, real, left, seed):
    rng, T = np.random.default_rng(seed), max(real) + 3
    q, k, v = normal(rng, (len(real), 2, T, 8), dtype), *(normal(rng, (len(real), 1, T, 8), dtype) for _ in range(2))
    where = [slice(T - n, T) if left else slice(0, n) for n in real]
    bounds = {"starts": [s.start for s in where], "lengths": [s.stop for s in where]}
    mask = integers([[s.start <= t < s.stop for t in range(T)] for s in where])
    masked = flash_attention(q, k, v, mask=mask)
    for b, tokens in enumerate(where):
        padding = np.setdiff1d(np.arange(T), np.arange(T)[tokens])
        k[b, :, padding], v[b, :, padding] = float("nan"), float("inf")
    padded = flash_attention(q, k, v, **for_kernel(bounds))
    for b, tokens in enumerate(where):
        alone = flash_attention(*(x[b : b + 1, :, tokens] for x in (q, k, v)))
        assert_equal_but_for_rounding(padded[b : b + 1, :, tokens], alone, v[b : b + 1, :, tokens])
        assert_equal_but_for_rounding(masked[b : b + 1, :, tokens], alone, v[b : b + 1, :, tokens])
        assert (padded[b, :, : tokens.start] == 0).all()
        assert (masked[b, :, : tokens.start] == 0).all()


@given(st.sampled_from(DTYPES), st.integers(1, 60), st.integers(0, 40), st.data(), SEEDS)
@examples(25)
def test_chunks_of_a_prompt_equal_the_whole(dtype, T, room, data, seed):
    """Each chunk reads a cache with spare room, whose unwritten slots hold garbage."""
    rng = np.random.default_rng(seed)
    q, k, v = normal(rng, (2, 2, T, 8), dtype), *(normal(rng, (2, 1, T, 8), dtype) for _ in range(2))
    whole = flash_attention(q, k, v)
    k_cache, v_cache = (k.new_full((2, 1, T + room, 8), float("nan")) for _ in range(2))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, T), max_size=3))), T]
    for first, last in pairwise(cuts):
        k_cache[:, :, first:last], v_cache[:, :, first:last] = k[:, :, first:last], v[:, :, first:last]
        chunk = flash_attention(q[:, :, first:last], k_cache, v_cache, offset=first)
        assert_equal_but_for_rounding(chunk, whole[:, :, first:last], v)


@given(attentions(rows=(1, 2)), st.booleans(), st.data())
@examples(30)
def test_outputs_over_two_halves_of_the_keys_combine_to_the_whole(drawn, causal, data):
    """o = w o₁ + (1 - w) o₂, w = exp(lse₁ - lse): as ring attention and split caches do."""
    q, k, v = drawn
    T, S = q.shape[2], k.shape[2]
    cut, offset = data.draw(st.integers(0, S)), data.draw(st.integers(0, max(S - T, 0)))
    first, second = (
        flash_attention(q, k[:, :, keys], v[:, :, keys], causal, offset=offset - at, return_lse=True)
        for keys, at in ((slice(0, cut), 0), (slice(cut, S), cut))
    )
    lses = torch.stack([first[1], second[1]]).double()
    total = lses.logsumexp(0)
    weights = (lses - total.nan_to_num(neginf=0)).exp()[..., None]
    assert_right(
        (weights[0] * first[0] + weights[1] * second[0]).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2),
        total.float(), q, k, v, {"causal": causal, "offset": offset},
    )  # fmt: skip


@given(st.integers(1, 60).flatmap(lambda T: st.tuples(st.just(T), borders(T))), st.integers(0, 2), SEEDS)
@examples(15)
def test_packed_texts_equal_each_text_alone(packed, spoil, seed):
    """And a garbage text affects no block of queries in which it has no token."""
    T, cu_seqlens = packed
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, (1, heads, T, 8), torch.float32) for heads in (2, 1, 1))
    out = flash_attention(q, k, v, cu_seqlens=integers(cu_seqlens, torch.int32))
    texts = [slice(a, b) for a, b in pairwise(cu_seqlens)]
    for text in texts:
        alone = flash_attention(*(x[:, :, text] for x in (q, k, v)))
        assert_equal_but_for_rounding(out[:, :, text], alone, v)
    bad = texts[spoil % len(texts)]
    k[:, :, bad], v[:, :, bad] = float("nan"), float("nan")
    spoiled_out = flash_attention(q, k, v, cu_seqlens=integers(cu_seqlens))
    block = np.arange(T) // BLOCK
    far = ~np.isin(block, block[bad])
    assert same_bits(spoiled_out[:, :, far], out[:, :, far])


def with_descriptors(family, head_dim, dtype, tokens, tma, both):
    return tiles.Attention(16, 16, 4, 1, tma)


def spied(made):
    class Spy(module.TensorDescriptor):
        def __post_init__(self):
            made.append(self)
            super().__post_init__()

    return Spy


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
@examples(35)
def test_keys_by_descriptors_give_the_bits_of_keys_by_addresses(dtype, data):
    """As on Hopper. Hidden garbage is loaded along with every block and must not spread."""
    q, k, v = data.draw(attentions(dtype, rows=(1, 2)))
    args = data.draw(sights(q, k))
    given_k, given_v = spoiled(k, v, args, q.shape[2], data.draw(st.sampled_from([float("nan"), float("inf")])))
    given_k, given_v = (laid_out(x, data.draw(layouts)) for x in (given_k, given_v))
    tensors = for_kernel(args)
    plain, plain_lse = flash_attention(q, given_k, given_v, **tensors, return_lse=True)
    made = []
    with (
        mock.patch.object(tiles, "prefill", with_descriptors),
        mock.patch.object(module, "TensorDescriptor", spied(made)),
    ):
        ours, lse = flash_attention(q, given_k, given_v, **tensors, return_lse=True)
    if not made and not launch.INTERPRETED:
        return
    assert same_bits(ours, plain)
    assert same_bits(lse, plain_lse)


@pytest.mark.parametrize(
    ("build", "addressable"),
    [
        (lambda x: x, True),
        (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),  # (B, S, K, D) in memory
        (lambda x: laid_out(x, "sliced")[..., :0], False),
        (lambda x: x.repeat(1, 1, 2, 1)[:, :, :33], True),  # a cache with spare room
        (lambda x: laid_out(x, "shifted"), False),  # not 16-byte aligned
        (lambda x: laid_out(x, "every other"), False),  # last axis not contiguous
        (lambda x: laid_out(x, "reversed axes"), False),
        (lambda x: x[:1].expand(2, -1, -1, -1), False),  # a stride of 0
        (lambda x: x[..., :4].repeat(1, 1, 1, 2)[..., :7], True),  # 7 of 8, with aligned rows
        (lambda x: x[..., :7].contiguous(), False),
        (lambda x: x[:1, :1].as_strided((1, 1, 33, 8), (3, 5, 8, 1)), True),  # strides of axes of length 1 are free
    ],
)
def test_descriptors_are_used_where_they_can_address_the_keys(build, addressable):
    rng = np.random.default_rng(0)
    k, v = (build(normal(rng, (2, 2, 33, 8), torch.float16)) for _ in range(2))
    if not k.numel():
        assert not module._has_descriptors(k)
        return
    q = normal(rng, (len(k), 2, 20, k.shape[-1]), torch.float16)
    made = []
    with (
        mock.patch.object(tiles, "prefill", with_descriptors),
        mock.patch.object(module, "TensorDescriptor", spied(made)),
    ):
        out = flash_attention(q, k, v)
    assert bool(made) == addressable
    assert_right(out, None, q, k, v, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_overflow_nothing(dtype):
    q = k = torch.full((1, 1, 20, 16), 1e3, device=DEVICE).to(dtype)
    v = normal(np.random.default_rng(0), (1, 1, 20, 16), dtype)
    out = flash_attention(q, k, v)
    assert_no_worse(out, out, np.cumsum(exact(v), 2) / np.arange(1, 21)[:, None], terms=float(v.abs().max()), factor=0)
    assert flash_attention(-q, k, v).isfinite().all()


def test_arguments_that_do_not_fit_are_named():
    q, k = torch.ones(2, 4, 3, 8, device=DEVICE), torch.ones(2, 2, 5, 8, device=DEVICE)
    table = integers([[0, 0, 0]] * 2)
    for expected, args in [
        (r"starts must be \(2,\) integers, got \(3,\)", {"starts": table[0]}),
        (r"lengths must be \(2,\) integers", {"lengths": torch.ones(2, device=DEVICE)}),
        (r"first_keys must be \(2, 3\) integers, got \(1, 3\)", {"first_keys": table[:1]}),
        (r"mask must be \(2, 5\) integers, got \(2, 3\)", {"mask": table}),
        ("pass either cu_seqlens or first_keys, not both", {"first_keys": table, "cu_seqlens": table[0]}),
    ]:
        with pytest.raises(ValueError, match=f"flash_attention: {expected}"):
            flash_attention(q, k, k, **args)
    for expected, tensors in [
        ("q must be .* k and v", (q[0], k, k)),
        (r"got .*\(2, 2, 4, 8\)", (q, k, k[:, :, :4])),
        ("the same dtype, got torch.float32, torch.float16, torch.float16", (q, k.half(), k.half())),
        ("one head_dim of at most 256, got 8 and 4", (q, k[..., :4], k[..., :4])),
        ("one head_dim of at most 256, got 300", (q.repeat(1, 1, 1, 38)[..., :300],) * 3),
        ("3 query heads are not a multiple of 2", (q[:, :3], k, k)),
        ("q has 2 rows, but k and v have 1", (q, k[:1], k[:1])),
    ]:
        with pytest.raises(ValueError, match=f"flash_attention: .*{expected}"):
            flash_attention(*tensors)
