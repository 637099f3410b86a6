"""A decoding step on a CPU: one row through the layers, in NumPy.

Such a step reads every weight once and computes very little, so the overhead between the matrix products matters, and
NumPy's operations have less of it than PyTorch's (NOTES.md). This module therefore reimplements `LlamaDecoderLayer` for
this one shape, with the same cache. If any layer is customised, by an adapter or a hook for example, all layers run as
modules instead; a test checks that the two agree.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from . import modeling, ops
from .cache import Cache

Arrays = tuple[np.ndarray, np.ndarray | None]  # a weight and a bias
Plan = list[tuple["modeling.LlamaAttention", float, list[Arrays]]]
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def plan(model: "modeling.LlamaModel", cache: Any) -> Plan | None:
    """The layers' weights for `read`; None unless NumPy handles single rows here and every layer is a plain one."""
    if not ops.numpy_has_rows() or model.training or not (cache is None or isinstance(cache, Cache)):
        return None
    layers: Plan = []
    for layer in model.layers:
        arrays = _arrays(layer)
        if arrays is None:
            return None
        attention = layer._modules["self_attn"]
        layers.append((attention, layer._modules[NORMS[0]].variance_epsilon, arrays))  # type: ignore[arg-type,union-attr]
    return layers


def _arrays(layer: nn.Module) -> list[Arrays] | None:
    """q, k, v, o, gate, up, down and the two norms, or None. Avoids nn.Module's attribute access, which is slow."""
    if type(layer) is not modeling.LlamaDecoderLayer or not ops.is_unwatched(layer):
        return None
    parts = layer._modules
    attention, mlp, found = parts["self_attn"], parts["mlp"], []
    if type(attention) is not modeling.LlamaAttention or type(mlp) is not modeling.LlamaMLP:
        return None
    act = mlp._modules["act_fn"]
    if type(act) is not nn.SiLU or not attention.groups_are_even:
        return None
    if not (ops.is_unwatched(attention) and ops.is_unwatched(mlp) and ops.is_unwatched(act)):
        return None
    for owner, names in ((attention, ATTENTION), (mlp, MLP)):
        for name in names:
            module = owner._modules[name]
            if module is None or not ops.is_plain(module):
                return None
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            assert weight is not None
            found.append((weight.detach().numpy(), None if bias is None else bias.detach().numpy()))
    for name in NORMS:
        norm = parts[name]
        if type(norm) is not modeling.LlamaRMSNorm or not ops.is_unwatched(norm):
            return None
        weight = norm._parameters["weight"]
        if weight is None or weight.dtype != torch.float32:
            return None
        found.append((weight.detach().numpy(), None))
    return found


def read(
    layers: Plan, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], cache: Cache | None
) -> torch.Tensor:
    """Run all layers on x (1, 1, E), the embedding of one token; return the input of the final norm."""
    row = x.numpy().reshape(-1)
    cos, sin = (table.numpy().reshape(-1) for table in rotation)
    half = len(sin) // 2
    sin = np.concatenate((-sin[:half], sin[half:]))  # with rotate_half's sign, which leaves only a swap
    with np.errstate(all="ignore"):  # like PyTorch, which does not warn about overflows
        for attention, eps, (q, k, v, o, gate, up, down, (first, _), (second, _)) in layers:
            row = row + _attend(attention, q, k, v, o, _norm(row, first, eps), cos, sin, cache)
            normed = _norm(row, second, eps)
            hidden = _product(gate, normed)
            hidden /= 1 + np.exp(-hidden)
            hidden *= _product(up, normed)
            row = row + _product(down, hidden)
    return torch.from_numpy(row).view(x.shape)


def _attend(
    module: "modeling.LlamaAttention",
    q: Arrays,
    k: Arrays,
    v: Arrays,
    o: Arrays,
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    cache: Cache | None,
) -> np.ndarray:
    H, K, D = len(module.heads), module.kv_of[-1] + 1, module.head_dim
    qk = np.empty((H + K) * D, np.float32)
    _product(q, x, qk[: H * D])
    _product(k, x, qk[H * D :])
    turned = qk.reshape(H + K, 2, D // 2)[:, ::-1].reshape(H + K, D) * sin
    turned += qk.reshape(H + K, D) * cos
    keys, values = turned[H:, None], _product(v, x).reshape(K, 1, D)
    if cache is not None:
        new = torch.from_numpy(keys)[None], torch.from_numpy(values)[None]
        keys, values = (held.numpy()[0] for held in cache.update(*new, module.layer_idx))
    scores = (turned[:H].reshape(K, H // K, D) * np.float32(D**-0.5)) @ keys.transpose(0, 2, 1)  # (K, G, S)
    np.exp(scores - scores.max(-1, keepdims=True), out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return _product(o, (scores @ values).reshape(-1))


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x * (1 / np.sqrt(np.float32(float(x @ x) / len(x) + eps))) * weight


def _product(arrays: Arrays, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    weight, bias = arrays
    y = ops.product(weight, x, out)
    if bias is not None:
        y += bias
    return y
