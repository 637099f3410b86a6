"""Attention: every token gathers from the tokens it may see.

What a token may see is one array of truth values, `visible[b, t, s]`: query t of row b may look at key s. Causality,
padding, a cache, a chunk from the middle of a text: all of them are expressed by this one array. With four keys, of
which the first is padding, and the last three tokens as queries:

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
    """Who sees whom when the last T of S tokens are the queries.

    Query t stands at place S - T + t and sees the keys up to there, itself included, except those that
    `attention_mask` marks as padding with 0. Padding on the left, on the right or in between is all the same here.
    """
    visible = np.tri(T, S, S - T, dtype=bool)[None]  # true where s <= S - T + t
    return visible if attention_mask is None else visible & (attention_mask[:, None] != 0)


def softmax(scores: Float[np.ndarray, "*batch S"]) -> Float[np.ndarray, "*batch S"]:
    """exp(x) / Σ exp(x), shifted by the maximum so that nothing overflows. A row of -∞ alone becomes zeros."""
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)  # initial: there may be no keys, S = 0
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

    Query head h reads key/value head h // G, with G = H / K heads to a group (Ainslie et al. 2023, §2.2, where G counts
    the groups; that neighbours make a group is the checkpoints' convention). Folding a group's heads into the time
    axis, (B, K, G · T, D), lets one product with their shared keys serve all of them.
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

    K = H is multi-head, K = 1 multi-query attention. A query that sees nothing gives zeros (transformers' eager
    attention gives the mean of all values there; nobody reads either).
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
    """One new token per row against a cache of which row b has filled the first `lengths[b]` places (None: all).

    Args:
        mask: a place of 0 is padding and not seen.
        block_table: the caches are pages (pages, K, page size, D), handed out in any order: row b's places are those of
            the pages block_table[b, 0], block_table[b, 1] ... (Kwon et al. 2023, §4.1)

    The model here has no need of it; a kernel for this one shape has.
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
