"""Our models as transformers' `PreTrainedModel`, for libraries that insist on one. Only this module needs transformers.

The modules and the forward pass are ours, what surrounds them (from_pretrained, generate, device maps, quantisation) is
transformers' own. `register()` makes its Auto classes give these.
"""

import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from . import modeling, ops
from .config import LlamaConfig


class LlamaPreTrainedModel(ops.Computes, PreTrainedModel):
    """A `PreTrainedModel` around a model of ours, whose forward pass it takes over."""

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
        """transformers' rules; and RoPE's frequencies, which it takes for weights that were not in the file."""
        super()._init_weights(module)
        if isinstance(module, modeling.LlamaRotaryEmbedding):
            module._apply(lambda tensor: tensor)

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict) if return_dict is None else return_dict


class LlamaModel(LlamaPreTrainedModel):
    ours = modeling.LlamaModel
    forward = modeling.LlamaModel.forward
    _embed, _places = modeling.LlamaModel._embed, modeling.LlamaModel._places


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    ours = modeling.LlamaForCausalLM
    forward = modeling.LlamaForCausalLM.forward
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012


class LlamaForSequenceClassification(LlamaPreTrainedModel):
    ours = modeling.LlamaForSequenceClassification
    forward = modeling.LlamaForSequenceClassification.forward
    _loss = modeling.LlamaForSequenceClassification._loss


class LlamaForTokenClassification(LlamaPreTrainedModel):
    ours = modeling.LlamaForTokenClassification
    forward = modeling.LlamaForTokenClassification.forward


class LlamaForQuestionAnswering(LlamaPreTrainedModel):
    base_model_prefix = "transformer"
    ours = modeling.LlamaForQuestionAnswering
    forward = modeling.LlamaForQuestionAnswering.forward


def register() -> None:
    """Let transformers' Auto classes give the classes here for every configuration of a Llama."""
    for auto, model in (
        (transformers.AutoModel, LlamaModel),
        (transformers.AutoModelForCausalLM, LlamaForCausalLM),
        (transformers.AutoModelForSequenceClassification, LlamaForSequenceClassification),
        (transformers.AutoModelForTokenClassification, LlamaForTokenClassification),
        (transformers.AutoModelForQuestionAnswering, LlamaForQuestionAnswering),
    ):
        auto.register(transformers.LlamaConfig, model, exist_ok=True)
