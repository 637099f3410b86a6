"""Autoregressive generation: each new token is fed back to the model."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from .cache import KVCache
from .config import Config
from .model import Params, forward
from .sampling import GREEDY, Sampler

PREFILL_CHUNK = 256  # prompt tokens per forward pass: scores take chunk × length numbers per head, not length²


def generate(
    params: Params,
    config: Config,
    input_ids: np.ndarray,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
    attention_mask: np.ndarray | None = None,
    pad_token_id: int | None = None,
    sampler: Sampler = GREEDY,
    cache: KVCache | None = None,
) -> Int[np.ndarray, "B S"]:
    """Return the prompts followed by the generated tokens, (batch, length).

    Args:
        input_ids: (B, T) integers, the prompts; shorter ones are padded on the left.
        max_new_tokens: the maximum number of tokens to generate.
        eos_token_id: any of these ends a row; None disables early stopping. The call returns when all rows have ended.
        attention_mask: (B, T) of 0 (padding) and 1; required if there is padding.
        pad_token_id: fills rows that end before the others (default: the first EOS token).
        sampler: how tokens are chosen (default: greedy).
        cache: a cache that already holds the first tokens of `input_ids`, which are not recomputed.

    Raises:
        ValueError: as `forward`; or right padding, a `max_new_tokens` below 1, or a cache that covers all `input_ids`.
    """
    tokens = list(stream(params, config, input_ids, max_new_tokens, eos_token_id, attention_mask, pad_token_id,
                         sampler, cache))  # fmt: skip
    return np.concatenate([np.asarray(input_ids), np.stack(tokens, axis=1)], axis=1)


def stream(
    params: Params,
    config: Config,
    input_ids: np.ndarray,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
    attention_mask: np.ndarray | None = None,
    pad_token_id: int | None = None,
    sampler: Sampler = GREEDY,
    cache: KVCache | None = None,
) -> Iterator[Int[np.ndarray, "B"]]:
    """Like `generate`, but yield each step's new token for every row as soon as it is known."""
    text = np.asarray(input_ids)
    if text.ndim != 2 or text.shape[1] == 0:
        raise ValueError(f"input_ids must be of shape (batch, length > 0), got {text.shape}")
    B, T = text.shape
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    ends = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    named = [("eos_token_id", end) for end in ends]
    if pad_token_id is not None:
        named.append(("pad_token_id", pad_token_id))
    for name, token in named:
        if not isinstance(token, int | np.integer) or not 0 <= token < config.vocab_size:
            raise ValueError(f"{name} must be a token id from 0 to {config.vocab_size - 1}, got {token!r}")
    pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    mask = np.ones((B, T), np.int64) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != (B, T):
        raise ValueError(f"attention_mask must be {(B, T)}, like input_ids, got {mask.shape}")
    if not mask[:, -1].all():
        raise ValueError("generation continues from the last token: pad prompts on the left (attention_mask ends in 0)")
    cache = KVCache(config.num_hidden_layers) if cache is None else cache
    if cache.length >= T:
        raise ValueError(
            f"the cache holds {cache.length} tokens; input_ids must contain those and at least one more, got {T}"
        )
    return _steps(params, config, text, mask, max_new_tokens, ends, pad, sampler, cache)


def _steps(
    params: Params,
    config: Config,
    text: np.ndarray,
    mask: np.ndarray,
    max_new_tokens: int,
    ends: list[int],
    pad: int,
    sampler: Sampler,
    cache: KVCache,
) -> Iterator[Int[np.ndarray, "B"]]:
    """Separate from `stream` so that invalid arguments raise at the call, not at the first token."""
    rng = np.random.default_rng(sampler.seed)
    running = np.ones(len(text), bool)
    chunk = text.shape[1] if config.angles_follow_length else PREFILL_CHUNK
    for _ in range(max_new_tokens):
        for start in range(cache.length, text.shape[1], chunk):  # the prompt in chunks; then the new token
            end = start + chunk
            logits = forward(params, config, text[:, start:end], mask[:, :end], cache=cache, logits_to_keep=1).logits
        token = np.where(running, sampler.pick(logits[:, -1], rng, text, mask), pad)
        yield token
        running &= ~np.isin(token, ends)
        if not running.any():
            return
        text = np.concatenate([text, token[:, None]], axis=1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
