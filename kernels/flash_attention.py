"""Attention over many queries, one block of keys at a time, without materialising the scores.

    o_t = Σ_s softmax_s(q_t · k_s / √D) v_s               (Vaswani et al. 2017, eq. 1; Dao 2023, alg. 1)

A program holds a block of queries of one head and loops over the keys that any of them sees, from the first visible
key to the last. Only the blocks at either end need masking: on the left where packed texts begin, on the right at the
diagonal and the end of the row. So padding and packing need no mask in memory and cost nothing in between.
Compute-bound. Reference: `llama.reference.flash_attention`.

On Hopper and Blackwell, keys and values are loaded through TMA descriptors created on the host, which save the
registers that addresses would take. Tensors that descriptors cannot address take the plain path.

Only `_takes_hopper` decides whether a call goes to another kernel, `flash_attention_hopper`.
"""

import os

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch, tiles

# eˣ = 2^(x · log₂ e): GPUs compute powers of two, so scores are scaled once, by log₂ e / √D, and `exp2` replaces `exp`.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _scan(
    acc, l, m, q, first, last, k_ptr, v_ptr, mask_ptr, ks, kd, vs, vd, ms, b, head, place, low, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, HOLES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process keys [first, last) in blocks, updating m (maximum score), l (sum of exponentials), acc (weighted sum)."""
    col = tl.arange(0, BLOCK_K)
    dim = tl.arange(0, BLOCK_D)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        key = start + col
        here = key < last  # keys beyond do not count and may hold anything
        if TMA:
            k = tl.trans(k_ptr.load([b, head, start, 0]).reshape(BLOCK_K, BLOCK_D))
        else:
            k_block = k_ptr + tl.cast(start, tl.int64) * ks + col[None, :] * ks + dim[:, None] * kd
            if MASKED:
                k = tl.load(k_block, mask=here[None, :] & (dim < D)[:, None], other=0.0)
            elif D != BLOCK_D:
                k = tl.load(k_block, mask=(dim < D)[:, None], other=0.0)
            else:
                k = tl.load(k_block)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            seen = here[None, :]
            if HOLES:
                holes = tl.load(mask_ptr + tl.cast(start, tl.int64) * ms + col * ms, mask=here, other=0) == 0
                seen = seen & ~holes[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= place[:, None])
            if PACKED:
                seen = seen & (key[None, :] >= low[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1) * scale)
        shift = new_m
        if MASKED:
            shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # nothing seen yet: -∞ - (-∞) would be NaN
        p = tl.exp2(scores * scale - shift[:, None])
        shrink = tl.exp2(m - shift)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if TMA:
            v = v_ptr.load([b, head, start, 0]).reshape(BLOCK_K, BLOCK_D)
            if MASKED:
                v = tl.where(here[:, None], v, 0.0)  # memory beyond may hold anything, and 0 · NaN is NaN
        else:
            v_block = v_ptr + tl.cast(start, tl.int64) * vs + col[:, None] * vs + dim[None, :] * vd
            if MASKED:
                v = tl.load(v_block, mask=here[:, None] & (dim < D)[None, :], other=0.0)
            elif D != BLOCK_D:
                v = tl.load(v_block, mask=(dim < D)[None, :], other=0.0)
            else:
                v = tl.load(v_block)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = new_m
    return acc, l, m


# Triton compiles a variant of a kernel for each combination of integers that are 1, divisible by 16, or neither. For
# strides this enables wider loads. For numbers that follow the text's length it would only mean recompiling in the
# middle of a chat.
@triton.jit(do_not_specialize=["H", "T", "S", "offset", "fb", "mb"])
def _flash_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr, lengths_ptr, first_keys_ptr, mask_ptr,
    H, T, S, offset, scale,
    qb, qh, qt, qd, kb, kh, ks, kd, vb, vh, vs, vd, ob, oh, ot, od, fb, ft, mb, ms,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, STARTS: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    HOLES: tl.constexpr, LSE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q  # the last queries see the most keys, so they go first
    t = t0 + tl.arange(0, BLOCK_Q)
    dim = tl.arange(0, BLOCK_D)
    inside = t < T
    # A no-op that informs the compiler: by itself it knows whether 16 divides a stride, but not whether 4 or 8 does.
    qb, qh, qt = qb // ALIGN * ALIGN, qh // ALIGN * ALIGN, qt // ALIGN * ALIGN
    kb, kh, ks = kb // ALIGN * ALIGN, kh // ALIGN * ALIGN, ks // ALIGN * ALIGN
    vb, vh, vs = vb // ALIGN * ALIGN, vh // ALIGN * ALIGN, vs // ALIGN * ALIGN
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)

    begin = 0
    if STARTS:
        begin = tl.maximum(tl.load(starts_ptr + b).to(tl.int32), 0)
    length = S
    if LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), S)
    place = t + offset  # a query's position among the keys
    low = place
    plain_from = begin
    if PACKED:
        low = tl.load(first_keys_ptr + b64 * fb + tl.cast(t, tl.int64) * ft, mask=inside, other=2147483647)
        low = low.to(tl.int32)
        begin = tl.maximum(begin, tl.min(low, 0))
        latest = tl.max(tl.where(inside, low, 0), 0)  # from here on, keys are visible to the whole block
        plain_from = begin + tl.cdiv(tl.maximum(latest - begin, 0), BLOCK_K) * BLOCK_K
    end, plain_to = length, length
    if CAUSAL:
        end = tl.minimum(length, tl.minimum(t0 + BLOCK_Q, T) + offset)
        plain_to = tl.minimum(length, t0 + offset + 1)  # up to here, keys are visible to the whole block
    plain_from = tl.minimum(plain_from, tl.maximum(end, begin))
    if HOLES:
        mask_ptr += b64 * mb
        seen = tl.zeros((1024,), tl.int32)
        for start in tl.range(begin, end, 1024):
            key = start + tl.arange(0, 1024)
            one = tl.load(mask_ptr + tl.cast(key, tl.int64) * ms, mask=key < end, other=0) != 0
            seen += one.to(tl.int32)
        if tl.sum(seen, 0) < end - begin:  # padding in between, which is rare: every block is masked
            plain_to = plain_from
    plain_to = plain_from + tl.maximum(plain_to - plain_from, 0) // BLOCK_K * BLOCK_K

    q_row = q_ptr + b64 * qb + h64 * qh + tl.cast(t, tl.int64)[:, None] * qt
    q = tl.load(q_row + dim[None, :] * qd, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
    if not TMA:
        head = h64 // GROUP
        k_ptr += b64 * kb + head * kh
        v_ptr += b64 * vb + head * vh
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    if PACKED:
        acc, l, m = _scan(acc, l, m, q, begin, plain_from, k_ptr, v_ptr, mask_ptr, ks, kd, vs, vd, ms,
                          b, h // GROUP, place, low, scale, True, CAUSAL, True, HOLES, TMA,
                          PRECISION, D, BLOCK_D, BLOCK_K, STAGES)  # fmt: skip
    acc, l, m = _scan(acc, l, m, q, plain_from, plain_to, k_ptr, v_ptr, mask_ptr, ks, kd, vs, vd, ms,
                      b, h // GROUP, place, low, scale, False, CAUSAL, PACKED, HOLES, TMA,
                      PRECISION, D, BLOCK_D, BLOCK_K, STAGES)  # fmt: skip
    acc, l, m = _scan(acc, l, m, q, plain_to, end, k_ptr, v_ptr, mask_ptr, ks, kd, vs, vd, ms,
                      b, h // GROUP, place, low, scale, True, CAUSAL, PACKED, HOLES, TMA,
                      PRECISION, D, BLOCK_D, BLOCK_K, STAGES)  # fmt: skip

    acc = acc * tl.where(l > 0, 1.0 / l, 0.0)[:, None]  # zeros for a query that sees nothing
    out_row = out_ptr + b64 * ob + h64 * oh + tl.cast(t, tl.int64)[:, None] * ot
    tl.store(out_row + dim[None, :] * od, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (dim < D)[None, :])
    if LSE:
        tl.store(lse_ptr + (b64 * H + h64) * T + t, (m + tl.log2(l)) / LOG2_E, mask=inside)


def _outputs(q: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, T, D = q.shape
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)  # merging heads needs no copy
    return out, torch.empty((B, H, T) if return_lse else (0,), dtype=torch.float32, device=q.device)


def _fake(q, k, v, causal, starts, lengths, first_keys, mask, offset, return_lse):
    return _outputs(q, return_lse)


@launch.operator(
    "flash_attention(Tensor q, Tensor k, Tensor v, bool causal, Tensor? starts, Tensor? lengths, Tensor? first_keys,"
    " Tensor? mask, SymInt offset, bool return_lse) -> (Tensor, Tensor)",
    _fake,
)
def _flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    first_keys: torch.Tensor | None,
    mask: torch.Tensor | None,
    offset: int,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _outputs(q, return_lse)
    B, H, T, D = q.shape
    if not (B and H and T):
        return out, lse
    if causal and _takes_hopper(launch.family(q.device), q, k, v):
        from .flash_attention_hopper import flash_attention_hopper

        flash_attention_hopper(q, k, v, starts, lengths, first_keys, mask, offset, out, lse if return_lse else None)
        return out, lse
    # Offsets within a tile are 32-bit.
    q, k, v = (x if max(x.stride()[2:]) <= 2**23 else x.contiguous() for x in (q, k, v))
    block_d = max(16, launch.power_of_2(D))
    tma = _has_descriptors(k) and _has_descriptors(v)
    padded = any(said is not None for said in (starts, lengths, mask))
    tile = tiles.prefill(launch.family(q.device), D, q.dtype, T, tma, both=padded and first_keys is not None)
    keys, values = k, v
    if tile.tma:
        keys, values = (TensorDescriptor(x, [*x.shape], _strides(x), [1, 1, tile.block_k, block_d]) for x in (k, v))
    _flash_attention_kernel[(B * H, launch.cdiv(T, tile.block_q))](
        q, keys, values, out, lse, starts, lengths, first_keys, mask,
        H, T, k.shape[2], offset, D**-0.5 * LOG2_E.value,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        *((0, 0) if first_keys is None else first_keys.stride()), *((0, 0) if mask is None else mask.stride()),
        GROUP=H // k.shape[1], CAUSAL=causal, STARTS=starts is not None, LENGTHS=lengths is not None,
        PACKED=first_keys is not None, HOLES=mask is not None, LSE=return_lse, TMA=tile.tma, PRECISION="ieee",
        ALIGN=launch.common_power(q, k, v),
        D=D, BLOCK_D=block_d, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def _takes_hopper(family: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `flash_attention_hopper` handles this call: it is enabled and supports these tensors.

    LLAMA_TRITON_HOPPER=1 enables it. It is experimental and off by default: the kernel has never run on a GPU.
    """
    return (
        os.environ.get("LLAMA_TRITON_HOPPER") == "1"
        and family == "sm_90"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in tiles.PREFILL_HOPPER
        and q.shape[2] > tiles.SHORT
        and all(_has_descriptors(x) for x in (q, k, v))
    )


