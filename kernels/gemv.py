"""One to four rows times the weights of up to three linear layers, y = x Wᵀ: where decoding spends its time.

Memory-bound: every weight is read once, for all rows. A program takes a few rows of one weight, chosen by its program
id; the weights remain separate parameters. When gated, it takes the same rows of two weights and writes
silu(gate) · up, rounding both first, as separate kernels would. Sums are accumulated in float32 and rounded once.
Reference: `llama.reference.gemv`, `llama.reference.gemv_swiglu`.

Only `_takes_pdl` decides on programmatic dependent launch, an experiment.
"""

import os

import torch
import triton
import triton.language as tl

from . import launch, tiles

MOST_ROWS = 4  # of x; with more, matrix units are faster
MOST_WEIGHTS = 3


@triton.jit
def _tile(base, k, stride, width, mask, EVEN: tl.constexpr):
    if not EVEN:
        mask = mask & (k < width)[None, :]
    return tl.load(base + tl.cast(k, tl.int64)[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def _sums(
    x_ptr, w_ptr, u_ptr, y_ptr, block, rows, width, out_width, y_width, xr, xk, wn, wk, un, uk,
    GATED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    here, ours = (row < rows)[:, None], (n < out_width)[:, None]
    x_rows = x_ptr + tl.cast(row, tl.int64)[:, None] * xr
    w_rows = w_ptr + tl.cast(n, tl.int64)[:, None] * wn
    u_rows = u_ptr + tl.cast(n, tl.int64)[:, None] * un
    sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    up_sums = sums
    first = 0
    if PDL:  # before waiting for x, load the first tile of weights, which no preceding kernel writes
        w = _tile(w_rows, k, wk, width, ours, EVEN)
        if GATED:
            u = _tile(u_rows, k, uk, width, ours, EVEN)
        tl.extra.cuda.gdc_wait()
        x = _tile(x_rows, k, xk, width, here, EVEN).to(tl.float32)[:, None, :]
        sums += x * w.to(tl.float32)[None, :, :]
        if GATED:
            up_sums += x * u.to(tl.float32)[None, :, :]
        first = BLOCK_K
    for start in tl.range(first, width, BLOCK_K, num_stages=STAGES):
        x = _tile(x_rows, start + k, xk, width, here, EVEN).to(tl.float32)[:, None, :]
        sums += x * _tile(w_rows, start + k, wk, width, ours, EVEN).to(tl.float32)[None, :, :]
        if GATED:
            up_sums += x * _tile(u_rows, start + k, uk, width, ours, EVEN).to(tl.float32)[None, :, :]
    y = tl.sum(sums, 2).to(y_ptr.dtype.element_ty)
    if GATED:
        gate, up = y.to(tl.float32), tl.sum(up_sums, 2).to(y.dtype).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
    tl.store(
        y_ptr + row[:, None] * y_width + n[None, :], y.to(y_ptr.dtype.element_ty), mask=here & (n < out_width)[None, :]
    )


@triton.jit
def _gemv_kernel(
    x_ptr, a_ptr, b_ptr, c_ptr, y_ptr, rows, width, a_width, b_width, c_width,
    xr, xk, an, ak, bn, bk, cn, ck,
    WEIGHTS: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block, y_width = tl.program_id(0), a_width + b_width + c_width
    a_blocks, b_blocks = tl.cdiv(a_width, BLOCK_N), tl.cdiv(b_width, BLOCK_N)
    w_ptr, first, offset, w_width, wn, wk = a_ptr, 0, 0, a_width, tl.cast(an, tl.int64), tl.cast(ak, tl.int64)
    if WEIGHTS > 1:  # noqa: SIM102 - constexpr; not nested in each other, which Triton 3.6 cannot compile for AMD
        if block >= a_blocks:
            w_ptr, first, offset, w_width = b_ptr, a_blocks, a_width, b_width
            wn, wk = tl.cast(bn, tl.int64), tl.cast(bk, tl.int64)
    if WEIGHTS > 2:  # noqa: SIM102
        if block >= a_blocks + b_blocks:
            w_ptr, first, offset, w_width = c_ptr, a_blocks + b_blocks, a_width + b_width, c_width
            wn, wk = tl.cast(cn, tl.int64), tl.cast(ck, tl.int64)
    _sums(x_ptr, w_ptr, b_ptr, y_ptr + offset, block - first, rows, width, w_width, y_width, xr, xk, wn, wk, bn, bk,
          GATED, EVEN, ROWS, BLOCK_N, BLOCK_K, STAGES, PDL)  # fmt: skip


def _run(x: torch.Tensor, weights: list[torch.Tensor], y: torch.Tensor, gated: bool, pdl: bool) -> torch.Tensor:
    rows, width = x.shape
    if not y.numel():
        return y
    tile = tiles.gemv(launch.family(x.device), rows, x.dtype, gated)
    widths = [len(weight) for weight in weights[: 1 if gated else MOST_WEIGHTS]]
    nothing = MOST_WEIGHTS - len(weights)
    _gemv_kernel[(sum(launch.cdiv(n, tile.block_n) for n in widths),)](
        x, *weights, *(weights[:1] * nothing), y, rows, width, *widths, *(0,) * (MOST_WEIGHTS - len(widths)),
        *x.stride(), *(stride for weight in weights for stride in weight.stride()), *(0,) * (2 * nothing),
        WEIGHTS=len(widths), GATED=gated, EVEN=width % tile.block_k == 0, ROWS=1 if rows == 1 else MOST_ROWS,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages, PDL=pdl,
        num_warps=tile.warps, enable_fp_fusion=True, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return y


def _takes_pdl(device: torch.device) -> bool:
    """Whether to launch while the preceding kernel is still running: it is enabled and the GPU supports it.

    LLAMA_TRITON_PDL=1 enables it. The first weights are then loaded before that kernel ends, so no kernel still running
    may write weights. It is experimental and off by default: it has never run on a GPU.
    """
    return os.environ.get("LLAMA_TRITON_PDL") == "1" and launch.family(device) in ("sm_90", "sm_100")


def _fake(x, a, b=None, c=None) -> torch.Tensor:
    return x.new_empty(len(x), sum(len(weight) for weight in (a, b, c) if weight is not None))


@launch.operator("gemv(Tensor x, Tensor a, Tensor? b=None, Tensor? c=None) -> Tensor", _fake)
def _gemv(x, a, b=None, c=None) -> torch.Tensor:
    weights = [weight for weight in (a, b, c) if weight is not None]
    return _run(x, weights, _fake(x, a, b, c), gated=False, pdl=_takes_pdl(x.device))


def _fake_swiglu(x, gate, up) -> torch.Tensor:
    return x.new_empty(len(x), len(gate))


@launch.operator("gemv_swiglu(Tensor x, Tensor gate, Tensor up) -> Tensor", _fake_swiglu)
def _gemv_swiglu(x, gate, up) -> torch.Tensor:
    return _run(x, [gate, up], _fake_swiglu(x, gate, up), gated=True, pdl=_takes_pdl(x.device))


def gemv(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Multiply a few rows by up to three weights and concatenate the results.

    Args:
        x: (R, I), R up to 4. weights: one to three of (O, I). Any strides; contiguous rows of a weight are read
            fastest. float32, float16 or bfloat16, the same for all.

    Returns:
        (R, the sum of all O), a new tensor.

    Raises:
        ValueError: mismatched shapes or dtypes, or a device that Triton does not support.
    """
    if not 1 <= len(weights) <= MOST_WEIGHTS:
        raise ValueError(f"gemv: expected 1 to {MOST_WEIGHTS} weights, got {len(weights)}")
    _check("gemv", x, *weights)
    return _gemv(x, *weights)


def gemv_swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(x gateᵀ) · (x upᵀ), (R, F), for x (R, I) and gate, up (F, I). Otherwise as `gemv`."""
    _check("gemv_swiglu", x, gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"gemv_swiglu: gate and up must have the same shape, got {gate.shape} and {up.shape}")
    return _gemv_swiglu(x, gate, up)


def _check(name: str, x: torch.Tensor, *weights: torch.Tensor) -> None:
    launch.check(name, x, *weights)
    if x.dim() != 2 or len(x) > MOST_ROWS:
        raise ValueError(f"{name}: x must be (rows, width) with up to {MOST_ROWS} rows, got {tuple(x.shape)}")
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
            raise ValueError(
                f"{name}: weights must be (out, {x.shape[1]}) of x's dtype, {x.dtype}; "
                f"got {tuple(weight.shape)} of {weight.dtype}"
            )
