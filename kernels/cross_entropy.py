"""Cross-entropy of many tokens over a large vocabulary, reading every logit once.

    loss = ln Σ_v exp(x_v) - x_label                       (a running maximum keeps the sum finite)

One program per token loops over the vocabulary. Memory-bound. `linear_cross_entropy` computes the logits from the
hidden states in chunks, so they never exist all at once. Reference: `llama.reference.cross_entropy`,
`llama.reference.linear_cross_entropy`.
"""

import torch
import triton
import triton.language as tl

from . import launch, tiles


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, inner, outer_stride, inner_stride, stride, V, ignore_index, BLOCK: tl.constexpr
):
    row = tl.program_id(0)  # 32-bit: 64-bit division takes far more instructions
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    outer, place = tl.cast(row // inner, tl.int64), tl.cast(row % inner, tl.int64)
    start = logits_ptr + outer * outer_stride + place * inner_stride
    m, l = float("-inf"), 0.0
    for first in range(0, tl.where(counted, V, 0), BLOCK):
        col = first + tl.arange(0, BLOCK)
        x = tl.load(start + tl.cast(col, tl.int64) * stride, mask=col < V, other=float("-inf")).to(tl.float32)
        new_m = tl.maximum(m, tl.max(x, 0))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        l = l * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), 0)
        m = new_m
    known = counted & (label >= 0) & (label < V)
    picked = tl.load(start + label.to(tl.int64) * stride, mask=known, other=0.0).to(tl.float32)
    loss = tl.where(known, tl.log(l) + m - picked, float("nan"))  # a label outside the vocabulary gives NaN
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))


def _fake(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return torch.empty(labels.shape, dtype=torch.float32, device=logits.device)


def _run(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, ignore_index: int) -> None:
    if not labels.numel():
        return
    rows = launch.as_rows(logits)
    tile = tiles.CROSS_ENTROPY
    _cross_entropy_kernel[(labels.numel(),)](
        rows, labels, losses, rows.shape[1], *rows.stride(), rows.shape[2], ignore_index,
        BLOCK=min(tile.block, launch.power_of_2(rows.shape[2])), num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip


@launch.operator("token_losses(Tensor logits, Tensor labels, int ignore_index) -> Tensor", _fake)
def _token_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    losses = _fake(logits, labels, ignore_index)
    _run(logits, labels.contiguous(), losses, ignore_index)
    return losses


def _fake_linear(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return _fake(hidden, labels, ignore_index)


@launch.operator(
    "linear_token_losses(Tensor hidden, Tensor weight, Tensor labels, int ignore_index) -> Tensor", _fake_linear
)
def _linear_token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    losses = _fake(hidden, labels, ignore_index)
    rows, flat, places = hidden.reshape(-1, hidden.shape[-1]), losses.view(-1), labels.reshape(-1).contiguous()
    at_once = max(1, tiles.LOGITS_AT_ONCE // len(weight))
    for first in range(0, len(rows), at_once):
        piece = slice(first, first + at_once)
        _run(rows[piece] @ weight.T, places[piece], flat[piece], ignore_index)
    return losses


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """The mean of -log p(label) over all labels but `ignore_index`, in float32; NaN if there are none.

    Args:
        logits: (..., V), any strides. labels: (...) integers.
        reduction: "mean", or "sum", which is 0 if there are none.

    Returns:
        A scalar. It is also NaN if a label is outside the vocabulary: raising would need a device synchronisation.

    Raises:
        ValueError: mismatched shapes or dtypes, or a device that Triton does not support.
    """
    launch.check("cross_entropy", logits, labels)
    _check("cross_entropy", "logits", logits, labels)
    return _reduced(_token_losses(logits, labels, ignore_index), labels, ignore_index, reduction)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> torch.Tensor:
    """`cross_entropy` of the logits hidden · weightᵀ, computed in chunks so that they are never all in memory.

    Args:
        hidden: (..., E). weight: (V, E), of hidden's dtype. labels: (...) integers.
    """
    launch.check("linear_cross_entropy", hidden, weight, labels)
    _check("linear_cross_entropy", "hidden", hidden, labels)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_cross_entropy: weight must be (V, {hidden.shape[-1]}) of {hidden.dtype}, "
            f"got {tuple(weight.shape)} of {weight.dtype}"
        )
    return _reduced(_linear_token_losses(hidden, weight, labels, ignore_index), labels, ignore_index, reduction)


def _reduced(losses: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    total = losses.sum()
    return total / (labels != ignore_index).sum() if reduction == "mean" else total


def _check(name: str, label: str, x: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.is_floating_point() or labels.shape != x.shape[:-1] or x.shape[-1] == 0:
        raise ValueError(
            f"{name}: labels must be integers of the shape of {label} without its last axis, "
            f"got {tuple(labels.shape)} of {labels.dtype} for {tuple(x.shape)}"
        )
