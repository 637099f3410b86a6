"""Every kernel's configuration, by GPU family and shape class. `benchmarks/tune.py` measures alternatives.

Fixed in advance: nothing is tuned at a user's first call, and only gemv's depend on the number of rows, so that a row's
bits do not depend on its batch. Chips of one family have the same shared memory and matrix units
(`launch.family_of`). A test compiles every entry for its family, without a GPU, and allows no register spills.
"""

from functools import cache
from typing import NamedTuple

import torch

from .launch import power_of_2

FAMILIES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (64, 128, 256)  # a head_dim belongs to the first class that holds it; none may exceed the last
WIDEST_ROW = 16384  # for rms_norm, whose programs hold their rows in registers


class Rows(NamedTuple):
    """Rows per program; warps."""

    rows: int
    warps: int


class Block(NamedTuple):
    """Columns per program; warps."""

    block: int
    warps: int


class Heads(NamedTuple):
    """Heads that a program rotates at a time; warps."""

    heads: int
    warps: int


class Products(NamedTuple):
    """Rows of a weight and elements of each that a program takes at a time; warps; pipeline stages."""

    block_n: int
    block_k: int
    warps: int
    stages: int


class Attention(NamedTuple):
    """Queries and keys per tile; warps; pipeline stages; whether keys are loaded through TMA descriptors."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False


class Hopper(NamedTuple):
    """Queries and keys per tile; how many blocks each of keys and values are in flight."""

    block_q: int
    block_k: int
    stages: int


# In memory-bound kernels a thread should load 16 bytes at a time: at least eight elements of two bytes.


@cache
def rms_norm(family: str, width: int) -> Rows:
    """At most 32 elements per thread."""
    block = power_of_2(width)
    rows = max(1, min(4, 2048 // block))
    return Rows(rows, _warps(family, rows * block, {8192: 8, 16384: 16}.get(block, 4)))


@cache
def swiglu(family: str, width: int) -> Block:
    block = min(2048, power_of_2(width))
    return Block(block, _warps(family, block, 8))


@cache
def rope(family: str, heads: int, head_dim: int) -> Heads:
    """At most 2048 pairs at a time."""
    half = power_of_2(head_dim // 2)
    at_once = min(power_of_2(heads), max(1, 2048 // half))
    return Heads(at_once, _warps(family, at_once * half, 4))


@cache
def gemv(family: str, rows: int, dtype: torch.dtype, gated: bool) -> Products:
    """At most 64 accumulators per thread, counting every row of x and both weights of a gate."""
    if family == "interpreter":
        return Products(8, 32, 4, 1)
    block_k = 512 if dtype.itemsize == 2 else 256
    if gated and rows > 1:  # with four warps a few registers spill on sm_80 or sm_89
        return Products(2, 2 * block_k, 8, 2)
    return Products((8 if rows == 1 else 4) // (2 if gated else 1), block_k, 4, 3)


def _warps(family: str, numbers: int, most: int) -> int:
    """Return as many warps as have eight elements for each thread, up to `most`."""
    return min(most, max(1, numbers // (8 * (64 if family == "gfx942" else 32))))


# Prefill, by family and head class: float16 and bfloat16 first, then float32, whose products are exact and use no
# matrix units, so registers only allow small tiles.
PREFILL: dict[str, dict[int, Attention]] = {
    "sm_80": {64: Attention(128, 64, 8, 3), 128: Attention(128, 32, 8, 3), 256: Attention(64, 32, 8, 1)},
    "sm_89": {64: Attention(128, 64, 8, 3), 128: Attention(128, 32, 8, 3), 256: Attention(64, 32, 8, 1)},
    "sm_90": {64: Attention(128, 128, 8, 2, True), 128: Attention(128, 128, 8, 3, True),
              256: Attention(128, 32, 8, 3, True)},
    "sm_100": {64: Attention(128, 128, 8, 2, True), 128: Attention(128, 64, 8, 3, True),
               256: Attention(64, 64, 8, 2, True)},
    "gfx942": {64: Attention(128, 64, 4, 1), 128: Attention(128, 64, 4, 1), 256: Attention(64, 32, 4, 1)},
}  # fmt: skip
# Where descriptors cannot address the keys (a stride or an address that is not a multiple of 16 bytes).
PREFILL_PLAIN: dict[str, dict[int, Attention]] = {
    "sm_90": {64: Attention(128, 64, 8, 3), 128: Attention(128, 64, 8, 2), 256: Attention(64, 32, 8, 2)},
    "sm_100": {64: Attention(128, 64, 8, 3), 128: Attention(128, 64, 8, 3), 256: Attention(64, 32, 8, 2)},
}
PREFILL_FLOAT32 = {64: Attention(32, 32, 8, 1), 128: Attention(32, 32, 8, 1), 256: Attention(16, 16, 16, 1)}
SHORT_FLOAT32 = {64: Attention(16, 16, 4, 1), 128: Attention(16, 16, 8, 1), 256: Attention(16, 16, 16, 1)}
PREFILL_FLOAT32_BOTH = PREFILL_FLOAT32 | {128: SHORT_FLOAT32[128]}
# The opt-in kernel for sm_90, by head_dim. Padding and packing take registers: blocks of 128 keys spill (Triton 3.9).
PREFILL_HOPPER = {64: Hopper(128, 128, 4), 128: Hopper(128, 128, 2)}
PREFILL_HOPPER_PADDED = Hopper(128, 64, 4)
# One new token: the heads of a group are the rows, of which a matrix unit needs at least 16.
DECODE: dict[str, dict[int, Attention]] = {
    name: {64: Attention(16, 64, 4, stages), 128: Attention(16, 64, 4, stages), 256: Attention(16, 32, 4, stages)}
    for name, stages in (("sm_80", 3), ("sm_89", 2), ("sm_90", 3), ("sm_100", 3), ("gfx942", 1))
}
DECODE_FLOAT32 = {64: Attention(16, 32, 4, 1), 128: Attention(16, 32, 8, 1), 256: Attention(16, 16, 4, 1)}
INTERPRETED = Attention(16, 16, 4, 1)  # small, so that small tests cross block boundaries
SHORT = 16  # up to this many new tokens, prefill uses tiles as small as decode_attention's
SPLITS = 32  # a long cache is split into at most this many pieces, which fill the GPU at batch 1
CROSS_ENTROPY = Block(4096, 8)
LOGITS_AT_ONCE = 2**27  # linear_cross_entropy holds at most this many logits at a time


def head_class(head_dim: int) -> int:
    for size in HEAD_DIMS:
        if head_dim <= size:
            return size
    raise ValueError(f"head_dim must be at most {HEAD_DIMS[-1]}, got {head_dim}")


def prefill(family: str, head_dim: int, dtype: torch.dtype, tokens: int, tma: bool, both: bool) -> Attention:
    """Return flash_attention's tile. `tma`: descriptors can address the keys. `both`: rows are padded and packed.

    That, and heads that do not fill their class, cost registers; tiles then have fewer keys.
    """
    if family == "interpreter":
        return INTERPRETED
    size = head_class(head_dim)
    if tokens <= SHORT:
        if dtype == torch.float32:
            return SHORT_FLOAT32[size]
        tile = decode(family, head_dim, dtype)
        return tile if head_dim == size else tile._replace(block_k=16)
    if dtype == torch.float32:
        return PREFILL_FLOAT32_BOTH[size] if both else PREFILL_FLOAT32[size]
    tile = PREFILL[family][size]
    if tile.tma and not tma:
        return PREFILL_PLAIN[family][size]
    return tile if head_dim == size or not tile.tma else tile._replace(block_k=min(tile.block_k, 64))


def hopper(head_dim: int, plain: bool) -> Hopper:
    """Return flash_attention_hopper's tile; `plain` means neither padding nor packing."""
    return PREFILL_HOPPER[head_dim] if plain else PREFILL_HOPPER_PADDED


def decode(family: str, head_dim: int, dtype: torch.dtype) -> Attention:
    """Return decode_attention's tile."""
    if family == "interpreter":
        return INTERPRETED
    size = head_class(head_dim)
    return DECODE_FLOAT32[size] if dtype == torch.float32 else DECODE[family][size]
