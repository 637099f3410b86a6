"""The model in PyTorch: transformers' Llama classes, module by module and name by name.

Start at `LlamaModel.forward`; the modules it calls are above it, the heads below. The per-token computation is in
`llama.ops`, what all models share (loading, saving, resizing ...) in `llama.pretrained`, and text generation in
`llama.generation`.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import library, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import ops, reference, row
from .activations import activation
from .cache import Cache, DynamicCache, as_cache
from .config import LlamaConfig
from .generation.mixin import GenerationMixin
from .outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from .pretrained import LlamaPreTrainedModel, device_of_weights


class LlamaRMSNorm(ops.Computes, nn.Module):
    """RMSNorm with a learned gain; `ops.rms_norm` has the formula."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device_of_weights()))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon, self.backend)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LlamaRotaryEmbedding(nn.Module):
    """cos and sin of the positions' angles, from the reference's frequencies.

    The frequencies stay in float32 whatever dtype the model is cast to: in bfloat16, the angle at position 2000 would
    be off by up to 2.4 radians (LLaMA 7B). For RoPE types whose angles depend on the sequence length (dynamic,
    longrope), the longest row decides for the whole batch.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config.checked()
        self._config_as_json = json.dumps(asdict(self.config))
        frequencies, self.attention_scaling = reference.rope_frequencies(self.config)
        self.rope_type = self.config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.register_buffer("inv_freq", torch.tensor(frequencies, device="cpu"), persistent=False)

    @property
    def original_inv_freq(self) -> torch.Tensor:
        """`inv_freq`, which, unlike in transformers, never changes with the sequence length."""
        return self.inv_freq

    def _apply(self, fn: Any, recurse: bool = True) -> "LlamaRotaryEmbedding":
        """Follow the model to its device but not its dtype; restore frequencies lost on "meta"."""
        frequencies, _ = reference.rope_frequencies(self.config)
        self.inv_freq = torch.tensor(frequencies, device=fn(self.inv_freq).device)
        return self

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B or 1, T) positions -> cos and sin, (B or 1, T, D) in x's dtype."""
        inv_freq = self.inv_freq
        if self.config.angles_follow_length:
            inv_freq = _frequencies_at(position_ids, self._config_as_json)
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


@library.custom_op("llama_triton::rope_frequencies", mutates_args=())
def _frequencies_at(position_ids: torch.Tensor, config: str) -> torch.Tensor:
    """The reference's frequencies (D/2,) for a sequence that ends at the largest position.

    A custom operator, so that torch.compile does not trace into it; `config` is JSON. Reading the length synchronises
    with the device, once per forward pass.
    """
    length = int(position_ids.max()) + 1
    frequencies, _ = reference.rope_frequencies(reference.Config(**json.loads(config)), length)
    return torch.from_numpy(frequencies).to(position_ids.device)


