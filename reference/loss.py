"""The training loss: how surprised the model is by the next token."""

import numpy as np
from jaxtyping import Bool, Float, Int


def log_softmax(logits: Float[np.ndarray, "*batch V"]) -> Float[np.ndarray, "*batch V"]:
    """x - ln Σ exp(x), shifted by the maximum to avoid overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def judged(labels: Int[np.ndarray, "*batch"], vocab_size: int, ignore_index: int) -> Bool[np.ndarray, "*batch"]:
    """Return which labels count: all but `ignore_index`. Raise ValueError if one is outside the vocabulary."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= vocab_size))
    if wrong.any():
        raise ValueError(f"labels must be {ignore_index} or in 0 ... {vocab_size - 1}, got {labels[wrong][0]}")
    return counted


def cross_entropy(
    logits: Float[np.ndarray, "*batch V"],
    labels: Int[np.ndarray, "*batch"],
    ignore_index: int = -100,
    reduction: str = "mean",
) -> np.floating:
    """The mean of -log p(label) over all labels but `ignore_index`; NaN if there are none, as in PyTorch.

    `reduction="sum"` returns the sum instead of the mean.

    Raises:
        ValueError: a label is outside the vocabulary, or the reduction is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    counted = judged(labels, logits.shape[-1], ignore_index)
    picked = np.take_along_axis(log_softmax(logits[counted]), labels[counted][:, None], axis=-1)
    if reduction == "sum":
        return -picked.sum()
    return -picked.mean() if picked.size else logits.dtype.type(np.nan)


def causal_lm_loss(
    logits: Float[np.ndarray, "B T V"], labels: Int[np.ndarray, "B T"], ignore_index: int = -100
) -> np.floating:
    """Cross-entropy of each token's logits against the next token.

    `labels` are the input ids, with `ignore_index` for tokens that should not count, such as padding. A single token
    has no next one, so its loss is NaN.
    """
    return cross_entropy(logits[:, :-1], labels[:, 1:], ignore_index)


def linear_cross_entropy(
    hidden: Float[np.ndarray, "*batch E"],
    weight: Float[np.ndarray, "V E"],
    labels: Int[np.ndarray, "*batch"],
    ignore_index: int = -100,
    reduction: str = "mean",
) -> np.floating:
    """`cross_entropy` of the logits hidden · weightᵀ. It specifies a kernel, which never holds all logits at once."""
    return cross_entropy(hidden @ weight.T, labels, ignore_index, reduction)
