"""Rotary position embedding of queries and keys together, out of place, in place, or into a cache.

    y₁ = x₁ cos - x₂ sin        y₂ = x₂ cos + x₁ sin       (Su et al. 2021, eq. 34; x₁, x₂ the halves of a head)

One program per token rotates all heads, so the token's angles are read once. Computed in float32 and rounded once.
Memory-bound. Reference: `llama.reference.apply_rope`, `llama.reference.apply_rope_to_cache`.
"""

import torch
import triton
import triton.language as tl

from . import launch, tiles


@triton.jit
def _turn(
    x_ptr, y_ptr, x_head, x_dim, y_head, y_dim, heads, cos1, sin1, cos2, sin2, stored,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dim = tl.cast(tl.arange(0, BLOCK_D), tl.int64)[None, :]
    second_half = tl.cast(HALF, tl.int64)
    for first in range(0, heads, BLOCK_H):
        head = tl.cast(first + tl.arange(0, BLOCK_H), tl.int64)[:, None]  # heads · T · D can exceed 2³¹
        mask = (head < heads) & (dim < HALF)
        x = x_ptr + head * x_head + dim * x_dim
        x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + second_half * x_dim, mask=mask, other=0.0).to(tl.float32)
        y = y_ptr + head * y_head + dim * y_dim
        tl.store(y, (x1 * cos1 - x2 * sin1).to(y_ptr.dtype.element_ty), mask=mask & stored)
        tl.store(y + second_half * y_dim, (x2 * cos2 + x1 * sin2).to(y_ptr.dtype.element_ty), mask=mask & stored)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, place_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    T, q_heads, k_heads, room,
    qb, qh, qt, qd, kb, kh, kt, kd, vb, vh, vt, vd, cb, ct, cd, sb, st, sd,
    qob, qoh, qot, qod, kob, koh, kot, kod, vob, voh, vot, vod, pb, pt,
    STORE: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)  # 32-bit: 64-bit division takes far more instructions
    b, t = tl.cast(token // T, tl.int64), tl.cast(token % T, tl.int64)
    place = t  # where k and v go: the output's token t, or a slot of the cache
    stored = True
    if STORE:
        place = tl.load(place_ptr + b * pb + t * pt).to(tl.int64)
        stored = (place >= 0) & (place < room)
    dim = tl.cast(tl.arange(0, BLOCK_D), tl.int64)[None, :]
    cos_row, sin_row = cos_ptr + b * cb + t * ct + dim * cd, sin_ptr + b * sb + t * st + dim * sd
    cos1 = tl.load(cos_row, mask=dim < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_row, mask=dim < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_row + tl.cast(HALF, tl.int64) * cd, mask=dim < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_row + tl.cast(HALF, tl.int64) * sd, mask=dim < HALF, other=0.0).to(tl.float32)
    _turn(q_ptr + b * qb + t * qt, q_out_ptr + b * qob + t * qot, qh, qd, qoh, qod, q_heads,
          cos1, sin1, cos2, sin2, True, HALF, BLOCK_H, BLOCK_D)  # fmt: skip
    _turn(k_ptr + b * kb + t * kt, k_out_ptr + b * kob + place * kot, kh, kd, koh, kod, k_heads,
          cos1, sin1, cos2, sin2, stored, HALF, BLOCK_H, BLOCK_D)  # fmt: skip
    if STORE:
        both = tl.cast(tl.arange(0, 2 * BLOCK_D), tl.int64)[None, :]
        for first in range(0, k_heads, BLOCK_H):
            head = tl.cast(first + tl.arange(0, BLOCK_H), tl.int64)[:, None]
            mask = (head < k_heads) & (both < 2 * HALF)
            v = tl.load(v_ptr + b * vb + t * vt + head * vh + both * vd, mask=mask, other=0.0)
            out = v_out_ptr + b * vob + place * vot + head * voh + both * vod
            tl.store(out, v.to(v_out_ptr.dtype.element_ty), mask=mask & stored)


def _run(q, k, v, cos, sin, places, q_out, k_out, v_out) -> None:
    B, H, T, D = q.shape
    if not (B and T and D):
        return
    K = k.shape[1]
    store = places is not None
    by_row = [t.stride() if len(t) > 1 else (0, *t.stride()[1:]) for t in (cos, sin)]  # (1, T, D) serves every row
    tile = tiles.rope(launch.family(q.device), max(H, K), D)
    _rope_kernel[(B * T,)](
        q, k, v, cos, sin, places, q_out, k_out, v_out,
        T, H, K, k_out.shape[2],
        *q.stride(), *k.stride(), *v.stride(), *by_row[0], *by_row[1],
        *q_out.stride(), *k_out.stride(), *v_out.stride(), *(places.stride() if store else (0, 0)),
        STORE=store, HALF=D // 2, BLOCK_H=tile.heads, BLOCK_D=launch.power_of_2(D // 2),
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip


def _fake_apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    # (B, T, H, D) in memory, like the output of a projection: merging heads later needs no copy
    return [torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k)]


@launch.operator("apply_rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> Tensor[]", _fake_apply)
def _apply_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    q_out, k_out = _fake_apply(q, k, cos, sin)
    _run(q, k, k, cos, sin, None, q_out, k_out, k_out)
    return [q_out, k_out]


def _fake_in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    return None


@launch.operator("apply_rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()", _fake_in_place)
def _apply_rope_in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _run(q, k, k, cos, sin, None, q, k, k)


def _fake_to_cache(q, k, v, cos, sin, k_cache, v_cache, positions) -> torch.Tensor:
    return _fake_apply(q, k, cos, sin)[0]


@launch.operator(
    "apply_rope_to_cache(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor positions) -> Tensor",
    _fake_to_cache,
)
def _apply_rope_to_cache(q, k, v, cos, sin, k_cache, v_cache, positions) -> torch.Tensor:
    q_out = _fake_apply(q, k, cos, sin)[0]
    _run(q, k, v, cos, sin, positions, q_out, k_cache, v_cache)
    return q_out


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their positions, pairing halves as Hugging Face's checkpoints do.

    Args:
        q: (B, H, T, D). k: (B, K, T, D). Any strides, D even.
        cos, sin: (B or 1, T, D).
        in_place: overwrite q and k instead of allocating new tensors.

    Raises:
        ValueError: mismatched shapes, another dtype, a device that Triton does not support, or `in_place` with a
            tensor whose elements share memory.
    """
    _check("apply_rope", q, k, cos, sin)
    if not in_place:
        q, k = _apply_rope(q, k, cos, sin)
        return q, k
    for name, x in (("q", q), ("k", k)):
        if x.numel() and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(f"apply_rope: {name} is expanded and cannot be modified in place; clone it first")
    _apply_rope_in_place(q, k, cos, sin)
    return q, k


def apply_rope_to_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Apply RoPE, writing the rotated keys and the values straight into a cache.

    Args:
        q: (B, H, T, D). k, v: (B, K, T, D). cos, sin: (B or 1, T, D).
        k_cache, v_cache: (B, K, S, D), modified in place.
        positions: (B, T) integers, the tokens' slots in the cache. Tokens outside it are dropped.

    Returns:
        The rotated q, a new tensor.

    Raises:
        ValueError: as `apply_rope`.
    """
    _check("apply_rope_to_cache", q, k, cos, sin, v, k_cache, v_cache, positions)
    B, K, T, D = k.shape
    held = (B, K, k_cache.shape[-2], D)
    if v.shape != k.shape or k_cache.shape != held or v_cache.shape != held or k_cache.dtype != v_cache.dtype:
        raise ValueError(
            f"apply_rope_to_cache: v must be {tuple(k.shape)} and both caches {(B, K, 'S', D)}, "
            f"got {tuple(v.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if positions.shape != (B, T) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"apply_rope_to_cache: positions must be {(B, T)} integers, got {tuple(positions.shape)}")
    return _apply_rope_to_cache(q, k, v, cos, sin, k_cache, v_cache, positions)


def _check(
    name: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: torch.Tensor
) -> None:
    launch.check(name, q, k, cos, sin, *more)
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or q.shape[-1] % 2:
        raise ValueError(
            f"{name}: q (batch, heads, T, D) and k (batch, kv heads, T, D) must match but for heads, with D even; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    B, _, T, D = q.shape
    for label, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((B, T, D), (1, T, D)):
            raise ValueError(f"{name}: {label} must be {(B, T, D)} or {(1, T, D)}, got {tuple(table.shape)}")
