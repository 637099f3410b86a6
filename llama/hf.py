"""Our models as transformers' `PreTrainedModel`, for libraries that insist on one. Importing this needs transformers.

The modules and the forward pass are ours; everything around them (from_pretrained, generate, device maps, quantisation)
is transformers'. `register()` makes its Auto classes return these models.
"""

from functools import wraps
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, modeling_outputs

from . import modeling, ops
from .cache import StaticCache
from .config import LlamaConfig


class LlamaPreTrainedModel(ops.Computes, PreTrainedModel):
    """A `PreTrainedModel` that wraps one of our models and uses its forward pass."""

    config_class = transformers.LlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012  (transformers extends it in place)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = False
    ours: type[modeling.LlamaPreTrainedModel]

    def __init__(self, config: transformers.LlamaConfig):
        super().__init__(config)
        model = self.ours(LlamaConfig.from_dict(config.to_dict() | {"attn_implementation": None}))
        for name, module in model.named_children():
            self.add_module(name, module)
        self.num_labels, self.vocab_size = config.num_labels, config.vocab_size
        self.gradient_checkpointing_kwargs = model.gradient_checkpointing_kwargs
        self.gradient_checkpointing = False
        self.post_init()

    set_backend = modeling.LlamaPreTrainedModel.set_backend

    def _init_weights(self, module: nn.Module) -> None:
        """transformers' rules, and RoPE's frequencies, which it mistakes for weights missing from the file."""
        if isinstance(module, modeling.LlamaRotaryEmbedding):
            module._apply(lambda tensor: tensor)
        else:
            super()._init_weights(module)

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict) if return_dict is None else return_dict


def _forward(ours: type[modeling.LlamaPreTrainedModel], record: type[modeling_outputs.ModelOutput]) -> Any:
    """Our forward pass, returning transformers' output class, which libraries check for."""

    @wraps(ours.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = ours.forward(self, *args, **kwargs)
        return out if isinstance(out, tuple) else record(**out)

    return forward


class LlamaModel(LlamaPreTrainedModel):
    ours = modeling.LlamaModel
    forward = _forward(modeling.LlamaModel, modeling_outputs.BaseModelOutputWithPast)
    _embed, _places = modeling.LlamaModel._embed, modeling.LlamaModel._places


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    ours = modeling.LlamaForCausalLM
    forward = _forward(modeling.LlamaForCausalLM, modeling_outputs.CausalLMOutputWithPast)
    loss_function = modeling.LlamaForCausalLM.loss_function
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Use ours for `cache_implementation="static"`: transformers' also returns its empty entries."""
        return StaticCache(self.model.config, max_cache_len)


class LlamaForSequenceClassification(LlamaPreTrainedModel):
    ours = modeling.LlamaForSequenceClassification
    forward = _forward(modeling.LlamaForSequenceClassification, modeling_outputs.SequenceClassifierOutputWithPast)
    _loss = modeling.LlamaForSequenceClassification._loss


class LlamaForTokenClassification(LlamaPreTrainedModel):
    ours = modeling.LlamaForTokenClassification
    forward = _forward(modeling.LlamaForTokenClassification, modeling_outputs.TokenClassifierOutput)


class LlamaForQuestionAnswering(LlamaPreTrainedModel):
    base_model_prefix = "transformer"
    ours = modeling.LlamaForQuestionAnswering
    forward = _forward(modeling.LlamaForQuestionAnswering, modeling_outputs.QuestionAnsweringModelOutput)


def register() -> None:
    """Make transformers' Auto classes return the classes here for every `LlamaConfig`."""
    for auto, model in (
        (transformers.AutoModel, LlamaModel),
        (transformers.AutoModelForCausalLM, LlamaForCausalLM),
        (transformers.AutoModelForSequenceClassification, LlamaForSequenceClassification),
        (transformers.AutoModelForTokenClassification, LlamaForTokenClassification),
        (transformers.AutoModelForQuestionAnswering, LlamaForQuestionAnswering),
    ):
        auto.register(transformers.LlamaConfig, model, exist_ok=True)