@_frequencies_at.register_fake
def _(position_ids: torch.Tensor, config: str) -> torch.Tensor:
    return position_ids.new_empty(json.loads(config)["head_dim"] // 2, dtype=torch.float32)


class LlamaMLP(ops.Computes, nn.Module):
    """down(act(gate(x)) · up(x)), SwiGLU where act is silu."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.hidden_size, self.intermediate_size = config, config.hidden_size, config.intermediate_size
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.act_fn = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = ops.linears((self.gate_proj, self.up_proj), x)
        is_silu = type(self.act_fn) is nn.SiLU and ops.is_unwatched(self.act_fn)
        hidden = ops.swiglu(gate, up, self.backend) if is_silu else self.act_fn(gate) * up
        return ops.linear(self.down_proj, hidden)


class LlamaAttention(ops.Computes, nn.Module):
    """Grouped-query attention with rotary positions and a cache."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.attention_dropout = config.head_dim, config.attention_dropout
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = _linear(config.hidden_size, heads * self.head_dim, config.attention_bias)
        self.k_proj = _linear(config.hidden_size, kv_heads * self.head_dim, config.attention_bias)
        self.v_proj = _linear(config.hidden_size, kv_heads * self.head_dim, config.attention_bias)
        self.o_proj = _linear(heads * self.head_dim, config.hidden_size, config.attention_bias)
        self.heads = list(range(heads))  # those not pruned, by their original indices
        self.kv_of = [head * kv_heads // heads for head in self.heads]  # the key/value head of each
        self.groups_are_even = True

    @property
    def scaling(self) -> float:
        """The factor applied to the attention scores."""
        return self.head_dim**-0.5

    @property
    def is_causal(self) -> bool:
        """Without a mask, a token attends to itself and the tokens before it. Read-only, like `scaling`."""
        return True

    @property
    def num_key_value_groups(self) -> int:
        """Query heads per key/value head."""
        return len(self.heads) // (self.kv_of[-1] + 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | ops.Padding | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, E) -> (B, T, E), and the attention weights (B, H, T, S) if requested or if "eager" computes them.

        `position_embeddings` is (cos, sin). Other arguments that transformers' layers pass are ignored.
        """
        if position_embeddings is None:
            raise ValueError("position_embeddings must be (cos, sin), as returned by model.rotary_emb(x, position_ids)")
        B, T, _ = hidden_states.shape
        q, k, v = (
            projected.view(B, T, -1, self.head_dim).transpose(1, 2)
            for projected in ops.linears((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        )
        q, k = ops.apply_rope(q, k, *position_embeddings, self.backend)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if not self.groups_are_even:
            k, v = k[:, self.kv_of], v[:, self.kv_of]

        dropout, weights = self.attention_dropout if self.training else 0.0, None
        if output_attentions or self.config.attn_implementation == "eager":
            weights = F.dropout(ops.attention_weights(q, k, attention_mask), dropout)
            out = ops.weigh(weights, v)
        else:
            out = ops.attention(q, k, v, attention_mask, dropout, self.backend)
        out = out.transpose(1, 2).reshape(B, T, -1)
        return ops.linear(self.o_proj, out), weights

    def prune_heads(self, heads: set[int]) -> None:
        """Remove these query heads, and every key/value head that no remaining query head uses.

        Heads keep their original indices across repeated pruning.
        """
        kept = [place for place, head in enumerate(self.heads) if head not in heads]
        if not kept:
            raise ValueError(f"layer {self.layer_idx} would be left without any attention head; keep at least one")
        kv_kept = sorted({self.kv_of[place] for place in kept})

        def rows(places: list[int]) -> torch.Tensor:
            return torch.cat([torch.arange(place * self.head_dim, (place + 1) * self.head_dim) for place in places])

        self.q_proj = _select(self.q_proj, rows(kept), dim=0)
        self.k_proj, self.v_proj = (_select(module, rows(kv_kept), dim=0) for module in (self.k_proj, self.v_proj))
        self.o_proj = _select(self.o_proj, rows(kept), dim=1)
        self.heads = [self.heads[place] for place in kept]
        self.kv_of = [kv_kept.index(self.kv_of[place]) for place in kept]
        groups = [self.kv_of.count(kv) for kv in range(len(kv_kept))]
        self.groups_are_even = len(set(groups)) == 1  # and contiguous, as pruning keeps the order


def _select(module: nn.Linear, places: torch.Tensor, dim: int) -> nn.Linear:
    """A Linear with the given outputs (dim 0) or inputs (dim 1) of `module`."""
    places = places.to(module.weight.device)
    weight = module.weight.detach().index_select(dim, places)
    new = _linear(weight.shape[1], weight.shape[0], bias=False)
    new.weight = nn.Parameter(weight, module.weight.requires_grad)
    if module.bias is not None:
        bias = module.bias.detach()
        new.bias = nn.Parameter(bias.index_select(0, places) if dim == 0 else bias.clone(), module.bias.requires_grad)
    return new.train(module.training)


def _linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """nn.Linear without its own initialisation, which `post_init` or a checkpoint would overwrite."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    device = device_of_weights()
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
    linear.register_parameter("bias", nn.Parameter(torch.empty(out_features, device=device)) if bias else None)
    return linear


class LlamaDecoderLayer(ops.Computes, nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | ops.Padding | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attentions: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, T, E) -> (B, T, E). The attention weights are appended to `attentions`, if it is given.

        Argument names and order are transformers'. `position_embeddings` is (cos, sin); it and any other keywords are
        passed on to the attention.
        """
        if attentions is not None:
            kwargs["output_attentions"] = True
        attended, weights = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        if attentions is not None and weights is not None:
            attentions.append(weights)
        norm = self.post_attention_layernorm
        if type(norm) is LlamaRMSNorm and ops.runs_bare(norm):
            normed, hidden_states = ops.add_rms_norm(
                attended, hidden_states, norm.weight, norm.variance_epsilon, norm.backend
            )
        else:
            hidden_states = hidden_states + attended
            normed = norm(hidden_states)
        return hidden_states + self.mlp(normed)


class LlamaModel(LlamaPreTrainedModel):
    """transformers' `LlamaModel`: embedding, layers and final norm, without a head."""

    base_model_prefix = ""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        pad = config.pad_token_id
        self.padding_idx = None if pad is None or pad < 0 else pad  # LLaMA 1 checkpoints have -1
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, self.padding_idx,
            _weight=torch.empty(config.vocab_size, config.hidden_size, device=device_of_weights()),  # set by post_init
        )  # fmt: skip
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        packed: bool = False,
    ) -> Any:
        """Run the model on T tokens that follow the P tokens in the cache.

        Args:
            input_ids: (B, T) ids; or pass `inputs_embeds`, (B, T, E), instead.
            attention_mask: (B, P + T), 0 at padding; or (B or 1, H or 1, T, P + T), used as is: bool, True where a
                token may attend, or float, added to the scores. Default: no padding.
            position_ids: (B or 1, T). Default: each row counts its unmasked tokens from 0, so that padding does not
                change a row's result. (transformers' forward counts padding too, its generate does not.)
            past_key_values: a `Cache`, which is updated in place, or a tuple over layers of (keys, values).
            use_cache: return a cache, creating one if none was passed. Default: `config.use_cache`.
            cache_position: (T,), the cache indices of these tokens, P .. P + T - 1, and rarely needed. An earlier
                start first crops the cache to it.
            packed: rows hold several sequences; one starts wherever `position_ids` do not increase by one. Not needed
                without a cache and a mask: then, as in transformers, `position_ids` alone decide.

        Returns:
            `BaseModelOutputWithPast`, or with `return_dict=False` the tuple of its values that are not None.

        Raises:
            ValueError: an argument has the wrong shape, e.g. a mask that does not cover the cache and the new tokens.
            IndexError: an id is outside the vocabulary.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        recompute = recompute and past_key_values is None  # a cache would be filled twice
        if recompute:
            use_cache = False  # it would keep what checkpointing is meant to free

        x = self._embed(input_ids, inputs_embeds)
        cache = None if past_key_values is None else as_cache(past_key_values)
        if isinstance(cache, Cache) and len(cache) not in (0, len(self.layers)):
            raise ValueError(f"past_key_values has {len(cache)} layers, the model {len(self.layers)}")
        if cache is None and use_cache:
            cache = DynamicCache()
        position_ids, mask = self._places(x, attention_mask, position_ids, cache, cache_position, packed)
        rotation = self.rotary_emb(x, position_ids)

        hidden_states: list[torch.Tensor] = []
        attentions: list[torch.Tensor] | None = [] if output_attentions else None
        shown = output_hidden_states or output_attentions
        with _numpy_for_rows(x, config.hidden_size * config.intermediate_size, self.backend):
            plan = None if shown or mask is not None else row.plan(self, cache)
            if plan is not None:
                x = row.read(plan, x, rotation, cache)
            else:
                more = {} if attentions is None else {"attentions": attentions}
                for layer in self.layers:
                    if output_hidden_states:
                        hidden_states.append(x)
                    run = partial(
                        layer, attention_mask=mask, position_embeddings=rotation, position_ids=position_ids,
                        past_key_values=cache, use_cache=use_cache, **more,
                    )  # fmt: skip
                    x = checkpoint(run, x, **self.gradient_checkpointing_kwargs) if recompute else run(x)
            x = self.norm(x)
        out = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=None if attentions is None else tuple(attentions[: len(self.layers)]),
        )
        return out if self._wants_dict(return_dict) else out.to_tuple()

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is not None:
            shape = tuple(inputs_embeds.shape)
            if len(shape) != 3 or shape[2] != self.config.hidden_size or 0 in shape:
                raise ValueError(f"inputs_embeds must be (batch, length, {self.config.hidden_size}), got {shape}")
            return inputs_embeds
        if not isinstance(input_ids, torch.Tensor):
            raise ValueError(f"input_ids must be a tensor (batch, length) of integers, got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be (batch, length) of integers, got {_describe(input_ids)}")
        if torch.compiler.is_compiling():
            return self.embed_tokens(input_ids)
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            low, high, top = int(input_ids.min()), int(input_ids.max()), self.embed_tokens.num_embeddings - 1
            raise IndexError(f"input_ids must be from 0 to {top}, got {low if low < 0 else high}") from error

    def _places(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        packed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | ops.Padding | None]:
        """Return the tokens' positions, (B or 1, T), and what they attend to: None (causal), a 4-D mask, or the
        `Padding` that the kernels take instead."""
        B, T, _ = x.shape
        compiling = torch.compiler.is_compiling()
        if cache_position is not None and not compiling:
            start, held = int(cache_position[0]), 0 if cache is None else cache.get_seq_length()
            if not 0 <= start <= held or cache_position.tolist() != list(range(start, start + T)):
                raise ValueError(
                    f"cache_position must be {T} positions from {held}, the cache's length; got {cache_position}"
                )
            if cache is not None and start < held:
                cache.crop(start - held)  # negative, as transformers' caches now require
        past = 0 if cache is None else cache.get_seq_length()
        total, masked = past + T, attention_mask is not None
        if attention_mask is not None:
            room = None if cache is None else getattr(cache, "max_cache_len", None)
            if attention_mask.dim() in (2, 4) and attention_mask.shape[-1] == room:
                attention_mask = attention_mask[..., :total]  # transformers' masks are as wide as a static cache
            shape = tuple(attention_mask.shape)
            is_2d = shape == (B, total)
            is_4d = len(shape) == 4 and shape[0] in (1, B) and shape[2:] == (T, total)
            if not (is_2d or (is_4d and shape[1] in (1, self.config.num_attention_heads))):
                raise ValueError(
                    f"attention_mask must be {(B, total)} or (batch, heads, {T}, {total}), for {past} tokens in the "
                    f"cache and {T} new ones; got {shape}"
                )
            attention_mask = attention_mask.to(x.device)
            if not attention_mask.is_floating_point():
                attention_mask = attention_mask != 0
        padding = None
        if attention_mask is not None and attention_mask.dim() == 2:
            padding, attention_mask = attention_mask != 0, None
            if not compiling and padding.device.type == "cpu" and bool(padding.all()):
                padding = None

        may_pack = position_ids is not None and cache is None and not masked
        if position_ids is None and packed:
            raise ValueError("packed needs position_ids that restart at each sequence")
        if position_ids is None:
            if padding is None:
                position_ids = torch.arange(past, total, device=x.device)[None]
            else:
                position_ids = (padding.cumsum(-1) - 1).clamp(min=0)[:, past:]
        else:
            position_ids = position_ids[None] if position_ids.dim() == 1 else position_ids
            if position_ids.dim() != 2 or len(position_ids) not in (1, B) or position_ids.shape[1] != T:
                raise ValueError(f"position_ids must be {(B, T)} or (1, {T}), got {tuple(position_ids.shape)}")

        first_keys = None
        if packed and past:
            raise ValueError("packed rows cannot continue a cache")
        if packed or may_pack:
            breaks = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
            if packed or compiling or bool(breaks.any()):
                starts = (breaks * torch.arange(T, device=breaks.device)).cummax(-1).values
                first_keys = starts.to(x.device, torch.int32).expand(B, T)
        if padding is None and first_keys is None:
            mask = attention_mask
        elif attention_mask is None:
            if ops.uses_triton(self.backend, x):
                return position_ids, ops.padding_of(padding, first_keys)
            mask = ops.as_mask(ops.Padding(padding, None, None, first_keys), T, total)
        elif attention_mask.dtype == torch.bool:
            mask = attention_mask & ops.as_mask(ops.padding_of(None, first_keys), T, total)
        else:
            raise ValueError("packed cannot be combined with a float attention_mask; encode the boundaries in it")
        if mask is not None and mask.is_floating_point() and mask.dtype != x.dtype:
            mask = mask.to(x.dtype)
        return position_ids, mask


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """The language model: `LlamaModel` with a head that scores every token of the vocabulary."""

    _tied_weights_keys = ("lm_head.weight",)
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # tells transformers' Trainer whether labels are shifted

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = _linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        num_logits_to_keep: int | torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        ignore_index: int = -100,
        packed: bool = False,
        **more: Any,
    ) -> Any:
        """Compute next-token logits. Takes the arguments of `LlamaModel.forward`, and:

        Args:
            labels: (B, T) ids, usually `input_ids` itself: position t is scored against label t + 1. Labels equal to
                `ignore_index` are ignored.
            logits_to_keep: an int n computes only the last n positions, 0 all; a tensor (n,) gives their indices. The
                loss covers only the computed positions. `num_logits_to_keep` is transformers 4's name for it.
            num_items_in_batch: divide the summed loss by this number instead of taking the mean.
            shift_labels: (B, T) labels that are already shifted: position t is scored against label t.

        Returns:
            `CausalLMOutputWithPast`, or with `return_dict=False` the tuple of its values that are not None.
        """
        shift_labels = more.pop("shift_labels", None)  # not in the signature: Trainer would expect it in every batch
        if more:
            raise TypeError(f"LlamaForCausalLM.forward() got an unexpected keyword argument {sorted(more)[0]!r}")
        if num_logits_to_keep is not None:
            logits_to_keep = num_logits_to_keep
        if isinstance(logits_to_keep, torch.Tensor):
            if logits_to_keep.dim() != 1:
                raise ValueError(f"logits_to_keep must be an int or indices (n,), got {_describe(logits_to_keep)}")
        elif (logits_to_keep := int(logits_to_keep)) < 0:  # int() for NumPy's integers
            raise ValueError(f"logits_to_keep must be 0 (all) or more, got {logits_to_keep}")
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True,
            cache_position=cache_position, packed=packed,
        )  # fmt: skip
        x = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0 is 0: all
        kept_x = x[:, kept]
        with _numpy_for_rows(kept_x, self.config.vocab_size * self.config.hidden_size, self.backend):
            logits = ops.linear(self.lm_head, kept_x)
        loss = None
        if labels is not None or shift_labels is not None:
            told: dict[str, Any] = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            if ignore_index != -100:
                told["ignore_index"] = ignore_index
            if labels is not None and shift_labels is None:
                _check_labels(labels, x.shape[:2])
                if kept != slice(0, None):
                    shift_labels = _shifted(labels, ignore_index)
            if shift_labels is not None:
                _check_labels(shift_labels, x.shape[:2], "shift_labels")
                told["shift_labels"] = shift_labels[:, kept]
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **told)
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return out if self._wants_dict(return_dict) else out.to_tuple()

    def loss_function(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss of logits (B, T, V) for labels (B, T), a float32 scalar; `forward` documents the arguments.

        May be replaced by any function with these argument names. `vocab_size` is redundant: the logits imply it.
        """
        if shift_labels is None:
            if labels is None:
                raise ValueError("labels or shift_labels must be given")
            shift_labels = _shifted(labels, ignore_index)
        return ops.cross_entropy(logits, shift_labels, num_items_in_batch, ignore_index, self.backend)


