"""The feed-forward half of a block: a gated multi-layer perceptron (SwiGLU)."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Array = Float[np.ndarray, "..."]


def linear(x: Float[np.ndarray, "*batch I"], params: dict, name: str) -> Float[np.ndarray, "*batch O"]:
    """W x (+ b). Checkpoints store W as (out, in), hence the transpose."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    y = x.reshape(-1, x.shape[-1]) @ weight.T  # one product for the whole batch, so W is read once
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], -1)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x). If e^-x overflows to infinity the result is 0, which is correct."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    """x · sigmoid(x), also called swish                        (Hendrycks & Gimpel 2016; Elfwing et al. 2017)"""
    return x * sigmoid(x)


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[x.dtype])(x)  # NumPy has no erf


def gelu(x: Array) -> Array:
    """x · Φ(x), Φ being the standard normal CDF                (Hendrycks & Gimpel 2016)"""
    return 0.5 * x * (1 + _erf(x * 2**-0.5))


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU                           (Hendrycks & Gimpel 2016, §2)"""
    return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def mish(x: Array) -> Array:
    """x · tanh(ln(1 + e^x))                                    (Misra 2019)"""
    return x * np.tanh(np.logaddexp(0, x))


# The values of `hidden_act`: transformers' activations without learned parameters. Meta's models all use silu.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_10": lambda x: np.clip(gelu(x), -10, 10),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "mish": mish,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + _erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "linear": lambda x: x,
}


def swiglu(gate: Float[np.ndarray, "*batch F"], up: Float[np.ndarray, "*batch F"]) -> Float[np.ndarray, "*batch F"]:
    """silu(gate) · up: one projection gates the other                         (Shazeer 2020, eq. 5, no biases)"""
    return silu(gate) * up


def gemv(x: Float[np.ndarray, "R I"], *weights: Float[np.ndarray, "_ I"]) -> Float[np.ndarray, "R O"]:
    """x Wᵀ for several weights, concatenated. The model here does not use it; it specifies a kernel for decoding."""
    return np.concatenate([x @ weight.T for weight in weights], axis=1)


def gemv_swiglu(
    x: Float[np.ndarray, "R I"], gate: Float[np.ndarray, "F I"], up: Float[np.ndarray, "F I"]
) -> Float[np.ndarray, "R F"]:
    """The first half of `feed_forward`, for silu. Like `gemv`, it only specifies a kernel for decoding."""
    return swiglu(x @ gate.T, x @ up.T)


def feed_forward(
    x: Float[np.ndarray, "*batch E"], params: dict, prefix: str, hidden_act: str
) -> Float[np.ndarray, "*batch E"]:
    """W_down (act(W_gate x) · (W_up x))                                        (Shazeer 2020, eq. 6, for silu)

    `prefix` names the weights, e.g. "model.layers.0.mlp".
    """
    gate, up = linear(x, params, f"{prefix}.gate_proj"), linear(x, params, f"{prefix}.up_proj")
    hidden = ACTIVATIONS[hidden_act](gate) * up  # with silu this is swiglu(gate, up)
    return linear(hidden, params, f"{prefix}.down_proj")
