"""Attention: every token gathers information from the tokens it may see.

Visibility is one boolean array, `visible[b, t, s]`: whether query t of row b may see key s. It expresses causality,
padding, a cache and a chunk from the middle of a text alike. With four keys, the first of them padding, and the last
three tokens as queries:

              key    0  1  2  3
    query 1          0  1  0  0
    query 2          0  1  1  0
    query 3          0  1  1  1
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


def causal_visibility(
    T: int, S: int, attention_mask: Int[np.ndarray, "B S"] | None = None
) -> Bool[np.ndarray, "#B T S"]:
    """Return which keys each query sees when the last T of S tokens are the queries.

    Query t is at position S - T + t and sees the keys up to and including its own position, except those that
    `attention_mask` marks as padding with 0. Padding may be on the left, on the right or in between.
    """
    visible = np.tri(T, S, S - T, dtype=bool)[None]  # true where s <= S - T + t
    return visible if attention_mask is None else visible & (attention_mask[:, None] != 0)


def softmax(scores: Float[np.ndarray, "*batch S"]) -> Float[np.ndarray, "*batch S"]:
    """exp(x) / Σ exp(x), shifted by the maximum to avoid overflow. A row that is all -∞ becomes zeros."""
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)  # initial: for S = 0, no keys
    out = scores - np.where(np.isneginf(top), 0, top)
    np.exp(out, out=out)
    total = out.sum(axis=-1, keepdims=True)
    return np.divide(out, total, out=out, where=total > 0)


def attention_weights(
    q: Float[np.ndarray, "B H T D"],
    k: Float[np.ndarray, "B K S D"],
    visible: Bool[np.ndarray, "#B T S"],
) -> Float[np.ndarray, "B H T S"]:
    """softmax_s(q_t · k_s / √D), over the keys that query t sees.

    Query head h uses key/value head h // G, with G = H / K heads per group (Ainslie et al. 2023, §2.2, where G is the
    number of groups; grouping adjacent heads is the checkpoints' convention). Folding a group's heads into the time
    axis, (B, K, G · T, D), lets a single product with their shared keys serve all of them.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    scores = (q * D**-0.5).reshape(B, K, H // K * T, D) @ k.swapaxes(-1, -2)
    scores = scores.reshape(B, H, T, S)
    np.copyto(scores, -np.inf, where=~visible[:, None])
    return softmax(scores)


def weigh(weights: Float[np.ndarray, "B H T S"], v: Float[np.ndarray, "B K S D"]) -> Float[np.ndarray, "B H T D"]:
    """Σ_s weights[t, s] v_s, with each value head shared by its group as in `attention_weights`."""
    B, H, T, S = weights.shape
    K, D = v.shape[1], v.shape[3]
    return (weights.reshape(B, K, H // K * T, S) @ v).reshape(B, H, T, D)


def attention(
    q: Float[np.ndarray, "B H T D"],
    k: Float[np.ndarray, "B K S D"],
    v: Float[np.ndarray, "B K S D"],
    visible: Bool[np.ndarray, "#B T S"],
) -> Float[np.ndarray, "B H T D"]:
    """Grouped-query attention: each key/value head serves a group of G = H / K query heads.

        o_t = Σ_s softmax_s(q_t · k_s / √D) v_s                      (Vaswani et al. 2017, eq. 1)

    K = H is multi-head attention, K = 1 multi-query attention. The output of a query that sees nothing is zero
    (transformers' eager attention returns the mean of all values; neither is ever used).
    """
    return weigh(attention_weights(q, k, visible), v)


def decode_attention(
    q: Float[np.ndarray, "B H 1 D"],
    k_cache: Float[np.ndarray, "B_or_pages K S_or_page D"],
    v_cache: Float[np.ndarray, "B_or_pages K S_or_page D"],
    lengths: Int[np.ndarray, "B"] | None,
    mask: Shaped[np.ndarray, "B S"] | None = None,
    block_table: Int[np.ndarray, "B n"] | None = None,
) -> Float[np.ndarray, "B H 1 D"]:
    """Attention of one new token per row over a cache in which row b fills the first `lengths[b]` slots (None: all).

    The model here does not use it; it specifies the kernel for this shape.

    Args:
        mask: 0 marks a slot of padding, which is not seen.
        block_table: the caches are pages (pages, K, page size, D), allocated in any order; row b's slots are those of
            pages block_table[b, 0], block_table[b, 1] ... in turn (Kwon et al. 2023, §4.1)
    """
    if block_table is not None:  # (B, n, K, page, D) -> (B, K, n · page, D)
        k_cache, v_cache = (
            pages[block_table].swapaxes(1, 2).reshape(len(q), pages.shape[1], -1, pages.shape[3])
            for pages in (k_cache, v_cache)
        )
    S = k_cache.shape[2]
    lengths = np.full(len(q), S) if lengths is None else lengths
    visible = np.arange(S) < lengths[:, None, None]  # (B, 1, S)
    if mask is not None:
        visible = visible & (mask[:, None] != 0)
    return attention(q, k_cache, v_cache, visible)
