"""LLaMA in NumPy: the model's definition, written to be read.

Read it in this order, about an hour in all:

    norm          RMSNorm
    rope          rotary position embedding, in the six types that transformers documents
    attention     causal visibility; grouped-query attention
    feed_forward  the gated MLP and its activations
    cache         why each new token costs only one token's work
    model         the block, the stack, the heads: a whole LLaMA
    sampling      from logits to a token; then `generation`, the loop around it
    loss          then `gradients`, the backward passes
    flash         attention again, block by block: the bridge to the kernels
    config        the hyperparameters and their validation, to be consulted as needed
    loading       from checkpoint files to arrays

On a first reading, skip what only specifies a kernel: add_rms_norm, apply_rope_to_cache, decode_attention, gemv,
gemv_swiglu and linear_cross_entropy. The kernels of the same names are tested against them.

Shape annotations (which the tests check at run time), comments and kernels share one notation. Sizes are capitals:

    B batch           T new tokens (queries)    S all tokens so far (keys)
    H query heads     K key/value heads         G = H / K, query heads per group
    D head_dim        E hidden_size             F intermediate_size         V vocab_size        half = D / 2

Everything is a function of arrays, weights included; only caches are modified in place. Arrays keep their dtype:
float32 to run a model, float64 as ground truth for others. Only RoPE's tables are always float32.
"""

from .attention import attention, attention_weights, causal_visibility, decode_attention, softmax
from .cache import KVCache
from .config import Config
from .feed_forward import ACTIVATIONS, feed_forward, gemv, gemv_swiglu, linear, silu, swiglu
from .flash import flash_attention
from .generation import generate, stream
from .gradients import (
    apply_rope_backward,
    attention_backward,
    cross_entropy_backward,
    rms_norm_backward,
    swiglu_backward,
)
from .loading import load
from .loss import causal_lm_loss, cross_entropy, linear_cross_entropy
from .model import Output, block, classify, decoder, forward, lm_head, parameter_shapes
from .norm import add_rms_norm, rms_norm
from .rope import (
    apply_rope,
    apply_rope_interleaved,
    apply_rope_to_cache,
    deinterleave,
    interleave,
    rope_frequencies,
    rope_tables,
    rotate_half,
)
from .sampling import Sampler

__all__ = [
    "ACTIVATIONS",
    "Config",
    "KVCache",
    "Output",
    "Sampler",
    "add_rms_norm",
    "apply_rope",
    "apply_rope_backward",
    "apply_rope_interleaved",
    "apply_rope_to_cache",
    "attention",
    "attention_backward",
    "attention_weights",
    "block",
    "causal_lm_loss",
    "causal_visibility",
    "classify",
    "cross_entropy",
    "cross_entropy_backward",
    "decode_attention",
    "decoder",
    "deinterleave",
    "feed_forward",
    "flash_attention",
    "forward",
    "gemv",
    "gemv_swiglu",
    "generate",
    "interleave",
    "linear",
    "linear_cross_entropy",
    "lm_head",
    "load",
    "parameter_shapes",
    "rms_norm",
    "rms_norm_backward",
    "rope_frequencies",
    "rope_tables",
    "rotate_half",
    "silu",
    "softmax",
    "stream",
    "swiglu",
    "swiglu_backward",
]
