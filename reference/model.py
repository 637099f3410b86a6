"""The model: embedding, blocks, a final norm, and a head on top.

`params` is a flat dictionary of arrays under the checkpoint's own names ("model.layers.0.self_attn.q_proj.weight").
There is no model object: a LLaMA is this dictionary, a `Config`, and the functions below.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from .attention import attention_weights, causal_visibility, weigh
from .cache import KVCache
from .config import Config
from .feed_forward import feed_forward, linear
from .norm import rms_norm
from .rope import apply_rope, rope_tables

Params = dict[str, np.ndarray]


class Output(NamedTuple):
    """What `forward` returns.

    logits: next-token scores, for the last `logits_to_keep` positions if that was given.
    cache: the `KVCache` that now holds these tokens: the one passed in, or a new one.
    hidden_states: the input of every block (B, T, E), then the final norm's output: num_hidden_layers + 1 arrays.
    attentions: the weights (B, H, T, S) of every block. Like `hidden_states`, None unless requested.
    """

    logits: Float[np.ndarray, "B kept V"]
    cache: KVCache
    hidden_states: tuple[Float[np.ndarray, "B T E"], ...] | None
    attentions: tuple[Float[np.ndarray, "B H T S"], ...] | None


class DecoderOutput(NamedTuple):
    """What `decoder` returns: as `Output`, with the final norm's output in place of the logits."""

    last_hidden_state: Float[np.ndarray, "B T E"]
    cache: KVCache
    hidden_states: tuple[Float[np.ndarray, "B T E"], ...] | None
    attentions: tuple[Float[np.ndarray, "B H T S"], ...] | None


def self_attention(
    x: Float[np.ndarray, "B T E"],
    params: Params,
    layer: int,
    config: Config,
    tables: tuple[Float[np.ndarray, "#B T D"], Float[np.ndarray, "#B T D"]],
    visible: Bool[np.ndarray, "#B T S"],
    cache: KVCache,
) -> tuple[Float[np.ndarray, "B T E"], Float[np.ndarray, "B H T S"]]:
    """Project to heads, rotate, cache, attend, project back. Return the output and the attention weights."""
    prefix = f"model.layers.{layer}.self_attn"
    B, T, _ = x.shape

    def heads(name: str) -> Float[np.ndarray, "B N T D"]:
        return linear(x, params, f"{prefix}.{name}").reshape(B, T, -1, config.head_dim).swapaxes(1, 2)

    q, k = apply_rope(heads("q_proj"), heads("k_proj"), *tables)
    keys, values = cache.append(layer, k, heads("v_proj"))
    weights = attention_weights(q, keys, visible)  # attention() in two steps: the weights may be requested
    out = weigh(weights, values).swapaxes(1, 2).reshape(B, T, -1)  # (B, T, H · D); H · D need not be E
    return linear(out, params, f"{prefix}.o_proj"), weights


