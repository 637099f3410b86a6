"""SwiGLU: the gate of the feed-forward block, without copying either input.

    y = silu(gate) · up,   silu(x) = x / (1 + e^-x)        (Shazeer 2020, eq. 5)

Computed in float32 and rounded once. Memory-bound: gate and up are read once, y is written once. The inputs may be
halves of one projection's output. Reference: `llama.reference.swiglu`.
"""

import torch
import triton
import triton.language as tl

from . import launch, tiles


@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, y_ptr, g_inner, g_outer_stride, g_inner_stride, g_stride,
    u_inner, u_outer_stride, u_inner_stride, u_stride, width, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)  # 32-bit: 64-bit division takes far more instructions
    col = tl.cast(tl.program_id(1), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    g_outer, g_place = tl.cast(row // g_inner, tl.int64), tl.cast(row % g_inner, tl.int64)
    u_outer, u_place = tl.cast(row // u_inner, tl.int64), tl.cast(row % u_inner, tl.int64)
    gate_row = gate_ptr + g_outer * g_outer_stride + g_place * g_inner_stride
    up_row = up_ptr + u_outer * u_outer_stride + u_place * u_inner_stride
    gate = tl.load(gate_row + col * g_stride, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_row + col * u_stride, mask=mask, other=0.0).to(tl.float32)
    y = (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tl.cast(row, tl.int64) * width + col, y, mask=mask)


def _fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=torch.result_type(gate, up), device=gate.device)


@launch.operator("swiglu(Tensor gate, Tensor up) -> Tensor", _fake)
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = _fake(gate, up)
    if not y.numel():
        return y
    gate, up = launch.as_rows(gate), launch.as_rows(up)
    rows, width = gate.shape[0] * gate.shape[1], gate.shape[2]
    tile = tiles.swiglu(launch.family(y.device), width)
    _swiglu_kernel[(rows, launch.cdiv(width, tile.block))](
        gate, up, y, gate.shape[1], *gate.stride(), up.shape[1], *up.stride(), width,
        BLOCK=tile.block, num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up.

    Args:
        gate, up: (..., F) of the same shape, any strides; float32, float16 or bfloat16.

    Returns:
        A new tensor of that shape.

    Raises:
        ValueError: mismatched shapes, another dtype, or a device that Triton does not support.
    """
    launch.check("swiglu", gate, up)
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"swiglu: gate and up must have the same shape, got {gate.shape} and {up.shape}")
    return _swiglu(gate, up)
