"""flash_attention for Hopper, overlapping the softmax of one block of keys with the products of another.

EXPERIMENTAL: it compiles, and its source runs step by step in NumPy (`tests/gluon_emulator.py`); it has never run on a
GPU. `LLAMA_TRITON_HOPPER=1` enables it; calls it does not support go to `flash_attention`.

    producer, one warp:            loads Q, then K and V block by block, by TMA into a ring buffer of STAGES slots
    consumers, two warpgroups:     issue QKᵀ of block i and PV of block i - 1 together; while PV runs, compute the
                                   softmax of block i                                  (Shah et al. 2024, alg. 2)

Triton waits for every product before it continues; Gluon, its lower-level language, leaves that to us. Producer and
consumers synchronise through barriers in shared memory: a slot is full, or a slot is empty. They wait for the n-th
phase of a barrier by its parity, and each keeps its own count: all of them derive the same tiles and blocks
(`tile_at`, `block_range`), and the count of blocks continues from tile to tile.

A program processes tiles of queries while there are any, the longest first. It starts a tile at the first key that any
of its queries sees, so only its last block can contain keys beyond its end; the consumers zero their values, which may
be anything. A tile whose queries see nothing has one block, fully masked.
"""

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import tiles
from .flash_attention import LOG2_E, _strides
from .launch import cdiv

# Everything that the kernel uses from Gluon for Hopper, including what is named differently between versions.
mbarrier = hopper.mbarrier
load_by_tma = hopper.tma.async_load if hasattr(hopper.tma, "async_load") else hopper.tma.async_copy_global_to_shared
multiply, wait_for_products = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
fence_async_shared = hopper.fence_async_shared

# Per thread, of an SM's 65536: three warpgroups start with equal shares, then the producer gives up most of its own.
REGISTERS = 168
CONSUMERS_REGISTERS = gl.constexpr(240)
PRODUCERS_REGISTERS = gl.constexpr(24)


@gluon.jit
def tile_at(step, program, programs):
    """Return the tile that a program processes in a given step; tiles are sorted, the longest first.

    Every other step runs in reverse, so the program with the longest tile of one step gets the shortest of the next.
    """
    place = program
    if step % 2 == 1:
        place = programs - 1 - program
    return step * programs + place


@gluon.jit
def steps_of(tiles, program, programs):
    """Return how many tiles a program processes."""
    steps = tiles // programs
    if tile_at(steps, program, programs) < tiles:
        steps += 1
    return steps


