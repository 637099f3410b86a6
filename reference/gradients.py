"""Backward passes: each maps the gradient of a function's output to those of its inputs. No kernels implement them yet.

`dy` stands for ∂loss/∂y. The shapes are those of the forward functions.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from .attention import attention_weights
from .feed_forward import sigmoid
from .loss import judged, log_softmax
from .rope import rotate_half


def rms_norm_backward(
    dy: Float[np.ndarray, "*batch E"],
    x: Float[np.ndarray, "*batch E"],
    weight: Float[np.ndarray, "E"],
    eps: float,
) -> tuple[Float[np.ndarray, "*batch E"], Float[np.ndarray, "E"]]:
    """(dx, dweight) of `rms_norm`.

        r = 1 / sqrt(mean(x²) + ε),   dx = r · (dy·w - x · r² · mean(dy·w·x)),   dw = Σ dy · x · r

    The second term of dx removes the gradient's component along x: rescaling x does not change the output, up to ε.
    """
    r = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)
    g = dy * weight
    dx = r * (g - x * r**2 * np.mean(g * x, axis=-1, keepdims=True))
    return dx, (dy * x * r).reshape(-1, x.shape[-1]).sum(axis=0)


def apply_rope_backward(
    dq: Float[np.ndarray, "B H T D"],
    dk: Float[np.ndarray, "B K T D"],
    cos: Float[np.ndarray, "#B T D"],
    sin: Float[np.ndarray, "#B T D"],
) -> tuple[Float[np.ndarray, "B H T D"], Float[np.ndarray, "B K T D"]]:
    """(dq, dk) of `apply_rope`, from those of its outputs: the inverse rotation.

    dx = dx' · cos - rotate_half(dx' · sin); for tables whose halves are equal this is apply_rope with -sin.
    """
    cos, sin = cos[:, None], sin[:, None]
    return dq * cos - rotate_half(dq * sin), dk * cos - rotate_half(dk * sin)


def swiglu_backward(
    dy: Float[np.ndarray, "*batch F"], gate: Float[np.ndarray, "*batch F"], up: Float[np.ndarray, "*batch F"]
) -> tuple[Float[np.ndarray, "*batch F"], Float[np.ndarray, "*batch F"]]:
    """(dgate, dup) of `swiglu`.

    With σ = sigmoid(gate):   dgate = dy · up · σ · (1 + gate · (1 - σ)),   dup = dy · gate · σ
    """
    s = sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def attention_backward(
    dout: Float[np.ndarray, "B H T D"],
    q: Float[np.ndarray, "B H T D"],
    k: Float[np.ndarray, "B K S D"],
    v: Float[np.ndarray, "B K S D"],
    visible: Bool[np.ndarray, "#B T S"],
) -> tuple[Float[np.ndarray, "B H T D"], Float[np.ndarray, "B K S D"], Float[np.ndarray, "B K S D"]]:
    """(dq, dk, dv) of `attention`                                (Dao et al. 2022, §B.2)

        dv = Pᵀ do,   dP = do vᵀ,   dS = P · (dP - rowsum(P · dP)),   dq = dS k / √D,   dk = dSᵀ q / √D

    P are the attention weights; dP and dS are the gradients of P and of the scores before the softmax (the paper's
    notation; in the code S is the number of keys). A key/value head accumulates over all query heads of its group. A
    query that sees nothing has P = 0 and neither contributes nor receives a gradient.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    grouped = (B, K, H // K * T)  # a group's heads and their queries in one axis
    P = attention_weights(q, k, visible).reshape(*grouped, S)
    do = dout.reshape(*grouped, D)
    dv = P.swapaxes(-1, -2) @ do
    dP = do @ v.swapaxes(-1, -2)
    dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True))
    dq = (dS @ k).reshape(q.shape) * D**-0.5
    dk = dS.swapaxes(-1, -2) @ q.reshape(*grouped, D) * D**-0.5
    return dq, dk, dv


def cross_entropy_backward(
    logits: Float[np.ndarray, "*batch V"], labels: Int[np.ndarray, "*batch"], ignore_index: int = -100
) -> Float[np.ndarray, "*batch V"]:
    """dlogits of `cross_entropy` (the mean), for an upstream gradient of 1.

        dlogits = (softmax(logits) - onehot(label)) / n     at the n positions that count

    0 elsewhere, and everywhere if no position counts (the loss is then NaN). Raises as `cross_entropy` does.
    """
    counted = judged(labels, logits.shape[-1], ignore_index)
    dlogits = np.zeros_like(logits)
    dlogits[counted] = np.exp(log_softmax(logits[counted]))
    dlogits[(*np.nonzero(counted), labels[counted])] -= 1
    return dlogits / max(int(counted.sum()), 1)