def _has_descriptors(x: torch.Tensor) -> bool:
    """Whether TMA can address x: a contiguous last axis, everything else aligned to 16 bytes."""
    borders = [x.data_ptr(), *(stride * x.element_size() for stride in _strides(x)[:-1])]
    return x.numel() > 0 and x.stride(-1) == 1 and all(at % 16 == 0 for at in borders) and 0 not in borders[1:]


def _strides(x: torch.Tensor) -> list[int]:
    """Return x's strides, replacing the arbitrary ones of axes of size 1."""
    return [max(x.stride()) if size == 1 and axis < x.dim() - 1 else stride
            for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))]  # fmt: skip


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    offset: int | None = None,
    return_lse: bool = False,
    first_keys: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention: each key/value head serves H / K query heads.

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D). Any strides; D up to 256; float32, float16 or bfloat16, the same for all.
        causal: query t, at position `offset` + t, sees the keys up to and including its own position; else all keys.
        starts, lengths: (B,) integers; row b's keys are those at starts[b] <= s < lengths[b] (default: all S). Left
            padding is a start above 0, right padding a length below S.
        offset: the position of query 0 among the keys (default S - T: the queries are the last T tokens).
        return_lse: also return the log-sum-exp of each query's scores, (B, H, T) float32, -∞ if it sees nothing.
        first_keys: (B, T) integers; query t sees no key before first_keys[b, t], which separates packed texts.
        cu_seqlens: (n + 1,) integers from 0 to T, the boundaries of n texts packed into every row; an alternative to
            first_keys.
        mask: (B, S) bool or integers; 0 marks a padded key, which is not seen. Holes in between cost a little; a mask
            that only repeats `starts` and `lengths` costs next to nothing. Values in a hole must be finite.

    Returns:
        (B, H, T, D) in q's dtype, stored as (B, T, H, D). Zeros for a query that sees nothing.

    Raises:
        ValueError: mismatched shapes or dtypes, or a device that Triton does not support.
    """
    launch.check("flash_attention", q, k, v, starts, lengths, first_keys, cu_seqlens, mask)
    check_heads("flash_attention", q, k, v)
    B, _, T, _ = q.shape
    if len(k) != B:
        raise ValueError(f"flash_attention: q has {B} rows, but k and v have {len(k)}")
    if cu_seqlens is not None:
        if first_keys is not None:
            raise ValueError("flash_attention: pass either cu_seqlens or first_keys, not both")
        cu_seqlens, token = cu_seqlens.contiguous(), torch.arange(T, dtype=cu_seqlens.dtype, device=q.device)
        first_keys = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1].expand(B, T)
    for name, table, shape in (
        ("starts", starts, (B,)),
        ("lengths", lengths, (B,)),
        ("first_keys", first_keys, (B, T)),
        ("mask", mask, (B, k.shape[2])),
    ):
        if table is not None and (table.shape != shape or table.is_floating_point()):
            raise ValueError(f"flash_attention: {name} must be {shape} integers, got {tuple(table.shape)}")
    offset = k.shape[2] - T if offset is None else offset
    starts, lengths = (None if table is None else table.contiguous() for table in (starts, lengths))
    out, lse = _flash_attention(q, k, v, causal, starts, lengths, first_keys, mask, offset, return_lse)
    return (out, lse) if return_lse else out


def check_heads(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Check (B, H, T, D) queries against (B or pages, K, S, D) keys and values."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"{name}: q must be (batch, heads, T, D), k and v (batch, kv heads, S, D); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"{name}: q, k and v must have the same dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] != k.shape[-1] or not 1 <= q.shape[-1] <= tiles.HEAD_DIMS[-1]:
        raise ValueError(
            f"{name}: q and k must have one head_dim of at most {tiles.HEAD_DIMS[-1]}, "
            f"got {q.shape[-1]} and {k.shape[-1]}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{name}: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads")
