"""RMSNorm, alone or of a residual sum: a few rows per program.

    y = round(x / sqrt(mean(x²) + ε)) · w                 (Zhang & Sennrich 2019, eq. 4)

Sums are accumulated in float32; the normalised row is rounded to x's dtype before it is multiplied by the gain, as in
transformers. Memory-bound: x is read once and y written once, so a row must fit in the registers of its program.
Reference: `llama.reference.rms_norm`, `llama.reference.add_rms_norm`.
"""

import torch
import triton
import triton.language as tl

from . import launch, tiles


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr,
    rows, x_inner, x_outer_stride, x_inner_stride, x_stride, r_inner, r_outer_stride, r_inner_stride, r_stride,
    weight_stride, width, eps,
    ADD: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # This program's rows, and their columns. A block's size must be a power of two, so it may be wider than a row.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # 32-bit: 64-bit division takes far more instructions
    col = tl.arange(0, BLOCK)
    along = tl.cast(col, tl.int64)[None, :]  # col · stride can exceed 2³¹ in transposed inputs
    # EVEN: the block is exactly as wide as a row, so no comparison of columns is compiled.
    mask = (row < rows)[:, None]
    if not EVEN:
        mask = mask & (col < width)[None, :]
    # x is (outer, inner, width) with three strides, from `launch.as_rows`, so heads or tokens that are not contiguous
    # need no copy. Row i starts at (i // inner) · outer_stride + (i % inner) · inner_stride.
    outer, place = tl.cast(row // x_inner, tl.int64), tl.cast(row % x_inner, tl.int64)  # row · stride can exceed 2³¹
    start = outer * x_outer_stride + place * x_inner_stride
    x = tl.load(x_ptr + start[:, None] + along * x_stride, mask=mask, other=0.0)
    out = tl.cast(row, tl.int64)[:, None] * width + col[None, :]
    if ADD:
        outer, place = tl.cast(row // r_inner, tl.int64), tl.cast(row % r_inner, tl.int64)
        start = outer * r_outer_stride + place * r_inner_stride
        residual = tl.load(residual_ptr + start[:, None] + along * r_stride, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, x, mask=mask)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=1) / width + tl.cast(eps, tl.float32))
    normed = (x32 * scale[:, None]).to(x.dtype).to(tl.float32)
    gain = weight_ptr + tl.cast(col, tl.int64) * weight_stride
    weight = tl.load(gain, mask=col < width, other=0.0, eviction_policy="evict_last")
    tl.store(y_ptr + out, (normed * weight.to(tl.float32)[None, :]).to(y_ptr.dtype.element_ty), mask=mask)


def _run(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> list[torch.Tensor]:
    outputs = _outputs(x, residual, weight)
    if not x.numel():
        return outputs
    x3, r3 = launch.as_rows(x), launch.as_rows(x if residual is None else residual)
    rows, width = x3.shape[0] * x3.shape[1], x3.shape[2]
    tile = tiles.rms_norm(launch.family(x.device), width)
    block = launch.power_of_2(width)
    _rms_norm_kernel[(launch.cdiv(rows, tile.rows),)](
        x3, r3, weight, outputs[0], outputs[-1],
        rows, x3.shape[1], *x3.stride(), r3.shape[1], *r3.stride(), weight.stride(0), width, eps,
        ADD=residual is not None, EVEN=block == width, ROWS=tile.rows, BLOCK=block,
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return outputs


def _outputs(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> list[torch.Tensor]:
    added = [] if residual is None else [torch.empty(x.shape, dtype=torch.result_type(x, residual), device=x.device)]
    normed = torch.promote_types(added[0].dtype if added else x.dtype, weight.dtype)
    return [torch.empty(x.shape, dtype=normed, device=x.device), *added]


def _fake_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _outputs(x, None, weight)[0]


@launch.operator("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _fake_rms_norm)
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _run(x, None, weight, eps)[0]


def _fake_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> list[torch.Tensor]:
    return _outputs(x, residual, weight)


@launch.operator("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> Tensor[]", _fake_add)
def _add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> list[torch.Tensor]:
    return _run(x, residual, weight, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) · weight over the last axis.

    Args:
        x: (..., E), any strides, E up to 16384. weight: (E,). float32, float16 or bfloat16 each.
        eps: added under the root.

    Returns:
        A new tensor of x's shape, in the promoted dtype of x and weight.

    Raises:
        ValueError: mismatched shapes, another dtype, or a device that Triton does not support.
    """
    _check("rms_norm", x, None, weight)
    return _rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(residual + x), residual + x) in one pass: the end of one sub-layer and the start of the next.

    The sum is rounded to its dtype before it is normalised. Arguments and errors as for `rms_norm`; residual as x.
    """
    _check("add_rms_norm", x, residual, weight)
    normed, added = _add_rms_norm(x, residual, weight, eps)
    return normed, added


def _check(name: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    launch.check(name, x, residual, weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: weight must have the length of x's last axis, got {weight.shape} for {x.shape}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual must have x's shape, got {residual.shape} for {x.shape}")
    if x.shape[-1] > tiles.WIDEST_ROW:
        raise ValueError(f"{name}: rows can be up to {tiles.WIDEST_ROW} wide, got {x.shape[-1]}; llama.ops takes any")
