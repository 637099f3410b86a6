"""Every kernel's configuration, by GPU family and shape class. `benchmarks/tune.py` measures rivals of these.

Fixed in advance: nothing is tuned at a user's first call, and nothing but gemv's depends on how many rows there are, so
that a row's bits do not depend on its batch. Where two chips share a family they share its shared memory and matrix
units (`launch.family_of`). A test compiles every entry for its family without a GPU and wants no spills.
"""

from functools import cache
from typing import NamedTuple

import torch

from .launch import power_of_2

FAMILIES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (64, 128, 256)  # a head of D numbers takes the first class that holds it; above the last there is none
WIDEST_ROW = 16384  # of rms_norm: a program holds its row in registers


class Rows(NamedTuple):
    """Rows of a program, and its warps."""

    rows: int
    warps: int


class Block(NamedTuple):
    """Columns of a program, and its warps."""

    block: int
    warps: int


class Heads(NamedTuple):
    """Heads that a program turns at a time, and its warps."""

    heads: int
    warps: int


class Products(NamedTuple):
    """Rows of a weight and numbers of each that a program takes at a time, warps, stages of the pipeline."""

    block_n: int
    block_k: int
    warps: int
    stages: int


class Attention(NamedTuple):
    """Queries and keys of a tile, warps, stages of the pipeline, and whether keys come by TMA descriptors."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False


class Hopper(NamedTuple):
    """Queries and keys of a tile, and how many blocks of keys and of values are under way at a time."""

    block_q: int
    block_k: int
    stages: int


# Of the kernels that memory binds a thread should load 16 bytes at a time: eight numbers, or more, of two bytes.


@cache
def rms_norm(family: str, width: int) -> Rows:
    """Thirty-two numbers a thread at most."""
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
    """A thread adds up at most 64 numbers: those of each row of x and of both weights of a gate."""
    if family == "interpreter":
        return Products(8, 32, 4, 1)
    block_k = 512 if dtype.itemsize == 2 else 256
    if gated and rows > 1:  # with four warps a few registers spill, on sm_80 or sm_89
        return Products(2, 2 * block_k, 8, 2)
    return Products((8 if rows == 1 else 4) // (2 if gated else 1), block_k, 4, 3)


def _warps(family: str, numbers: int, most: int) -> int:
    """As many as have eight numbers for each of their threads."""
    return min(most, max(1, numbers // (8 * (64 if family == "gfx942" else 32))))


# Prefill, by family and head class: halves (float16, bfloat16), then float32, whose products are exact and take no
# matrix units, so that registers want small tiles.
PREFILL: dict[str, dict[int, Attention]] = {
    "sm_80": {64: Attention(128, 64, 8, 3), 128: Attention(128, 32, 8, 3), 256: Attention(64, 32, 8, 1)},
    "sm_89": {64: Attention(128, 64, 8, 3), 128: Attention(128, 32, 8, 3), 256: Attention(64, 32, 8, 1)},
    "sm_90": {64: Attention(128, 128, 8, 2, True), 128: Attention(128, 128, 8, 3, True),
              256: Attention(128, 32, 8, 3, True)},
    "sm_100": {64: Attention(128, 128, 8, 2, True), 128: Attention(128, 64, 8, 3, True),
               256: Attention(64, 64, 8, 2, True)},
    "gfx942": {64: Attention(128, 64, 4, 1), 128: Attention(128, 64, 4, 1), 256: Attention(64, 32, 4, 1)},
}  # fmt: skip
# Where descriptors cannot address the keys (a stride or a start that is no multiple of 16 bytes).
PREFILL_PLAIN: dict[str, dict[int, Attention]] = {
    "sm_90": {64: Attention(128, 64, 8, 3), 128: Attention(128, 64, 8, 2), 256: Attention(64, 32, 8, 2)},
    "sm_100": {64: Attention(128, 64, 8, 3), 128: Attention(128, 64, 8, 3), 256: Attention(64, 32, 8, 2)},
}
PREFILL_FLOAT32 = {64: Attention(32, 32, 8, 1), 128: Attention(32, 32, 8, 1), 256: Attention(16, 16, 16, 1)}
SHORT_FLOAT32 = {64: Attention(16, 16, 4, 1), 128: Attention(16, 16, 8, 1), 256: Attention(16, 16, 16, 1)}
PREFILL_FLOAT32_BOTH = PREFILL_FLOAT32 | {128: SHORT_FLOAT32[128]}
# By head_dim, of the kernel for sm_90 that has to be asked for. Padding and packing take registers, and blocks of 128
# keys would spill (Triton 3.9).
PREFILL_HOPPER = {64: Hopper(128, 128, 4), 128: Hopper(128, 128, 2)}
PREFILL_HOPPER_PADDED = Hopper(128, 64, 4)
# One new token: the heads of a group are the rows, of which a matrix unit wants 16 at least.
DECODE: dict[str, dict[int, Attention]] = {
    name: {64: Attention(16, 64, 4, stages), 128: Attention(16, 64, 4, stages), 256: Attention(16, 32, 4, stages)}
    for name, stages in (("sm_80", 3), ("sm_89", 2), ("sm_90", 3), ("sm_100", 3), ("gfx942", 1))
}
DECODE_FLOAT32 = {64: Attention(16, 32, 4, 1), 128: Attention(16, 32, 8, 1), 256: Attention(16, 16, 4, 1)}
INTERPRETED = Attention(16, 16, 4, 1)  # small, so that small tests cross their borders
SHORT = 16  # so few new tokens are rows of a tile of decode_attention
SPLITS = 32  # a long cache is read in at most so many pieces, which fill the GPU at batch 1
CROSS_ENTROPY = Block(4096, 8)
LOGITS_AT_ONCE = 2**27  # linear_cross_entropy holds this many logits, and no more


def head_class(head_dim: int) -> int:
    for size in HEAD_DIMS:
        if head_dim <= size:
            return size
    raise ValueError(f"heads of up to {HEAD_DIMS[-1]} numbers, got {head_dim}")


def prefill(family: str, head_dim: int, dtype: torch.dtype, tokens: int, tma: bool, both: bool) -> Attention:
    """The tile of flash_attention; `tma` says whether descriptors can address these keys, `both` whether rows are
    padded and packed. Fewer keys at a time leave registers for that, and for heads that do not fill their class."""
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
    """The tile of flash_attention_hopper; plain has neither padding nor packing."""
    return PREFILL_HOPPER[head_dim] if plain else PREFILL_HOPPER_PADDED


def decode(family: str, head_dim: int, dtype: torch.dtype) -> Attention:
    """The tile of decode_attention."""
    if family == "interpreter":
        return INTERPRETED
    size = head_class(head_dim)
    return DECODE_FLOAT32[size] if dtype == torch.float32 else DECODE[family][size]