class LlamaForSequenceClassification(LlamaPreTrainedModel):
    """`LlamaModel` with a head that scores every label at a sequence's last token."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = _linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Classify sequences. Takes the arguments of `LlamaModel.forward`, and:

        Args:
            labels: (B,) ids for single-label classification, (B, num_labels) floats of 0 and 1 for multi-label, floats
                for regression. `config.problem_type` says which; if it is None, `num_labels == 1` means regression,
                and otherwise integers mean single-label and floats multi-label.

        The last token is the rightmost that is not `config.pad_token_id` or, with `inputs_embeds`, the rightmost that
        `attention_mask` does not mask.

        Raises:
            ValueError: as `LlamaModel.forward`; or there are several sequences and no `pad_token_id`.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True,
            cache_position=cache_position,
        )  # fmt: skip
        x = out.last_hidden_state
        B, T, _ = x.shape
        pad = self.config.pad_token_id
        if pad is None and B > 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined: set config.pad_token_id")
        last: torch.Tensor | int = -1
        real = None
        if input_ids is not None and pad is not None:
            real = input_ids != pad
        elif inputs_embeds is not None and attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -T:] != 0
        if real is not None:
            last = (torch.arange(T, device=x.device) * real.to(x.device)).argmax(-1)
        logits = self.score(x[torch.arange(B, device=x.device), last])
        out = SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels.to(logits.device)),
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return out if self._wants_dict(return_dict) else out.to_tuple()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kind = self.config.problem_type
        if kind is None:
            single = not labels.is_floating_point()
            kind = "regression" if self.num_labels == 1 else f"{'single' if single else 'multi'}_label_classification"
        if kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.to(logits.dtype).squeeze())
        if kind == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1).long())
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class LlamaForTokenClassification(LlamaPreTrainedModel):
    """`LlamaModel` with a head that scores every label at every token."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        if dropout is None:
            dropout = getattr(config, "hidden_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = _linear(config.hidden_size, self.num_labels, bias=True)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify tokens. Arguments as `LlamaModel.forward`; `labels` is (B, T), where -100 is ignored."""
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.score(self.dropout(out.last_hidden_state))
        out = TokenClassifierOutput(
            loss=None if labels is None else ops.cross_entropy(logits, labels, backend=self.backend),
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return out if self._wants_dict(return_dict) else out.to_tuple()


class LlamaForQuestionAnswering(LlamaPreTrainedModel):
    """`LlamaModel` with two scores for every token: that the answer starts there, and that it ends there."""

    base_model_prefix = "transformer"  # transformers' name in this one class, and in its checkpoints

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.transformer = LlamaModel(config)
        self.qa_outputs = _linear(config.hidden_size, 2, bias=True)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score the answer's start and end. Arguments as `LlamaModel.forward`; `start_positions` and `end_positions`
        are (B,), and positions beyond the sequence are ignored."""
        out = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=True,
        )  # fmt: skip
        start, end = self.qa_outputs(out.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_border_loss(start, start_positions) + _border_loss(end, end_positions)) / 2
        out = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return out if self._wants_dict(return_dict) else out.to_tuple()


def _numpy_for_rows(x: torch.Tensor, size: int, backend: str) -> AbstractContextManager:
    """`ops.rows_for_numpy`; a no-op for Triton and under torch.compile, which cannot trace the context manager."""
    return nullcontext() if torch.compiler.is_compiling() or backend == "triton" else ops.rows_for_numpy(x, size)


def _border_loss(scores: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Mean -log p of the positions (B,) under scores (B, T), ignoring positions beyond the sequence."""
    beyond = scores.shape[1]
    places = places.reshape(-1).to(scores.device, torch.long).clamp(0, beyond)
    return F.cross_entropy(scores, places, ignore_index=beyond)


def _shifted(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Shift (B, T) labels left by one position; the last one becomes `ignore_index`."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _check_labels(labels: torch.Tensor, shape: torch.Size, name: str = "labels") -> None:
    if labels.shape != shape:
        raise ValueError(f"{name} must have the tokens' shape {tuple(shape)}, got {tuple(labels.shape)}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


ops.note_forwards(
    LlamaForCausalLM, LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
)
