"""Rotary position embedding: how attention knows where its tokens are.

A head's D numbers are treated as D/2 points in the plane. At position p, point i is rotated by the angle p · θ_i, where
θ_i = base^(-2i/D), i counting from 0, so early points rotate fast and late ones slowly (Su et al. 2021, §3.2.2).
Rotating both vectors of a dot product by the same angle leaves it unchanged, so the score of a query at p and a key at
s depends only on p - s.

Which two numbers form a point is a convention. Meta's weights pair neighbours, (0, 1), (2, 3) ...; Hugging Face's
checkpoints pair the halves, (0, D/2), (1, D/2 + 1) ..., with the rows of the q and k projections permuted to match.
Both give the same model; mixing one's weights with the other's rotation gives text that starts well and soon falls
apart. Everything in this project rotates halves; the interleaved form is here for comparison.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from .config import Config


def rope_frequencies(config: Config, length: int = 0) -> tuple[Float[np.ndarray, "half"], float]:
    """Return the angle per position, θ_i in radians (float32), and the factor that scales cos and sin.

    Contexts longer than a model was trained on are reached by rotating more slowly. `rope_parameters["rope_type"]`
    says how, with the semantics of transformers 5:

    - default:  θ_i = base^(-2i/D)                                             (Su et al. 2021)
    - linear:   θ_i / factor: all positions are compressed                     (Chen et al. 2023, §2.3)
    - dynamic:  base · (factor · n/L - (factor - 1))^(D/(D-2)) once n = `length` exceeds L = max_position_embeddings
                ("NTK-aware", bloc97 and emozilla 2023; Peng et al. 2023, §3.3)
    - yarn:     θ_i for points that make many turns over the trained context L, θ_i / factor for those that make few,
                with a ramp over i between (Peng et al. 2023, §3.2; the paper ramps over turns, its code over i); cos
                and sin times 0.1 ln(factor) + 1 (§3.4). Here and below L = original_max_position_embeddings
    - longrope: θ_i / divisor_i, from one list up to L tokens, from another beyond (Ding et al. 2024); cos and sin times
                sqrt(1 + ln(factor) / ln L), as in Phi-3's code
    - llama3:   yarn's blend with the ramp over turns, and no scale            (Llama 3.1's published code)

    Args:
        length: the number of tokens in the sequence, i.e. the largest position + 1. Only dynamic and longrope use it:
            once the sequence passes L, the angles of all its tokens change. Keys cached before then keep their angles,
            as in transformers; Peng et al. (§3.3) would cache unrotated keys.
    """
    rope, D = config.rope_parameters, config.head_dim
    kind, base, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor", 1.0)
    trained = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    exponent = np.arange(0, D, 2, dtype=np.float32) / D  # 2i / D
    scale = rope.get("attention_factor")  # only yarn and longrope have one

    if kind == "dynamic":
        ratio = max(length, config.max_position_embeddings) / config.max_position_embeddings
        base = base * (factor * ratio - (factor - 1)) ** (D / max(D - 2, 1))  # with D = 2 the base has no effect
    theta = 1 / base**exponent

    if kind == "linear":
        theta = theta / factor
    elif kind == "yarn":
        theta = _yarn(theta, rope, trained)
        scale = _yarn_attention_factor(rope) if scale is None else scale
    elif kind == "longrope":
        divisor = rope["long_factor"] if length > trained else rope["short_factor"]
        theta = 1 / (np.array(divisor, dtype=np.float32) * base**exponent)
        if scale is None and factor > 1:
            scale = math.sqrt(1 + math.log(factor) / math.log(trained))
    elif kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = trained * theta / (2 * math.pi)  # full turns over the trained context
        keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast, kept; 0: slow, divided
        theta = (1 - keep) * theta / factor + keep * theta
    return theta.astype(np.float32), 1.0 if scale is None else float(scale)


def _yarn(theta: Float[np.ndarray, "half"], rope: dict, trained: int) -> Float[np.ndarray, "half"]:
    """YaRN's blend: a point is fast or slow depending on how many turns it makes over the trained context.

    The bounds, including `D - 1` (for D/2 points), are those of the published code; a beta of 0 means the default.
    """
    D, base = 2 * len(theta), rope["rope_theta"]

    def point_that_turns(times: float) -> float:  # solves trained · base^(-2i/D) / 2π = times for i
        return D * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = point_that_turns(rope.get("beta_fast") or 32), point_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, D - 1)
    if first == last:
        last += 0.001  # avoid dividing by 0
    slow = np.clip((np.arange(D // 2, dtype=np.float32) - first) / (last - first), 0, 1)
    return slow * theta / rope["factor"] + (1 - slow) * theta


def _yarn_attention_factor(rope: dict) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * weight * math.log(rope["factor"]) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def rope_tables(
    config: Config, position_ids: Int[np.ndarray, "B T"]
) -> tuple[Float[np.ndarray, "B T D"], Float[np.ndarray, "B T D"]]:
    """Return cos and sin of every position's angles, float32, laid out for paired halves: point i at i and i + D/2.

    Angles are float32 whatever the model's dtype: around 2000, bfloat16 can represent only every eighth position.
    """
    theta, scale = rope_frequencies(config, length=int(position_ids.max()) + 1)
    angles = position_ids[..., None].astype(np.float32) * theta  # (B, T, D/2)
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)


def rotate_half(x: Float[np.ndarray, "*batch D"]) -> Float[np.ndarray, "*batch D"]:
    """(x1, x2) -> (-x2, x1) on the halves: rotate every point by a quarter turn."""
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([-x2, x1], axis=-1)


def apply_rope(
    q: Float[np.ndarray, "B H T D"],
    k: Float[np.ndarray, "B K T D"],
    cos: Float[np.ndarray, "#B T D"],
    sin: Float[np.ndarray, "#B T D"],
) -> tuple[Float[np.ndarray, "B H T D"], Float[np.ndarray, "B K T D"]]:
    """Rotate queries and keys by the angles of their positions.

    x' = x · cos + rotate_half(x) · sin            (Su et al. 2021, eq. 34, with paired halves)
    """
    cos, sin = cos[:, None], sin[:, None]  # the same for every head
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def apply_rope_to_cache(
    q: Float[np.ndarray, "B H T D"],
    k: Float[np.ndarray, "B K T D"],
    v: Float[np.ndarray, "B K T D"],
    cos: Float[np.ndarray, "#B T D"],
    sin: Float[np.ndarray, "#B T D"],
    k_cache: Float[np.ndarray, "B K S D"],
    v_cache: Float[np.ndarray, "B K S D"],
    positions: Int[np.ndarray, "B T"],
) -> Float[np.ndarray, "B H T D"]:
    """Apply RoPE, write rotated keys and values into caches at `positions`, and return the rotated queries.

    Positions outside the cache are dropped. The model here does not use it; as a kernel it saves a pass over memory.
    """
    q, k = apply_rope(q, k, cos, sin)
    rows, tokens = np.nonzero((positions >= 0) & (positions < k_cache.shape[2]))
    places = positions[rows, tokens]
    k_cache[rows, :, places] = k[rows, :, tokens]
    v_cache[rows, :, places] = v[rows, :, tokens]
    return q


def apply_rope_interleaved(
    q: Float[np.ndarray, "B H T D"],
    k: Float[np.ndarray, "B K T D"],
    cos: Float[np.ndarray, "#B T D"],
    sin: Float[np.ndarray, "#B T D"],
) -> tuple[Float[np.ndarray, "B H T D"], Float[np.ndarray, "B K T D"]]:
    """The same rotation where point i is the pair (2i, 2i + 1), as in Meta's weights. Takes the same tables.

    It equals `apply_rope` up to reordering q and k from halves to pairs, as `interleave` does for weights.
    """
    D = q.shape[-1]
    cos, sin = cos[:, None, :, : D // 2], sin[:, None, :, : D // 2]

    def rotate(x):
        out = np.empty(x.shape, np.result_type(x, cos))
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
        return out

    return rotate(q), rotate(k)


def interleave(weight: Float[np.ndarray, "HD *rest"], heads: int) -> Float[np.ndarray, "HD *rest"]:
    """Reorder the rows of a q or k projection (or its bias) from Hugging Face's halves to Meta's pairs."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave(weight: Float[np.ndarray, "HD *rest"], heads: int) -> Float[np.ndarray, "HD *rest"]:
    """Reorder the rows of a q or k projection (or its bias) from Meta's pairs to Hugging Face's halves."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
