"""Hypothesis strategies: configurations covering every LLaMA config option, and padded batches."""

import numpy as np
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def rope_parameters(draw, head_dim: int, max_position_embeddings: int, kinds=None) -> dict:
    """Draw RoPE of every type; original lengths at or below the maximum, so that short texts exceed them."""
    kind = draw(st.sampled_from(kinds or ["default", "linear", "dynamic", "yarn", "longrope", "llama3"]))
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0, 5e5]))}
    original = draw(st.sampled_from([max_position_embeddings // 4, max_position_embeddings]))
    factor = draw(st.sampled_from([1.0, 1.5, 4.0, 8]))
    if kind == "linear" or kind == "dynamic":
        rope |= {"factor": factor}
    elif kind == "yarn":
        rope |= {"factor": factor, "original_max_position_embeddings": original}
        rope |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "attention_factor": st.sampled_from([0.5, 1.0, 1.3]),
                    "beta_fast": st.sampled_from([8.0, 32]),
                    "beta_slow": st.sampled_from([1.0, 2]),
                    "truncate": st.booleans(),
                    "mscale": st.sampled_from([0.7, 1.0]),
                    "mscale_all_dim": st.sampled_from([0.5, 1.0]),
                },
            )
        )
    elif kind == "longrope":
        factors = st.lists(st.floats(1, 8, width=32), min_size=head_dim // 2, max_size=head_dim // 2)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors)}
        rope |= {"original_max_position_embeddings": original}
        rope |= draw(st.fixed_dictionaries({}, optional={"attention_factor": st.sampled_from([0.8, 1.2])}))
        if draw(st.booleans()):
            rope["factor"] = factor
    elif kind == "llama3":
        rope |= {"factor": factor, "low_freq_factor": draw(st.sampled_from([1.0, 2]))}
        rope |= {"high_freq_factor": draw(st.sampled_from([4.0, 16])), "original_max_position_embeddings": original}
    return rope


@st.composite
def configs(draw, kinds=None) -> dict:
    """Draw small models: MHA, GQA, MQA, head_dim independent of hidden_size, biases, tied weights, every RoPE type."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * group
    head_dim = draw(st.sampled_from([4, 6, 8, 16]))
    hidden_size = draw(st.sampled_from([heads * head_dim, heads * 6, heads * 8]))
    positions = draw(st.sampled_from([8, 16, 64]))
    return {
        "vocab_size": draw(st.integers(5, 40)),
        "hidden_size": hidden_size,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": draw(st.sampled_from(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu2"])),
        "max_position_embeddings": positions,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": draw(rope_parameters(head_dim, positions, kinds)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def batches(draw, vocab_size: int, max_length: int = 24, sides=("none", "left", "right")) -> tuple:
    """Draw (input_ids, attention_mask or None): up to 3 rows, padded on one side, each with at least one real token."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, max_length))
    rng = np.random.default_rng(draw(SEEDS))
    ids = rng.integers(0, vocab_size, (rows, length))
    side = draw(st.sampled_from(sides))
    if side == "none":
        return ids, draw(st.sampled_from([None, np.ones((rows, length), int)]))
    real = np.array([draw(st.integers(1, length)) for _ in range(rows)])[:, None]
    places = np.arange(length)
    return ids, (places >= length - real if side == "left" else places < real).astype(int)
