"""The training loss: how surprised the model is by what came next."""

import numpy as np
from jaxtyping import Float, Int


def log_softmax(logits: Float[np.ndarray, "*batch V"]) -> Float[np.ndarray, "*batch V"]:
    """x - ln Σ exp(x), shifted by the maximum so that nothing overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(
    logits: Float[np.ndarray, "*batch V"], labels: Int[np.ndarray, "*batch"], ignore_index: int = -100
) -> np.floating:
    """The mean of -log p(label) over all labels but `ignore_index`; NaN when there is none, as in PyTorch.

    Raises:
        ValueError: a label lies outside the vocabulary.
    """
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= logits.shape[-1]))
    if wrong.any():
        last = logits.shape[-1] - 1
        raise ValueError(f"labels must be {ignore_index} or lie in 0 ... {last}, got {labels[wrong][0]}")
    if not counted.any():
        return logits.dtype.type(np.nan)
    picked = np.take_along_axis(log_softmax(logits[counted]), labels[counted][:, None], axis=-1)
    return -picked.mean()


def causal_lm_loss(
    logits: Float[np.ndarray, "B T V"], labels: Int[np.ndarray, "B T"], ignore_index: int = -100
) -> np.floating:
    """Cross-entropy of each token's logits against the next token; `labels` are the input ids, or -100."""
    return cross_entropy(logits[:, :-1], labels[:, 1:], ignore_index)


def linear_cross_entropy(
    hidden: Float[np.ndarray, "*batch E"],
    weight: Float[np.ndarray, "V E"],
    labels: Int[np.ndarray, "*batch"],
    ignore_index: int = -100,
) -> np.floating:
    """`cross_entropy` of the logits hidden · weightᵀ. A kernel never holds them all; here it only fixes the meaning."""
    return cross_entropy(hidden @ weight.T, labels, ignore_index)