def block(
    x: Float[np.ndarray, "B T E"],
    params: Params,
    layer: int,
    config: Config,
    tables: tuple[Float[np.ndarray, "#B T D"], Float[np.ndarray, "#B T D"]],
    visible: Bool[np.ndarray, "#B T S"],
    cache: KVCache,
) -> tuple[Float[np.ndarray, "B T E"], Float[np.ndarray, "B H T S"]]:
    """x += attention(norm(x)); x += feed_forward(norm(x)).

    The norms are inside the branches; x itself is never normalised on its way up, which keeps training deep stacks
    stable (Touvron et al. 2023, §2.2).
    """
    prefix = f"model.layers.{layer}"
    normed = rms_norm(x, params[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
    attended, weights = self_attention(normed, params, layer, config, tables, visible, cache)
    x = x + attended
    normed = rms_norm(x, params[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
    return x + feed_forward(normed, params, f"{prefix}.mlp", config.hidden_act), weights


def decoder(
    params: Params,
    config: Config,
    input_ids: np.ndarray | None = None,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    cache: KVCache | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    inputs_embeds: np.ndarray | None = None,
) -> DecoderOutput:
    """Run everything below the head: transformers' `LlamaModel`. Arguments as for `forward`."""
    cache = KVCache(config.num_hidden_layers) if cache is None else cache
    if cache.length == 0:  # once per text
        check_params(params, config)
    x = _embed(params, config, input_ids, inputs_embeds)
    B, T, _ = x.shape
    mask, position_ids = _check_places(B, T, attention_mask, position_ids, cache, config)
    tables = rope_tables(config, position_ids)
    visible = causal_visibility(T, cache.length + T, mask)

    hidden_states: tuple[np.ndarray, ...] | None = () if output_hidden_states else None
    attentions: tuple[np.ndarray, ...] | None = () if output_attentions else None
    for layer in range(config.num_hidden_layers):
        if hidden_states is not None:
            hidden_states += (x,)
        x, weights = block(x, params, layer, config, tables, visible, cache)
        if attentions is not None:
            attentions += (weights,)
    cache.advance(T)
    x = rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)
    return DecoderOutput(x, cache, None if hidden_states is None else (*hidden_states, x), attentions)


def forward(
    params: Params,
    config: Config,
    input_ids: np.ndarray | None = None,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    cache: KVCache | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    inputs_embeds: np.ndarray | None = None,
    logits_to_keep: int = 0,
) -> Output:
    """Return next-token logits for every token: transformers' `LlamaForCausalLM`.

    Args:
        input_ids: (B, T) integers; alternatively pass `inputs_embeds`, (B, T, E) vectors.
        attention_mask: (B, S) of 0 (padding) and 1, where S includes the cached tokens. Default: no padding.
        position_ids: (B, T) or (1, T). Default: each row counts its own unmasked tokens from 0, as transformers'
            generate does (its bare forward counts padding too).
        cache: a `KVCache` from an earlier call, holding the tokens before these; it is updated in place.
        logits_to_keep: compute logits only for this many last positions; 0 computes all. For 512 tokens and a
            vocabulary of 49,152 all logits take 100 MB in float32, of which generation needs one row.

    Raises:
        ValueError: an argument or a tensor of `params` is missing or has the wrong shape, or an id is out of range.
    """
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must be 0 (all) or more, got {logits_to_keep}")
    out = decoder(params, config, input_ids, attention_mask, position_ids, cache,
                  output_hidden_states, output_attentions, inputs_embeds)  # fmt: skip
    kept = out.last_hidden_state[:, -logits_to_keep:]  # -0 is 0, which keeps all
    return Output(lm_head(params, config, kept), *out[1:])


def lm_head(params: Params, config: Config, x: Float[np.ndarray, "B T E"]) -> Float[np.ndarray, "B T V"]:
    """Return a score for every token of the vocabulary; a tied model uses the token embeddings as the head's weight."""
    return linear(x, params, "model.embed_tokens" if config.tie_word_embeddings else "lm_head")


def classify(
    params: Params,
    config: Config,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
) -> Float[np.ndarray, "B num_labels"]:
    """Return one score per label and text, from the last token: transformers' `LlamaForSequenceClassification`.

    The last token is the rightmost that is not `pad_token_id`; in a causal model no other has seen the whole text.
    Needs `score.weight` (num_labels, E) in `params`.

    Raises:
        ValueError: as `forward`; or `score.weight` is missing or misshapen, or a batch has no `pad_token_id`.
    """
    if "score.weight" not in params:
        raise ValueError("the tensor score.weight is missing: this is not a sequence classification checkpoint")
    shape = params["score.weight"].shape
    if len(shape) != 2 or shape[1] != config.hidden_size:
        raise ValueError(f"the tensor score.weight must be (labels, {config.hidden_size}), got {shape}")
    x = decoder(params, config, input_ids, attention_mask, position_ids).last_hidden_state
    B, T, _ = x.shape
    if config.pad_token_id is None:
        if B > 1:
            raise ValueError("pad_token_id must be set to classify a batch: without it the last token is unknown")
        last = np.array([T - 1])
    else:
        last = np.max(np.arange(T) * (np.asarray(input_ids) != config.pad_token_id), axis=1)
    return linear(x[np.arange(B), last], params, "score")


def parameter_shapes(config: Config, classifier: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of a causal language model, or of a classifier without its head."""
    E, F, V, D = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    yield "model.embed_tokens.weight", (V, E)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (E,)
        for name, out, into in (("q", H * D, E), ("k", K * D, E), ("v", K * D, E), ("o", E, H * D)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (out, into)
            if config.attention_bias:
                yield f"{prefix}.self_attn.{name}_proj.bias", (out,)
        yield f"{prefix}.post_attention_layernorm.weight", (E,)
        for name, out, into in (("gate", F, E), ("up", F, E), ("down", E, F)):
            yield f"{prefix}.mlp.{name}_proj.weight", (out, into)
            if config.mlp_bias:
                yield f"{prefix}.mlp.{name}_proj.bias", (out,)
    yield "model.norm.weight", (E,)
    if not config.tie_word_embeddings and not classifier:
        yield "lm_head.weight", (V, E)


def check_params(params: Params, config: Config) -> None:
    """Raise a ValueError naming the first tensor that is missing, misshapen or an unexpected bias."""
    for name, shape in parameter_shapes(config, classifier="score.weight" in params):
        if name not in params:
            raise ValueError(f"the tensor {name} is missing")
        if params[name].shape != shape:
            raise ValueError(f"the tensor {name} has shape {params[name].shape}; the configuration asks for {shape}")
        bias = f"{name.removesuffix('weight')}bias"  # `linear` would add it
        known = (".mlp." in name and config.mlp_bias) or (".self_attn." in name and config.attention_bias)
        if bias in params and not known:
            raise ValueError(f"the tensor {bias} is present, but the configuration says there is no such bias")


def _embed(
    params: Params, config: Config, input_ids: np.ndarray | None, inputs_embeds: np.ndarray | None
) -> Float[np.ndarray, "B T E"]:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if inputs_embeds is not None:
        inputs_embeds = np.asarray(inputs_embeds)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.hidden_size or not inputs_embeds.size:
            raise ValueError(f"inputs_embeds must be (batch, length, {config.hidden_size}), got {inputs_embeds.shape}")
        return inputs_embeds.astype(params["model.embed_tokens.weight"].dtype, copy=False)
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids must be integers of shape (batch, length > 0), got {ids.dtype} {ids.shape}")
    if not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(f"input_ids must be in 0 ... {config.vocab_size - 1}, got {ids.min()} ... {ids.max()}")
    return params["model.embed_tokens.weight"][ids]


def _check_places(
    B: int, T: int, mask: np.ndarray | None, position_ids: np.ndarray | None, cache: KVCache, config: Config
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the mask and positions, checked against the batch and the cache; fill in positions if they are omitted."""
    S = cache.length + T
    if len(cache) != config.num_hidden_layers:
        raise ValueError(f"the cache has {len(cache)} layers, the model {config.num_hidden_layers}")
    if cache.length and cache.batch_size != B:
        raise ValueError(f"the cache holds a batch of {cache.batch_size}, but the input's is {B}")
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != (B, S):
            cached = f" (the cache's {cache.length} tokens and {T} new ones)" if cache.length else ""
            raise ValueError(f"attention_mask must be {(B, S)}{cached}, got {mask.shape}")
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("attention_mask must hold only 0 (padding) and 1")
        mask = mask.astype(np.int64)
    if position_ids is None:
        counted = np.arange(S)[None] if mask is None else np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        return mask, counted[:, cache.length :]
    position_ids = np.asarray(position_ids)
    if position_ids.shape not in ((B, T), (1, T)) or not np.issubdtype(position_ids.dtype, np.integer):
        raise ValueError(f"position_ids must be integers of shape {(B, T)} or {(1, T)}, got {position_ids.shape}")
    return mask, position_ids
