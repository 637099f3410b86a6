"""RoPE: transformers' frequencies for every type, both pairings, and the properties of a rotation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import transformers_config
from strategies import SEEDS, rope_parameters
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama import reference
from llama.reference import Config, rope_frequencies, rope_tables


@st.composite
def rope_configs(draw, kinds=None):
    head_dim, positions = draw(st.sampled_from([4, 6, 16, 64, 128])), draw(st.sampled_from([16, 64, 4096]))
    return {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "rope_parameters": draw(rope_parameters(head_dim, positions, kinds)),
    }


@given(rope_configs(["linear", "dynamic", "yarn", "longrope", "llama3"]), st.integers(1, 10_000))
@settings(max_examples=300)
def test_frequencies_equal_transformers(fields, length):
    theirs = transformers_config(fields)
    expected, expected_scale = ROPE_INIT_FUNCTIONS[fields["rope_parameters"]["rope_type"]](theirs, seq_len=length)
    frequencies, scale = rope_frequencies(Config.from_dict(fields), length)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@given(rope_configs(), st.integers(0, 200), st.integers(1, 40))
def test_tables_equal_transformers(fields, start, count):
    import torch

    position_ids = np.arange(start, start + count)[None]
    embedding = LlamaRotaryEmbedding(transformers_config(fields))
    expected = [t.numpy() for t in embedding(torch.zeros(1), torch.tensor(position_ids))]
    for ours, theirs in zip(rope_tables(Config.from_dict(fields), position_ids), expected, strict=True):
        # Frequencies agree to 1e-6 (radians per position), and positions stay below 240.
        np.testing.assert_allclose(ours, theirs, atol=5e-4)


# Recorded from transformers 4.46.3 and 5.23.0, which agree (yarn with an original length: 5.23.0 alone).
GOLDEN = {
    "linear": ({"factor": 4.0}, 0, [0.25, 0.079056941, 0.025, 0.0079056947], 1.0),
    "dynamic at 65": ({"rope_type": "dynamic", "factor": 2.0}, 65, [1.0, 0.314840704], 1.0),
    "dynamic at 100": ({"rope_type": "dynamic", "factor": 2.0}, 100, [1.0, 0.283945143], 1.0),
    "yarn": ({"factor": 4.0}, 0, [1.0, 0.23717082, 0.05, 0.0079056947], 1.1386294),
    "yarn from 16": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        0,
        [1.0, 0.079056941, 0.025],
        1.1386294,
    ),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        0,
        [1.0, 0.095839977, 0.0125, 0.0039528473, 0.00125],
        1.0,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_recorded_from_transformers(name):
    rope, length, expected, scale = GOLDEN[name]
    rope = {"rope_type": name.split()[0], "rope_theta": 1e4} | rope
    config = Config(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope)
    frequencies, factor = rope_frequencies(config, length)
    np.testing.assert_allclose(frequencies[: len(expected)], expected, rtol=1e-6)
    assert factor == pytest.approx(scale)


def drawn_heads(seed, heads, kv_heads, tokens, head_dim):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, heads, tokens, head_dim)), rng.normal(size=(2, kv_heads, tokens, head_dim))


shapes = st.tuples(SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.sampled_from([2, 4, 6, 16]))


@given(shapes)
def test_both_pairings_are_one_rotation_after_permuting(shape):
    q, k = drawn_heads(*shape)
    D = q.shape[-1]
    cos, sin = rope_tables(Config(hidden_size=D, num_attention_heads=1), np.arange(q.shape[2])[None])

    def to_pairs(x):  # permutes the last axis of activations like the rows of a one-head projection
        return reference.interleave(x.T, 1).T

    halves = reference.apply_rope(q, k, cos, sin)
    pairs = reference.apply_rope_interleaved(to_pairs(q), to_pairs(k), cos, sin)
    for half, pair in zip(halves, pairs, strict=True):
        np.testing.assert_allclose(to_pairs(half), pair, atol=1e-12)


@given(SEEDS, st.integers(1, 5), st.sampled_from([2, 4, 6, 16]), st.booleans())
def test_deinterleave_undoes_interleave(seed, heads, head_dim, bias):
    weight = np.random.default_rng(seed).normal(size=(heads * head_dim, *([] if bias else [3])))
    there = reference.interleave(weight, heads)
    np.testing.assert_array_equal(reference.deinterleave(there, heads), weight)
    # Within a head, row 2i of the paired layout is row i of the half layout, and row 2i + 1 is row i + D/2.
    head = weight.reshape(heads, head_dim, -1)
    np.testing.assert_array_equal(there.reshape(heads, head_dim, -1)[:, 0::2], head[:, : head_dim // 2])
    np.testing.assert_array_equal(there.reshape(heads, head_dim, -1)[:, 1::2], head[:, head_dim // 2 :])


@given(shapes, st.integers(0, 1000))
def test_scores_depend_on_relative_position_alone(shape, shift):
    q, k = drawn_heads(*shape)
    k = k[:, :1]
    config = Config(hidden_size=q.shape[-1], num_attention_heads=1)
    position_ids = np.arange(q.shape[2])[None]

    def scores(by):
        q_, k_ = reference.apply_rope(q, k, *rope_tables(config, position_ids + by))
        return q_ @ k_.swapaxes(-1, -2)

    # Angles up to 1000 in float32 are rounded by up to 3e-5; q·k sums up to 16 products.
    np.testing.assert_allclose(scores(0), scores(shift), atol=1e-2)


@given(shapes)
def test_rotation_keeps_lengths_and_position_zero_is_still(shape):
    q, k = drawn_heads(*shape)
    tables = rope_tables(Config(hidden_size=q.shape[-1], num_attention_heads=1), np.arange(q.shape[2])[None])
    turned, _ = reference.apply_rope(q, k, *tables)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(turned[:, :, 0], q[:, :, 0])


def test_corners_of_the_frequencies():
    small = {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}

    def frequencies(kind, fields=small, length=40, **rope):
        config = Config(**fields, rope_parameters={"rope_type": kind, "factor": 2.0} | rope)
        return rope_frequencies(config, length)

    # as in transformers, dynamic uses max_position_embeddings alone; with head_dim 2 the one frequency stays 1
    np.testing.assert_array_equal(
        frequencies("dynamic")[0], frequencies("dynamic", original_max_position_embeddings=4)[0]
    )
    assert frequencies("dynamic", {"hidden_size": 2, "num_attention_heads": 1})[0] == [1.0]
    # yarn: a beta or mscale of 0 means the default
    np.testing.assert_array_equal(frequencies("yarn", beta_fast=0)[0], frequencies("yarn")[0])
    assert frequencies("yarn", mscale=0.7, mscale_all_dim=0)[1] == frequencies("yarn")[1]


def test_yarn_with_a_tiny_base_equals_transformers():
    """Where the ramp would end beyond head_dim."""
    fields = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 1024,
              "rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0}}  # fmt: skip
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](transformers_config(fields))
    np.testing.assert_allclose(rope_frequencies(Config.from_dict(fields))[0], expected.numpy(), rtol=1e-6)
