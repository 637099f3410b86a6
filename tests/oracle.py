"""transformers' LLaMA, with weights that expose mistakes, and its parameters as NumPy arrays."""

import copy

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification


def transformers_config(fields: dict, **more) -> LlamaConfig:
    return LlamaConfig(**copy.deepcopy(fields), **more, attn_implementation="eager")


def transformers_model(fields: dict, seed: int, cls=LlamaForCausalLM, **more):
    """Return a model and its `params`: weights large enough for sharp attention, norm weights ≠ 1, biases ≠ 0."""
    torch.manual_seed(seed)
    model = cls(transformers_config(fields, **more)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias") or "embed" in name:
                weight.normal_(0, 1)
            else:
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def classifier(fields: dict, seed: int, num_labels: int):
    return transformers_model(fields, seed, LlamaForSequenceClassification, num_labels=num_labels)


def as_float64(params: dict) -> dict:
    return {name: array.astype(np.float64) for name, array in params.items()}


def miss(ours, theirs) -> float:
    """Return the largest absolute difference, relative to the largest magnitude in `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)) if ours.size else 0.0


def both_models(fields: dict, seed: int, kind: str = "LlamaForCausalLM", attn_implementation=None, **more):
    """Return (ours, transformers') of one class with the same weights; `more` are further config fields."""
    import llama

    theirs, _ = transformers_model(fields, seed, getattr(transformers, kind), **more)
    config = llama.LlamaConfig(**copy.deepcopy(fields), **more, attn_implementation=attn_implementation)
    ours = getattr(llama, kind)(config).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: names and shapes must match
    return ours, theirs


def counted_positions(ids, mask) -> torch.Tensor:
    """Return position ids that skip padding, as `generate` and our forward derive them from the mask."""
    return torch.tensor(np.maximum(np.cumsum(np.ones_like(ids) if mask is None else mask, axis=1) - 1, 0))
