"""Norms, activations, SwiGLU and cross-entropy against PyTorch and transformers."""

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from transformers.activations import ACT2FN

from llama import reference

widths = st.integers(1, 70)


@given(SEEDS, st.lists(st.integers(1, 5), max_size=3), widths, st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm_equals_pytorch(seed, batch, width, scale):
    rng = np.random.default_rng(seed)
    x, weight = scale * rng.normal(size=(*batch, width)), rng.normal(size=width)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (width,), torch.tensor(weight), 1e-5).numpy()
    np.testing.assert_allclose(reference.rms_norm(x, weight, 1e-5), expected, rtol=1e-12)
    residual = rng.normal(size=x.shape)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(normed, reference.rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_equal_transformers(name, dtype):
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, 1e4, 0.0]]).astype(dtype)
    ours = reference.ACTIVATIONS[name](x)
    assert ours.dtype == dtype
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    # gelu_fast rounds its sqrt(2/pi) to 0.79788456; float32 functions differ by a few ulps of their arguments
    tolerance = 2e-6 if dtype == np.float32 else 1e-8 if name == "gelu_fast" else 1e-12
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


@given(SEEDS, st.integers(1, 5), widths)
def test_swiglu_equals_pytorch(seed, rows, width):
    gate, up = np.random.default_rng(seed).normal(scale=3, size=(2, rows, width))
    expected = (torch.nn.functional.silu(torch.tensor(gate)) * torch.tensor(up)).numpy()
    np.testing.assert_allclose(reference.swiglu(gate, up), expected, rtol=1e-12)


@given(SEEDS, st.integers(1, 5), widths)
def test_cross_entropy_equals_pytorch(seed, rows, width):
    rng = np.random.default_rng(seed)
    hidden, weight = rng.normal(size=(rows, 4)), rng.normal(scale=3, size=(width, 4))
    labels = np.where(rng.random(rows) < 0.3, -100, rng.integers(0, width, rows))
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert reference.cross_entropy(logits, labels) == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)
    assert reference.linear_cross_entropy(hidden, weight, labels) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_labels_outside_the_vocabulary_are_named():
    for label in (3, -1):
        with pytest.raises(ValueError, match=rf"0 \.\.\. 2, got {label}"):
            reference.cross_entropy(np.zeros((2, 3)), np.array([0, label]))
        with pytest.raises(ValueError, match=rf"0 \.\.\. 2, got {label}"):
            reference.cross_entropy_backward(np.zeros((2, 3)), np.array([0, label]))


def test_any_label_may_be_the_ignored_one():
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4))
    logits, labels = hidden @ weight.T, np.array([[0, 1, 2], [3, 0, 4]])
    usual = np.where(labels == 0, -100, labels)
    assert reference.cross_entropy(logits, labels, 0) == reference.cross_entropy(logits, usual)
    assert reference.causal_lm_loss(logits, labels, 0) == reference.causal_lm_loss(logits, usual)
    assert reference.linear_cross_entropy(hidden, weight, labels, 0) == reference.cross_entropy(logits, usual)
    flat = reference.cross_entropy_backward(logits.reshape(6, 5), usual.reshape(6))
    np.testing.assert_array_equal(reference.cross_entropy_backward(logits, labels, 0), flat.reshape(2, 3, 5))


def test_large_logits_do_not_overflow():
    assert reference.cross_entropy(np.array([[1e4, 0.0]]), np.array([0])) == 0


def test_the_shapes_in_annotations_are_executed():
    with pytest.raises(jaxtyping.TypeCheckError):
        reference.rms_norm(np.ones((2, 3)), np.ones(4), 1e-5)
    with pytest.raises(jaxtyping.TypeCheckError):  # mismatched batch sizes would silently broadcast
        reference.attention(
            np.ones((2, 1, 1, 4)), np.ones((1, 1, 1, 4)), np.ones((1, 1, 1, 4)), np.ones((1, 1, 1), bool)
        )
