"""Every backward pass against torch's autograd in float64."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from test_reference_attention import attentions, visible_between

from llama import reference
from llama.reference import Config


def autograd(function, dy, *inputs):
    """The gradients of sum(function(*inputs) · dy) with respect to each input."""
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    outputs = function(*tensors)
    outputs, dy = (outputs, dy) if isinstance(outputs, tuple) else ((outputs,), (dy,))
    total = sum((y * torch.tensor(d)).sum() for y, d in zip(outputs, dy, strict=True))
    return [grad.numpy() for grad in torch.autograd.grad(total, tensors)]


def assert_close(ours, theirs):
    for mine, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, their, rtol=1e-10, atol=1e-10)


@given(SEEDS, st.lists(st.integers(1, 4), max_size=2), st.integers(1, 40), st.sampled_from([1e-2, 1.0, 30.0]))
def test_rms_norm(seed, batch, width, scale):
    rng = np.random.default_rng(seed)
    dy, x = rng.normal(size=(2, *batch, width))
    weight = rng.normal(size=width)
    expected = autograd(lambda x, w: torch.nn.functional.rms_norm(x, (width,), w, 1e-5), dy, scale * x, weight)
    assert_close(reference.rms_norm_backward(dy, scale * x, weight, 1e-5), expected)


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.sampled_from([2, 6, 16]), st.booleans())
def test_apply_rope(seed, heads, kv_heads, tokens, D, equal_halves):
    rng = np.random.default_rng(seed)
    q, dq = rng.normal(size=(2, 2, heads, tokens, D))
    k, dk = rng.normal(size=(2, 2, kv_heads, tokens, D))
    cos, sin = rng.normal(size=(2, 1, tokens, D))
    if equal_halves:
        cos, sin = reference.rope_tables(Config(hidden_size=D, num_attention_heads=1), np.arange(tokens)[None])

    def rope(q, k):
        c, s = torch.tensor(cos)[:, None], torch.tensor(sin)[:, None]
        turn = lambda x: x * c + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * s  # noqa: E731
        return turn(q), turn(k)

    ours = reference.apply_rope_backward(dq, dk, cos, sin)
    assert_close(ours, autograd(rope, (dq, dk), q, k))
    if equal_halves:
        assert_close(ours, reference.apply_rope(dq, dk, cos, -sin))


@given(SEEDS, st.integers(1, 4), st.integers(1, 40))
def test_swiglu(seed, rows, width):
    dy, gate, up = np.random.default_rng(seed).normal(scale=3, size=(3, rows, width))
    expected = autograd(lambda g, u: torch.nn.functional.silu(g) * u, dy, gate, up)
    assert_close(reference.swiglu_backward(dy, gate, up), expected)


@given(attentions(), st.booleans())
def test_attention(drawn, causal):
    q, k, v, starts, lengths = drawn
    visible = visible_between(q, k, starts, lengths, causal)
    dout = np.random.default_rng(0).normal(size=q.shape)

    def attention(q, k, v):
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~torch.tensor(visible)[:, None], -1e300)
        seen = torch.tensor(visible.any(-1))[:, None, :, None]  # queries without keys give zeros
        return torch.where(seen, scores.softmax(-1), 0) @ v.repeat_interleave(group, 1)

    assert_close(reference.attention_backward(dout, q, k, v, visible), autograd(attention, dout, q, k, v))


@given(SEEDS, st.integers(1, 6), st.integers(1, 40))
def test_cross_entropy(seed, rows, width):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(rows, width))
    labels = np.where(rng.random(rows) < 0.3, -100, rng.integers(0, width, rows))
    labels[0] = rng.integers(width)  # autograd gives NaN if every label is ignored
    cross_entropy = lambda x: torch.nn.functional.cross_entropy(x, torch.tensor(labels))  # noqa: E731
    assert_close([reference.cross_entropy_backward(logits, labels)], autograd(cross_entropy, np.array(1.0), logits))


def test_cross_entropy_of_nothing_has_no_gradient():
    dlogits = reference.cross_entropy_backward(np.ones((2, 3)), np.full(2, -100))
    np.testing.assert_array_equal(dlogits, np.zeros((2, 3)))


def test_float32_stays_float32():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
    cos, sin = reference.rope_tables(Config(hidden_size=4, num_attention_heads=1), np.arange(3)[None])
    results = (
        *reference.rms_norm_backward(x, x, x[0, 0, 0], 1e-5),
        *reference.apply_rope_backward(x, x, cos, sin),
        *reference.swiglu_backward(x, x, x),
        *reference.attention_backward(x, x, x, x, reference.causal_visibility(3, 3)),
        reference.cross_entropy_backward(x, np.ones((1, 2, 3), int)),
        *reference.flash_attention(x, x, x, return_lse=True),
    )
    assert {result.dtype for result in results} == {np.dtype(np.float32)}
