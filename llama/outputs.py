"""What the models return: dictionaries that are also attributes and tuples, as transformers' `ModelOutput`."""

from collections import OrderedDict
from inspect import get_annotations
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .cache import Cache

Tensors = tuple[torch.Tensor, ...]


class ModelOutput(OrderedDict):
    """A record whose fields read as `out.logits`, `out["logits"]` and `out[0]`.

    A field that is None is absent: it is not a key, and the tuple omits it. Fields are the class's annotations, in the
    order of transformers' tuples.
    """

    _fields: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._fields = tuple(get_annotations(cls))
        # So that FSDP's hooks, torch.export and torch.func find the tensors in it.
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out)),
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"llama.outputs.{cls.__name__}",
        )

    def __init__(self, values: Any = None, /, **fields: Any):
        fields = {**dict(values or ()), **fields}
        if unknown := fields.keys() - set(self._fields):
            raise TypeError(f"{type(self).__name__} has no field {sorted(unknown)[0]!r}")
        super().__init__({name: fields[name] for name in self._fields if fields.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self._fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._fields:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self) -> tuple:
        return type(self), (dict(self),)

    def to_tuple(self) -> tuple:
        """The values that are not None, in order."""
        return tuple(self[name] for name in self._fields if self.get(name) is not None)


class BaseModelOutputWithPast(ModelOutput):
    """last_hidden_state (B, T, E), after the final norm. hidden_states: num_hidden_layers + 1 of (B, T, E), the
    embeddings first and the normed output last. attentions: num_hidden_layers of (B, H, T, S)."""

    last_hidden_state: torch.Tensor
    past_key_values: Cache | None
    hidden_states: Tensors | None
    attentions: Tensors | None


class CausalLMOutputWithPast(ModelOutput):
    """loss: a float32 scalar. logits (B, T, V) in the model's dtype."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    past_key_values: Cache | None
    hidden_states: Tensors | None
    attentions: Tensors | None


class SequenceClassifierOutputWithPast(ModelOutput):
    """logits (B, num_labels)."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    past_key_values: Cache | None
    hidden_states: Tensors | None
    attentions: Tensors | None


class TokenClassifierOutput(ModelOutput):
    """logits (B, T, num_labels)."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: Tensors | None
    attentions: Tensors | None


class QuestionAnsweringModelOutput(ModelOutput):
    """start_logits and end_logits (B, T)."""

    loss: torch.Tensor | None
    start_logits: torch.Tensor
    end_logits: torch.Tensor
    hidden_states: Tensors | None
    attentions: Tensors | None


class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences (B, S). scores and logits: one (B, V) per step, float32, after and before processing. attentions and
    hidden_states: one tuple over layers per step; the first step's cover the prompt."""

    sequences: torch.Tensor
    scores: Tensors | None
    logits: Tensors | None
    attentions: tuple[Tensors, ...] | None
    hidden_states: tuple[Tensors, ...] | None
    past_key_values: Cache | None


class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """As `GenerateDecoderOnlyOutput`; scores are of all beams (B · num_beams, V). sequences_scores (B,): the sum of log
    probabilities over length ** length_penalty. beam_indices (B, steps): which beam each token came from, then -1."""

    sequences: torch.Tensor
    sequences_scores: torch.Tensor | None
    scores: Tensors | None
    logits: Tensors | None
    beam_indices: torch.Tensor | None
    attentions: tuple[Tensors, ...] | None
    hidden_states: tuple[Tensors, ...] | None
    past_key_values: Cache | None
