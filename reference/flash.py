"""Flash attention: the same result without ever holding a full row of scores. The bridge to the kernel."""

import numpy as np
from jaxtyping import Float, Int, Shaped


def flash_attention(
    q: Float[np.ndarray, "B H T D"],
    k: Float[np.ndarray, "B K S D"],
    v: Float[np.ndarray, "B K S D"],
    causal: bool = True,
    starts: Int[np.ndarray, "B"] | None = None,
    lengths: Int[np.ndarray, "B"] | None = None,
    offset: int | None = None,
    return_lse: bool = False,
    first_keys: Int[np.ndarray, "B T"] | None = None,
    cu_seqlens: Int[np.ndarray, "borders"] | None = None,
    mask: Shaped[np.ndarray, "B S"] | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Float[np.ndarray, "B H T D"] | tuple[Float[np.ndarray, "B H T D"], Float[np.ndarray, "B H T"]]:
    """`attention`, one block of keys at a time  (Milakov & Gimelshein 2018; Dao et al. 2022; Dao 2023, alg. 1)

    A softmax over keys that arrive in blocks needs only three running values per query: the maximum score m, the sum of
    exponentials l and the weighted sum of values acc. When a block raises the maximum from m to m', the previous sums
    are rescaled by exp(m - m'):

        l' = exp(m - m') l + Σ exp(score - m')          acc' = exp(m - m') acc + Σ exp(score - m') v

    The output is acc / l at the end. Nothing of size T × S is ever held in memory.

    Args:
        causal: query t, at position `offset` + t, sees the keys up to and including its own position; else all keys.
        starts, lengths: row b's keys are those at starts[b] <= s < lengths[b] (default: all S). Left padding is a
            start above 0, right padding a length below S; both count from position 0.
        offset: the position of query 0 among the keys (default S - T: the queries are the last T tokens).
        return_lse: also return m + ln l, the log-sum-exp of each query's scores (-∞ if it sees nothing). It is needed
            to combine outputs over disjoint sets of keys and to recompute the softmax in the backward pass.
        first_keys: query t sees no key before first_keys[b, t], which separates texts packed into one row.
        cu_seqlens: the same, as the boundaries of the texts from 0 to T, shared by all rows ("cumulative sequence
            lengths").
        mask: 0 marks a padded key, which is not seen.
        block_q, block_k: block sizes of queries and keys; they affect only speed and rounding.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    G = H // K
    starts = np.zeros(B, int) if starts is None else starts
    lengths = np.full(B, S) if lengths is None else lengths
    offset = S - T if offset is None else offset
    if cu_seqlens is not None:
        first_keys = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))[None].repeat(B, axis=0)
    if first_keys is None:
        first_keys = np.zeros((B, T), int)
    out = np.zeros_like(q)
    lse = np.full((B, H, T), -np.inf, q.dtype)

    for b in range(B):
        for h in range(H):
            for t0 in range(0, T, block_q):
                t1 = min(t0 + block_q, T)
                place = offset + np.arange(t0, t1)[:, None]  # (block_q, 1)
                low = first_keys[b, t0:t1, None]  # (block_q, 1)
                m = np.full((t1 - t0, 1), -np.inf, q.dtype)
                l = np.zeros((t1 - t0, 1), q.dtype)  # noqa: E741  (the paper's notation)
                acc = np.zeros((t1 - t0, D), q.dtype)
                first = max(int(starts[b]), int(low.min()))
                last = min(int(lengths[b]), offset + t1) if causal else int(lengths[b])  # no query sees later keys
                for s0 in range(first, last, block_k):
                    s1 = min(s0 + block_k, last)
                    scores = (q[b, h, t0:t1] * D**-0.5) @ k[b, h // G, s0:s1].T  # a group's heads share one key head
                    key = np.arange(s0, s1)
                    seen = (key >= low) & (key <= place) if causal else key >= low
                    if mask is not None:
                        seen = seen & (mask[b, s0:s1] != 0)
                    scores = np.where(seen, scores, -np.inf)
                    m_new = np.maximum(m, scores.max(axis=1, keepdims=True))
                    shift = np.where(np.isneginf(m_new), 0, m_new)  # nothing seen yet: -∞ - (-∞) would be NaN
                    p, rescale = np.exp(scores - shift), np.exp(m - shift)
                    l = rescale * l + p.sum(axis=1, keepdims=True)  # noqa: E741
                    acc = rescale * acc + p @ v[b, h // G, s0:s1]
                    m = m_new
                any_seen = l > 0
                out[b, h, t0:t1] = np.divide(acc, l, out=np.zeros_like(acc), where=any_seen)
                lse[b, h, t0:t1] = (m + np.log(l, out=np.full_like(l, -np.inf), where=any_seen))[:, 0]
    return (out, lse) if return_lse else out
