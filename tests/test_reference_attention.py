"""Plain, blockwise and single-token attention, against PyTorch and against each other."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from llama import reference


@st.composite
def attentions(draw, square=False):
    """(q, k, v, starts, lengths) with T <= S; each row sees the keys starts <= s < lengths, possibly none."""
    rows, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    S, D = draw(st.integers(1, 40)), draw(st.sampled_from([2, 5, 8, 16]))
    T = S if square else draw(st.integers(1, S))
    rng = np.random.default_rng(draw(SEEDS))
    q = rng.normal(scale=2, size=(rows, kv_heads * group, T, D))
    k, v = rng.normal(scale=2, size=(2, rows, kv_heads, S, D))
    starts = np.array([draw(st.integers(0, S)) for _ in range(rows)])
    lengths = np.array([draw(st.integers(0, S)) for _ in range(rows)])
    return q, k, v, starts, lengths


def visible_between(q, k, starts, lengths, causal=True, offset=None):
    """The equivalent boolean mask of shape (rows, T, S): which query sees which key."""
    T, S = q.shape[2], k.shape[2]
    keys, places = np.arange(S), np.arange(T)[:, None] + (S - T if offset is None else offset)
    inside = (keys >= starts[:, None, None]) & (keys < lengths[:, None, None])
    return inside & (keys <= places if causal else np.ones((T, S), bool))


def pytorch_attention(q, k, v, visible):
    out = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.tensor, (q, k, v, visible[:, None])), enable_gqa=True
    ).numpy()
    return np.where(visible.any(axis=-1)[:, None, :, None], out, 0)  # our convention: queries without keys give zeros


@given(attentions(), st.booleans())
def test_attention_equals_pytorch(drawn, causal):
    q, k, v, starts, lengths = drawn
    visible = visible_between(q, k, starts, lengths, causal)
    out = reference.attention(q, k, v, visible)
    np.testing.assert_allclose(out, pytorch_attention(q, k, v, visible), atol=1e-12)
    weights = reference.attention_weights(q, k, visible)
    np.testing.assert_allclose(weights.sum(axis=-1), np.broadcast_to(visible.any(-1)[:, None], weights.shape[:3]))
    assert (weights[~np.broadcast_to(visible[:, None], weights.shape)] == 0).all()


def test_visibility_is_the_picture_in_the_docstring():
    picture = [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    np.testing.assert_array_equal(reference.causal_visibility(3, 4, np.array([[0, 1, 1, 1]]))[0], picture)


@given(attentions(), st.booleans(), st.sampled_from([1, 3, 16, 64]), st.sampled_from([1, 4, 64]), st.data())
@settings(max_examples=150)
def test_flash_attention_equals_attention(drawn, causal, block_q, block_k, data):
    q, k, v, starts, lengths = drawn
    T, S = q.shape[2], k.shape[2]
    offset = data.draw(st.one_of(st.none(), st.integers(0, S - T)))
    visible = visible_between(q, k, starts, lengths, causal, offset)
    out, lse = reference.flash_attention(
        q, k, v, causal, starts, lengths, offset, return_lse=True, block_q=block_q, block_k=block_k
    )
    np.testing.assert_allclose(out, reference.attention(q, k, v, visible), atol=1e-12)
    scores = np.where(visible[:, None], q @ np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(-1, -2), -np.inf)
    expected = torch.logsumexp(torch.tensor(scores) * q.shape[-1] ** -0.5, dim=-1).numpy()
    np.testing.assert_allclose(lse, expected, atol=1e-12)
    assert out.dtype == lse.dtype == np.float64


@given(attentions(square=True))
def test_flash_attention_defaults_to_plain_causal_attention(drawn):
    q, k, v, _, _ = drawn
    expected = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.tensor, (q, k, v)), is_causal=True, enable_gqa=True
    ).numpy()
    np.testing.assert_allclose(reference.flash_attention(q, k, v), expected, atol=1e-12)


@given(attentions())
def test_decode_attention_sees_each_rows_filled_places(drawn):
    q, k, v, _, lengths = drawn
    q = q[:, :, :1]
    out = reference.decode_attention(q, k, v, lengths)
    for row, length in enumerate(lengths):
        if length:
            alone = reference.attention(
                q[[row]], k[[row], :, :length], v[[row], :, :length], np.ones((1, 1, length), bool)
            )
            np.testing.assert_allclose(out[row], alone[0], atol=1e-12)
        else:
            assert (out[row] == 0).all()


def test_large_scores_do_not_overflow():
    q = k = v = np.full((1, 1, 4, 8), 1e3, np.float32)
    for out in (
        reference.attention(q, k, v, reference.causal_visibility(4, 4)),
        reference.flash_attention(q, k, v, block_k=2),
    ):
        np.testing.assert_allclose(out, v)
