"""Attention of one new token per row over a long cache, split over the keys.

    o = Σ_i w_i o_i / Σ_i w_i,   w_i = exp(lse_i)          (o_i, lse_i: softmax over the keys of piece i alone)

A program reads one piece of the keys of one key/value head, with all query heads of its group as the rows of one
product, so every key is read once. A second kernel combines the pieces. Memory-bound: the cache is read once. The
length of the pieces depends on the cache's capacity, not on the batch, so a row's bits do not depend on its neighbours.
Reference: `llama.reference.decode_attention`.
"""

import torch
import triton
import triton.language as tl

from . import launch, tiles
from .flash_attention import LOG2_E, check_heads


# flash_attention.py explains `do_not_specialize` and LOG2_E.
@triton.jit(do_not_specialize=["S", "piece", "pieces", "mb"])
def _piece_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lengths_ptr, mask_ptr, table_ptr,
    K, S, piece, pieces, scale,
    qb, qh, qd, kb, kh, ks, kd, vb, vh, vs, vd, mb, ms, tb, tp,
    GROUP: tl.constexpr, ROWS: tl.constexpr, LENGTHS: tl.constexpr, MASK: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kb, kh, ks = kb // ALIGN * ALIGN, kh // ALIGN * ALIGN, ks // ALIGN * ALIGN  # as in flash_attention
    vb, vh, vs = vb // ALIGN * ALIGN, vh // ALIGN * ALIGN, vs // ALIGN * ALIGN
    pid = tl.program_id(0)
    index, head, b = pid % pieces, tl.cast(pid // pieces % K, tl.int64), tl.cast(pid // (pieces * K), tl.int64)
    length = S
    if LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    first = index * piece
    last = tl.minimum(first + piece, length)
    row, col = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    dim = tl.cast(tl.arange(0, BLOCK_D), tl.int64)  # index · stride can exceed 2³¹
    wide = (dim < D)[None, :]
    q_rows = q_ptr + b * qb + (head * GROUP + row)[:, None] * qh
    q = tl.load(q_rows + dim[None, :] * qd, mask=(row < GROUP)[:, None] & wide, other=0.0)
    k_head, v_head = k_ptr + head * kh, v_ptr + head * vh
    if PAGE == 0:
        k_head += b * kb
        v_head += b * vb
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        key = start + col
        here = key < last
        if PAGE == 0:
            k_row, v_row = tl.cast(key, tl.int64) * ks, tl.cast(key, tl.int64) * vs
        else:
            page = tl.load(table_ptr + b * tb + tl.cast(key // PAGE, tl.int64) * tp, mask=here, other=0).to(tl.int64)
            slot = tl.cast(key % PAGE, tl.int64)
            k_row, v_row = page * kb + slot * ks, page * vb + slot * vs
        k = tl.load(k_head + k_row[None, :] + dim[:, None] * kd, mask=here[None, :] & (dim < D)[:, None], other=0.0)
        v = tl.load(v_head + v_row[:, None] + dim[None, :] * vd, mask=here[:, None] & wide, other=0.0)
        if MASK:  # masks only the scores: loads that depend on another load cannot be issued early
            here = here & (tl.load(mask_ptr + b * mb + tl.cast(key, tl.int64) * ms, mask=here, other=0) != 0)
        scores = tl.where(here[None, :], tl.dot(q, k, input_precision=PRECISION), float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1) * scale)
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing seen yet: -∞ - (-∞) would be NaN
        p = tl.exp2(scores * scale - shift[:, None])
        shrink = tl.exp2(m - shift)
        l = l * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = new_m
    acc = acc * tl.where(l > 0, 1.0 / l, 0.0)[:, None]
    place = ((b * K + head) * GROUP + row) * pieces + index  # (B, H, pieces)
    tl.store(out_ptr + place[:, None] * D + dim[None, :], acc, mask=(row < GROUP)[:, None] & wide)
    tl.store(lse_ptr + place, m + tl.log2(l), mask=row < GROUP)


@triton.jit(do_not_specialize=["pieces"])
def _join_kernel(
    pieces_ptr, lse_ptr, out_ptr, H, ob, oh, od, pieces,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, h, row = tl.cast(pid // H, tl.int64), tl.cast(pid % H, tl.int64), tl.cast(pid, tl.int64)
    index, dim = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * pieces + index, mask=index < pieces, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    mask = (index < pieces)[:, None] & (dim < D)[None, :]
    parts = tl.load(pieces_ptr + (row * pieces + index)[:, None] * D + dim[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + b * ob + h * oh + dim * od, out.to(out_ptr.dtype.element_ty), mask=dim < D)


def _fake(q, k_cache, v_cache, lengths, mask, block_table):
    B, H, _, D = q.shape
    return torch.empty((B, 1, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)  # merging heads needs no copy


@launch.operator(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, Tensor? mask, Tensor? block_table)"
    " -> Tensor",
    _fake,
)
def _decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> torch.Tensor:
    out = _fake(q, k_cache, v_cache, lengths, mask, block_table)
    B, H, _, D = q.shape
    K, page = k_cache.shape[1], k_cache.shape[2]
    S = page if block_table is None else block_table.shape[1] * page
    if not (B and H):
        return out
    tile = tiles.decode(launch.family(q.device), D, q.dtype)
    block_d = max(16, launch.power_of_2(D))
    piece = launch.cdiv(max(launch.cdiv(S, tiles.SPLITS), tile.block_k), tile.block_k) * tile.block_k
    pieces = max(1, launch.cdiv(S, piece))
    parts = torch.empty((B, H, pieces, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((B, H, pieces), dtype=torch.float32, device=q.device)
    nothing = (0, 0)
    _piece_kernel[(B * K * pieces,)](
        q, k_cache, v_cache, parts, lse, lengths, mask, block_table,
        K, S, piece, pieces, D**-0.5 * LOG2_E.value,
        q.stride(0), q.stride(1), q.stride(3), *k_cache.stride(), *v_cache.stride(),
        *(nothing if mask is None else mask.stride()), *(nothing if block_table is None else block_table.stride()),
        GROUP=H // K, ROWS=max(tile.block_q, launch.power_of_2(H // K)), LENGTHS=lengths is not None,
        MASK=mask is not None, PAGE=0 if block_table is None else page, PRECISION="ieee",
        ALIGN=launch.common_power(k_cache, v_cache), D=D, BLOCK_D=block_d, BLOCK_K=tile.block_k, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    _join_kernel[(B * H,)](
        parts, lse, out, H, out.stride(0), out.stride(1), out.stride(3), pieces,
        D=D, BLOCK_D=block_d, BLOCK_P=launch.power_of_2(tiles.SPLITS), num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one new token per row over a cache in which row b fills the first `lengths[b]` slots.

    Args:
        q: (B, H, 1, D). k_cache, v_cache: (B, K, S, D), any strides; D up to 256; the same dtype for all.
        lengths: (B,) integers; None: all S.
        mask: (B, S) bool or integers; 0 marks a slot of padding, which is not seen. Omit it if there is no padding.
            In padded slots before the row's length, `v_cache` must hold finite values.
        block_table: (B, n) integers. The caches are then pages (pages, K, page size, D), row b's slots are those of
            pages block_table[b, 0], block_table[b, 1] ... in turn, and S = n · page size. Entries beyond a row's length
            are not read.

    Returns:
        (B, H, 1, D) in q's dtype; zeros for a row that sees nothing.

    Raises:
        ValueError: mismatched shapes or dtypes, or a device that Triton does not support.
    """
    launch.check("decode_attention", q, k_cache, v_cache, lengths, mask, block_table)
    check_heads("decode_attention", q, k_cache, v_cache)
    B, S = len(q), k_cache.shape[2]
    if q.shape[2] != 1:
        raise ValueError(f"decode_attention: one token per row, got {q.shape[2]}; use flash_attention for more")
    if block_table is not None:
        if block_table.dim() != 2 or len(block_table) != B or block_table.is_floating_point():
            raise ValueError(
                f"decode_attention: block_table must be ({B}, pages) integers, got {tuple(block_table.shape)}"
            )
        S *= block_table.shape[1]
    elif len(k_cache) != B:
        raise ValueError(f"decode_attention: q has {B} rows, but the caches have {len(k_cache)}")
    for name, table, shape in (("lengths", lengths, (B,)), ("mask", mask, (B, S))):
        if table is not None and (table.shape != shape or table.is_floating_point()):
            raise ValueError(f"decode_attention: {name} must be {shape} integers, got {tuple(table.shape)}")
    lengths = None if lengths is None else lengths.contiguous()
    return _decode_attention(q, k_cache, v_cache, lengths, mask, block_table)
