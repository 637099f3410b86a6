"""The model in PyTorch: transformers' Llama classes, module by module and name by name.

Start at `LlamaModel.forward`; the modules it calls stand above it, the heads below. What is computed on every token
lives in `llama.ops`; what every model can do (load, save, resize ...) in `llama.pretrained`; writing text in
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

    The frequencies stay float32 whatever the model is moved to: in bfloat16 they would turn position 2000 by up to 2.4
    radians too far (LLaMA 7B). Of types whose angles follow the length (dynamic, longrope), the longest row of the
    batch decides for all.
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
        """`inv_freq`, which no text changes here."""
        return self.inv_freq

    def _apply(self, fn: Any, recurse: bool = True) -> "LlamaRotaryEmbedding":
        """Follow the model to its device, not to its dtype; and be whole again after a stay on "meta"."""
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
    """The reference's frequencies (D/2,) for a text that reaches the largest of the positions.

    An operator of its own, so that torch.compile does not look into it; the configuration comes as JSON. It waits for
    the device, once a pass, to learn the length.
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
        self.heads = list(range(heads))  # those that are left, by their first numbers
        self.kv_of = [head * kv_heads // heads for head in self.heads]  # the key/value head that each of them reads
        self.groups_are_even = True

    @property
    def scaling(self) -> float:
        """What the scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def is_causal(self) -> bool:
        """Where no mask is given a token sees itself and what is before it. As `scaling`, not to be changed."""
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
        """(B, T, E) -> (B, T, E), and the weights (B, H, T, S) where they are asked for or "eager" makes them.

        `position_embeddings` are cos and sin. What else a layer of transformers hands over is not needed.
        """
        if position_embeddings is None:
            raise ValueError("position_embeddings must be (cos, sin), as model.rotary_emb(x, position_ids) makes them")
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
        """Take these query heads out, and every key/value head that no query head reads any more.

        Heads keep their first numbers, however often one prunes.
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
        self.groups_are_even = len(set(groups)) == 1  # neighbours still, for the order is kept


def _select(module: nn.Linear, places: torch.Tensor, dim: int) -> nn.Linear:
    """A Linear of some of `module`'s outputs (dim 0) or inputs (dim 1)."""
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
        """(B, T, E) -> (B, T, E). The attention's weights are added to `attentions` where there is such a list.

        Names and order are transformers'. `position_embeddings`, cos and sin, say where the tokens stand; that, and
        what else comes, is handed on to the attention.
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
    """Everything below a head: embedding, layers, final norm. transformers' `LlamaModel`."""

    base_model_prefix = ""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        pad = config.pad_token_id
        self.padding_idx = None if pad is None or pad < 0 else pad  # the first LLaMA's files say -1
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, self.padding_idx,
            _weight=torch.empty(config.vocab_size, config.hidden_size, device=device_of_weights()),  # post_init draws
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
        """Read T tokens after the P that the cache holds.

        Args:
            input_ids: (B, T) ids; or `inputs_embeds`, (B, T, E), in their place.
            attention_mask: (B, P + T), 0 where there is padding; or (B or 1, H or 1, T, P + T), taken as it is: bool,
                True where a token may look, or float, which is added to the scores. Default: no padding.
            position_ids: (B or 1, T). Default: every row counts its unmasked tokens from 0, so that a padded row is
                read as it would be alone. (transformers' forward counts padding too, its generate does not.)
            past_key_values: a `Cache`, or a tuple over layers of (keys, values). It is filled in place.
            use_cache: return a cache, a new one if none was handed in. Default: as `config.use_cache` says.
            cache_position: (T,), where these tokens stand. Only P .. P + T - 1 is possible, and left out as a rule; an
                earlier place crops the cache to it.
            packed: the rows hold several texts; one begins wherever `position_ids` do not go on by one. Without a cache
                and a mask that needs no saying: there, as in transformers, `position_ids` decide.

        Returns:
            `BaseModelOutputWithPast`, or with `return_dict=False` the tuple of what is not None.

        Raises:
            ValueError: an argument of the wrong shape: a mask that does not cover the cache and the new tokens, say.
            IndexError: an id outside the vocabulary.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        recompute = recompute and past_key_values is None  # a cache would be filled twice
        if recompute:
            use_cache = False  # what would be kept is what is meant to be forgotten

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
        """Where the tokens stand, (B or 1, T), and whom they see: None for all before them, a mask of four axes, or
        what the kernels take in its place."""
        B, T, _ = x.shape
        compiling = torch.compiler.is_compiling()
        if cache_position is not None and not compiling:
            start, held = int(cache_position[0]), 0 if cache is None else cache.get_seq_length()
            if not 0 <= start <= held or cache_position.tolist() != list(range(start, start + T)):
                raise ValueError(
                    f"cache_position must be {T} places from {held}, the cache's end; got {cache_position}"
                )
            if cache is not None and start < held:
                cache.crop(start - held)  # negative, as transformers' own now want it
        past = 0 if cache is None else cache.get_seq_length()
        total, masked = past + T, attention_mask is not None
        if attention_mask is not None:
            room = None if cache is None else getattr(cache, "max_cache_len", None)
            if attention_mask.dim() in (2, 4) and attention_mask.shape[-1] == room:
                attention_mask = attention_mask[..., :total]  # as wide as a static cache, as transformers wants it
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
            raise ValueError("packed needs position_ids, which begin anew where a text does")
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
            raise ValueError("packed rows cannot follow a cache")
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
            raise ValueError("packed cannot be joined with a float attention_mask; put the texts' borders into it")
        if mask is not None and mask.is_floating_point() and mask.dtype != x.dtype:
            mask = mask.to(x.dtype)
        return position_ids, mask


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """The language model: `LlamaModel` with a score for every token of the vocabulary."""

    _tied_weights_keys = ("lm_head.weight",)
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # transformers' Trainer asks it whether labels are shifted

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
        """Score the next token of every token. Arguments as `LlamaModel.forward`, and:

        Args:
            labels: (B, T) ids, as a rule `input_ids` again: token t is scored against label t + 1. `ignore_index` does
                not count.
            logits_to_keep: an int n computes the last n positions only, 0 all; a tensor (n,) of indices, those. The
                loss then counts what is computed. `num_logits_to_keep` is transformers 4's name for it.
            num_items_in_batch: the loss is the sum over this number instead of the mean.
            shift_labels: (B, T) labels that are shifted already: token t is scored against label t.

        Returns:
            `CausalLMOutputWithPast`, or with `return_dict=False` the tuple of what is not None.
        """
        shift_labels = more.pop("shift_labels", None)  # not in the signature: Trainer wants all labels that it names
        if more:
            raise TypeError(f"LlamaForCausalLM.forward() got an unexpected keyword argument {sorted(more)[0]!r}")
        if num_logits_to_keep is not None:
            logits_to_keep = num_logits_to_keep
        if isinstance(logits_to_keep, torch.Tensor):
            if logits_to_keep.dim() != 1:
                raise ValueError(f"logits_to_keep must be a number or indices (n,), got {_describe(logits_to_keep)}")
        elif (logits_to_keep := int(logits_to_keep)) < 0:  # NumPy's numbers are integers too
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
        """What `forward` makes of logits (B, T, V) and labels (B, T), as a float32 scalar; its arguments are explained
        there. Another function of these names may be put in its place. `vocab_size` says nothing that the logits do
        not."""
        if shift_labels is None:
            if labels is None:
                raise ValueError("labels or shift_labels must be given")
            shift_labels = _shifted(labels, ignore_index)
        return ops.cross_entropy(logits, shift_labels, num_items_in_batch, ignore_index, self.backend)


class LlamaForSequenceClassification(LlamaPreTrainedModel):
    """`LlamaModel` with a score for every label, read off the last token of a text."""

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
        """Score the texts. Arguments as `LlamaModel.forward`, and:

        Args:
            labels: (B,) ids for single-label classification, (B, num_labels) floats of 0 and 1 for multi-label, floats
                for regression. Which of them is meant `config.problem_type` says, or one label (regression) or integers
                (single-label) do.

        The last token is the rightmost that is not `config.pad_token_id`; with `inputs_embeds` the rightmost that
        `attention_mask` lets through.

        Raises:
            ValueError: as `LlamaModel.forward`; or several texts and no `pad_token_id`.
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
    """`LlamaModel` with a score for every label and token."""

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
        """Score every token. Arguments as `LlamaModel.forward`; `labels` (B, T), -100 does not count."""
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

    base_model_prefix = "transformer"  # transformers' name for it in this one class, and in its files

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
        """Score the answer's borders. Arguments as `LlamaModel.forward`; `start_positions` and `end_positions` (B,),
        of which those beyond the text do not count."""
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
    """`ops.rows_for_numpy`; torch.compile cannot look into a context manager of ours, so there is none for it."""
    return nullcontext() if torch.compiler.is_compiling() or backend == "triton" else ops.rows_for_numpy(x, size)


def _border_loss(scores: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """-log p of the places (B,) under scores (B, T); a place beyond the text does not count."""
    beyond = scores.shape[1]
    places = places.reshape(-1).to(scores.device, torch.long).clamp(0, beyond)
    return F.cross_entropy(scores, places, ignore_index=beyond)


def _shifted(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """(B, T) labels of the tokens -> (B, T) labels of what comes after them, nothing after the last."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _check_labels(labels: torch.Tensor, shape: torch.Size, name: str = "labels") -> None:
    if labels.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, as the tokens; got {tuple(labels.shape)}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


ops.note_forwards(
    LlamaForCausalLM, LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
)