@gluon.jit
def block_range(first, last, S, BLOCK_K: gl.constexpr):
    """Return the keys [begin, end) of a tile and their number of blocks, at least one (fully masked if need be)."""
    end = max(min(last, S), 0)
    begin = min(max(first, 0), end)
    return begin, end, max((end - begin + BLOCK_K - 1) // BLOCK_K, 1)


@gluon.jit
def plain_blocks(begin, end, latest, until, BLOCK_K: gl.constexpr):
    """Return the blocks [low, high) that need no mask: all queries see the keys [latest, until)."""
    low = (max(min(latest, end), begin) - begin + BLOCK_K - 1) // BLOCK_K
    high = (max(min(until, end), begin) - begin) // BLOCK_K
    return low, high


@gluon.jit
def _tile(tile, tables, sizes, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Return a tile's row, head and first query, its keys [begin, end) and their number of blocks."""
    starts_ptr, lengths_ptr, first_keys_ptr, _ = tables
    tiles, heads, H, T, S, offset, fb, ft, _, _ = sizes
    b, h = tile % heads // H, tile % heads % H
    t0 = (tiles // heads - 1 - tile // heads) * BLOCK_Q  # the last queries see the most keys, so they go first
    first, last = 0, min(t0 + BLOCK_Q, T) + offset  # no query sees later keys
    if starts_ptr is not None:
        first = max(gl.load(starts_ptr + b).to(gl.int32), 0)
    if lengths_ptr is not None:
        last = min(last, gl.load(lengths_ptr + b).to(gl.int32))
    if first_keys_ptr is not None:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        t = t0 + gl.arange(0, BLOCK_Q, layout)
        first = max(first, gl.min(_first_keys(first_keys_ptr, b, t, T, fb, ft), 0))
    begin, end, blocks = block_range(first, last, S, BLOCK_K)
    return b, h, t0, begin, end, blocks


@gluon.jit
def _first_keys(first_keys_ptr, b, t, T, fb, ft):
    at = b.to(gl.int64) * fb + t.to(gl.int64) * ft
    return gl.load(first_keys_ptr + at, mask=t < T, other=2147483647).to(gl.int32)


@gluon.jit
def _load(desc, b, head, key, buffer, full, empty, block, STAGES: gl.constexpr):
    """Load a block of keys or values into its slot as soon as that is empty."""
    place = block % STAGES
    mbarrier.wait(empty.index(place), (block // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(place), desc.block_type.nbytes)
    load_by_tma(desc, [b, head, key, 0], full.index(place), buffer.index(place))


@gluon.jit
def _producer(
    barriers, buffers, q_desc, k_desc, v_desc, tables, sizes,
    GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q_buffer, k_buffer, v_buffer = buffers
    program, programs = gl.program_id(0), gl.num_programs(0)
    done = 0  # blocks of earlier tiles
    for step in range(steps_of(sizes[0], program, programs)):
        b, h, t0, begin, _, blocks = _tile(tile_at(step, program, programs), tables, sizes, BLOCK_Q, BLOCK_K)
        mbarrier.wait(q_empty.index(0), (step & 1) ^ 1)
        mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
        load_by_tma(q_desc, [b, h, t0, 0], q_full.index(0), q_buffer.index(0))
        load_by_tma(q_desc, [b, h, t0 + BLOCK_Q // 2, 0], q_full.index(0), q_buffer.index(1))
        for i in range(blocks):  # keys go before the previous block's values, whose slot is freed later
            _load(k_desc, b, h // GROUP, begin + i * BLOCK_K, k_buffer, k_full, k_empty, done + i, STAGES)
            if i > 0:
                _load(v_desc, b, h // GROUP, begin + (i - 1) * BLOCK_K, v_buffer, v_full, v_empty, done + i - 1, STAGES)
        last = blocks - 1
        _load(v_desc, b, h // GROUP, begin + last * BLOCK_K, v_buffer, v_full, v_empty, done + last, STAGES)
        done += blocks


@gluon.jit
def _softmax(
    scores, m, l, start, end, place, low, mask_ptr, ms, scale,
    MASKED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Return one block's p, the updated maximum score and sum of exponentials, and the factor for earlier sums."""
    if MASKED:
        key = start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        seen = (key < end)[None, :] & (key[None, :] <= place[:, None])
        if mask_ptr is not None:
            seen = seen & (gl.load(mask_ptr + key.to(gl.int64) * ms, mask=key < end, other=0) != 0)[None, :]
        if PACKED:
            seen = seen & (key[None, :] >= low[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    new_m = gl.maximum(m, gl.max(scores, 1) * scale)
    shift = new_m
    if MASKED:
        shift = gl.where(new_m == float("-inf"), 0.0, new_m)  # nothing seen yet: -∞ - (-∞) would be NaN
    p = gl.exp2(scores * scale - shift[:, None])
    shrink = gl.exp2(m - shift)
    return p, new_m, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _consumer(
    barriers, v_clean, buffers, out_ptr, lse_ptr, tables, sizes, scale,
    HALF: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Run one warpgroup, which handles one half of a tile's queries."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q_buffer, k_buffer, v_buffer = buffers
    _, _, first_keys_ptr, mask_ptr = tables
    _, _, H, T, S, offset, fb, ft, mb, ms = sizes
    ROWS: gl.constexpr = BLOCK_Q // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    VALUES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    PACKED: gl.constexpr = first_keys_ptr is not None
    q = q_buffer.index(HALF).reshape([ROWS, D])
    nothing = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)
    program, programs = gl.program_id(0), gl.num_programs(0)
    done, cleaned = 0, 0  # blocks of earlier tiles, and how many of them had to be zeroed
    for step in range(steps_of(sizes[0], program, programs)):
        b, h, t0, begin, end, blocks = _tile(tile_at(step, program, programs), tables, sizes, BLOCK_Q, BLOCK_K)
        first_t = t0 + HALF * ROWS
        t = first_t + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        place = t + offset  # a query's position among the keys
        low, latest = place, begin
        if PACKED:
            low = _first_keys(first_keys_ptr, b, t, T, fb, ft)
            latest = gl.max(gl.where(t < T, low, 0), 0)
        plain_from, plain_to = plain_blocks(begin, end, latest, first_t + offset + 1, BLOCK_K)
        mask_row = mask_ptr
        if mask_ptr is not None:
            mask_row = mask_ptr + b.to(gl.int64) * mb
            if _count(mask_row, begin, end, ms) < end - begin:  # padding in between: every block is masked
                plain_to = 0

        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, D], gl.float32, ACC)
        mbarrier.wait(q_full.index(0), step & 1)
        at = done % STAGES
        mbarrier.wait(k_full.index(at), done // STAGES & 1)
        scores = multiply(q, k_buffer.index(at).reshape([BLOCK_K, D]).permute((1, 0)), nothing, use_acc=False)
        mbarrier.arrive(k_empty.index(at), count=1)
        p, m, l, shrink = _softmax(
            scores, m, l, begin, end, place, low, mask_row, ms, scale, True, PACKED)  # fmt: skip
        weights = gl.convert_layout(p.to(v_buffer.dtype), WEIGHTS)
        for i in range(1, blocks):
            at, before = (done + i) % STAGES, (done + i - 1) % STAGES
            mbarrier.wait(k_full.index(at), (done + i) // STAGES & 1)
            k = k_buffer.index(at).reshape([BLOCK_K, D]).permute((1, 0))
            next_scores = multiply(q, k, nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), (done + i - 1) // STAGES & 1)
            next_acc = multiply(weights, v_buffer.index(before).reshape([BLOCK_K, D]), acc, is_async=True)
            scores = wait_for_products(1, deps=[next_scores])
            mbarrier.arrive(k_empty.index(at), count=1)
            start = begin + i * BLOCK_K
            if (i < plain_from) | (i >= plain_to):
                p, m, l, shrink = _softmax(
                    scores, m, l, start, end, place, low, mask_row, ms, scale, True, PACKED)  # fmt: skip
            else:
                p, m, l, shrink = _softmax(
                    scores, m, l, start, end, place, low, mask_row, ms, scale, False, PACKED)  # fmt: skip
            acc = wait_for_products(0, deps=[next_acc])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, ACC))[:, None]
            weights = gl.convert_layout(p.to(v_buffer.dtype), WEIGHTS)
        mbarrier.arrive(q_empty.index(0), count=1)

        last = done + blocks - 1
        at, start = last % STAGES, begin + (blocks - 1) * BLOCK_K
        mbarrier.wait(v_full.index(at), last // STAGES & 1)
        v = v_buffer.index(at).reshape([BLOCK_K, D])
        if (start + BLOCK_K > end) & (end < S):  # keys beyond may hold anything, and 0 · NaN is NaN
            mine = v.slice(HALF * (BLOCK_K // 2), BLOCK_K // 2)
            key = start + HALF * (BLOCK_K // 2) + gl.arange(0, BLOCK_K // 2, gl.SliceLayout(1, VALUES))
            values = mine.load(VALUES)
            mine.store(gl.where((key < end)[:, None], values, gl.zeros_like(values)))
            fence_async_shared()
            mbarrier.arrive(v_clean.index(0), count=1)
            mbarrier.wait(v_clean.index(0), cleaned & 1)  # the other warpgroup zeroes the other half
            cleaned += 1
        acc = multiply(weights, v, acc)
        mbarrier.arrive(v_empty.index(at), count=1)
        done += blocks

        worth = gl.convert_layout(gl.where(l > 0, 1.0 / l, 0.0), gl.SliceLayout(1, ACC))
        acc = acc * worth[:, None]  # zeros for a query that sees nothing
        row, dim = gl.arange(0, ROWS, gl.SliceLayout(1, ACC)), gl.arange(0, D, gl.SliceLayout(0, ACC))
        out_tile = out_ptr + ((b.to(gl.int64) * T + first_t) * H + h) * D
        gl.store(out_tile + row[:, None] * (H * D) + dim[None, :], acc.to(out_ptr.dtype.element_ty),
                 mask=(row < T - first_t)[:, None])  # fmt: skip
        if lse_ptr is not None:
            row = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
            lse_tile = lse_ptr + (b.to(gl.int64) * H + h) * T + first_t
            gl.store(lse_tile + row, (m + gl.log2(l)) / LOG2_E, mask=row < T - first_t)


@gluon.jit
def _count(mask_ptr, begin, end, ms):
    """Count the keys in [begin, end) that the mask leaves visible."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    seen = gl.zeros([1024], gl.int32, layout)
    for start in range(begin, end, 1024):
        key = start + gl.arange(0, 1024, layout)
        seen += (gl.load(mask_ptr + key.to(gl.int64) * ms, mask=key < end, other=0) != 0).to(gl.int32)
    return gl.sum(seen, 0)


@gluon.jit(do_not_specialize=["tiles", "heads", "H", "T", "S", "offset", "fb", "mb"])
def _flash_attention_hopper_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, starts_ptr, lengths_ptr, first_keys_ptr, mask_ptr,
    tiles, heads, H, T, S, offset, scale, fb, ft, mb, ms,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    buffers = (
        gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BLOCK_Q // 2, D], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_K, D], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_K, D], v_desc.layout),
    )
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_clean = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)
    mbarrier.init(v_clean.index(0), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tables = (starts_ptr, lengths_ptr, first_keys_ptr, mask_ptr)
    sizes = (tiles, heads, H, T, S, offset, fb, ft, mb, ms)
    gl.warp_specialize(
        [
            (_consumer, (barriers, v_clean, buffers, out_ptr, lse_ptr, tables, sizes, scale,
                         0, D, BLOCK_Q, BLOCK_K, STAGES)),
            (_consumer, (barriers, v_clean, buffers, out_ptr, lse_ptr, tables, sizes, scale,
                         1, D, BLOCK_Q, BLOCK_K, STAGES)),
            (_producer, (barriers, buffers, q_desc, k_desc, v_desc, tables, sizes,
                         GROUP, BLOCK_Q, BLOCK_K, STAGES)),
        ],
        [4, 1],
        [CONSUMERS_REGISTERS, PRODUCERS_REGISTERS],
    )  # fmt: skip


def flash_attention_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    first_keys: torch.Tensor | None,
    mask: torch.Tensor | None,
    offset: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Write causal attention to `out` and, unless None, `lse`, both as allocated by `flash_attention._outputs`."""
    B, H, T, D = q.shape
    tile = tiles.hopper(D, starts is lengths is first_keys is mask is None)
    in_all = B * H * cdiv(T, tile.block_q)
    _flash_attention_hopper_kernel[(min(in_all, _processors(q.device)),)](
        _descriptor(q, tile.block_q // 2), _descriptor(k, tile.block_k), _descriptor(v, tile.block_k),
        out, lse, starts, lengths, first_keys, mask,
        in_all, B * H, H, T, k.shape[2], offset, D**-0.5 * LOG2_E.value,
        *((0, 0) if first_keys is None else first_keys.stride()), *((0, 0) if mask is None else mask.stride()),
        GROUP=H // k.shape[1], D=D, BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, STAGES=tile.stages,
        num_warps=4, maxnreg=REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip


def _descriptor(x: torch.Tensor, rows: int) -> Any:
    """Return a TMA descriptor for boxes of `rows` tokens of one head."""
    box = [1, 1, rows, x.shape[-1]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor(x, [*x.shape], _strides(x), box, gl.NVMMASharedLayout.get_default_for(box, dtype))


@cache
def _processors(device: torch.device) -> int:
    """Return how many programs run at a time, one per SM; without a GPU, as on an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
