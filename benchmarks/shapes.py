"""What `llama bench kernels` measures: Llama's sizes, what each operation must move and compute, the default shapes.

Letters are the project's: B batch, T new tokens, S all tokens, H query heads, K key/value heads, D head size, E width,
F feed-forward width, V vocabulary; e is the bytes per element.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

MODELS: dict[str, dict[str, int]] = {
    "135m": {"E": 576, "F": 1536, "H": 9, "K": 3, "D": 64, "V": 49152},  # SmolLM2-135M, the default on a CPU
    "7b": {"E": 4096, "F": 11008, "H": 32, "K": 32, "D": 128, "V": 32000},  # Llama-2-7B
    "8b": {"E": 4096, "F": 14336, "H": 32, "K": 8, "D": 128, "V": 128256},  # Llama-3-8B
    "70b": {"E": 8192, "F": 28672, "H": 64, "K": 8, "D": 128, "V": 128256},  # Llama-3-70B
}
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes per element
PAGE = 64  # tokens per page of a paged cache
FEW = 4  # the most rows of gemv: one new token for each of this many texts


class Cost(NamedTuple):
    """The least that an operation must do: read every input once, write every output once, and its arithmetic."""

    moved: Callable[..., int]  # bytes
    flops: Callable[..., int]
    products: bool = False  # whether the arithmetic is matrix products, whose rate then limits it


def _pairs(T: int, S: int) -> int:
    """The number of pairs of a query and a visible key, the queries being the last T of S tokens."""
    return T * (S - T) + T * (T + 1) // 2


# A multiply-add counts as 2, as usual; an exponential or a root as 1. Causal attention counts the visible pairs,
# T (T + 1) / 2, where other benchmarks use T² / 2.
COSTS: dict[str, Cost] = {
    "rms_norm": Cost(  # x, weight; y
        lambda B, T, E, e, **_: (2 * B * T * E + E) * e,
        lambda B, T, E, **_: 4 * B * T * E,
    ),
    "add_rms_norm": Cost(  # x, residual, weight; y, residual
        lambda B, T, E, e, **_: (4 * B * T * E + E) * e,
        lambda B, T, E, **_: 5 * B * T * E,
    ),
    "apply_rope": Cost(  # q, k, cos, sin; q, k
        lambda B, T, H, K, D, e, **_: (2 * B * T * (H + K) * D + 2 * T * D) * e,
        lambda B, T, H, K, D, **_: 3 * B * T * (H + K) * D,
    ),
    "apply_rope_to_cache": Cost(  # q, k, v, cos, sin, positions of 8 bytes; q, and k and v in the cache
        lambda B, T, H, K, D, e, **_: (2 * B * T * (H + 2 * K) * D + 2 * T * D) * e + 8 * B * T,
        lambda B, T, H, K, D, **_: 3 * B * T * (H + K) * D,
    ),
    "swiglu": Cost(  # gate, up; y
        lambda B, T, F, e, **_: 3 * B * T * F * e,
        lambda B, T, F, **_: 6 * B * T * F,
    ),
    "gemv": Cost(  # x, the weights of q, k and v; q, k and v
        lambda B, E, H, K, D, e, **_: (B * E + (H + 2 * K) * D * E + B * (H + 2 * K) * D) * e,
        lambda B, E, H, K, D, **_: 2 * B * E * (H + 2 * K) * D,
        products=True,
    ),
    "gemv_swiglu": Cost(  # x, the weights of gate and up; y
        lambda B, E, F, e, **_: (B * E + 2 * F * E + B * F) * e,
        lambda B, E, F, **_: 4 * B * E * F + 6 * B * F,
        products=True,
    ),
    "flash_attention": Cost(  # q, k, v; o
        lambda B, T, S, H, K, D, e, **_: B * (2 * T * H + 2 * S * K) * D * e,
        lambda B, T, S, H, D, **_: 4 * B * H * D * _pairs(T, S),
        products=True,
    ),
    "decode_attention": Cost(  # q, the cache, lengths of 8 bytes, the table's pages of 4, a mask of 1; o
        lambda B, S, H, K, D, e, page=0, masked=0, **_: (
            B * (2 * H + 2 * S * K) * D * e + 8 * B + (4 * B * S // page if page else 0) + masked * B * S
        ),
        lambda B, S, H, D, **_: 4 * B * H * D * S,
        products=True,
    ),
    "cross_entropy": Cost(  # logits, labels of 8 bytes; the loss, 4 bytes
        lambda B, T, V, e, **_: B * T * V * e + 8 * B * T + 4,
        lambda B, T, V, **_: 4 * B * T * V,
    ),
    "linear_cross_entropy": Cost(  # hidden, weight, labels; the loss
        lambda B, T, E, V, e, **_: (B * T * E + V * E) * e + 8 * B * T + 4,
        lambda B, T, E, V, **_: 2 * B * T * E * V + 4 * B * T * V,
        products=True,
    ),
}

_LETTERS = {
    "rms_norm": "E", "add_rms_norm": "E", "apply_rope": "HKD", "apply_rope_to_cache": "HKD", "swiglu": "F",
    "gemv": "EHKD", "gemv_swiglu": "EF",
    "flash_attention": "HKD", "decode_attention": "HKD", "cross_entropy": "V", "linear_cross_entropy": "EV",
}  # fmt: skip

# (B, T), or (B, S) for decode_attention. `None` stands for all operations not listed.
Grid = Mapping[str | None, Sequence[tuple[int, int]]]
GPU: Grid = {
    None: [(1, 1), (64, 1), (1, 512), (1, 4096), (1, 16384)],
    "flash_attention": [(1, 512), (1, 2048), (1, 4096), (1, 16384), (8, 2048), (64, 512)],
    "decode_attention": [(1, 1024), (1, 16384), (8, 8192), (64, 1024), (64, 8192)],
    "gemv": [(1, 1), (FEW, 1)],
    "gemv_swiglu": [(1, 1), (FEW, 1)],
    "cross_entropy": [(1, 1), (1, 512), (1, 4096), (1, 16384)],
    "linear_cross_entropy": [(1, 512), (1, 4096), (1, 16384)],
}
GPU_QUICK: Grid = {None: [(1, 1), (1, 4096)], "decode_attention": [(8, 8192)], "flash_attention": [(1, 4096)],
                   "cross_entropy": [(1, 4096)], "linear_cross_entropy": [(1, 4096)]}  # fmt: skip
CPU: Grid = {None: [(1, 1), (1, 512)], "flash_attention": [(1, 128), (1, 512)],
             "decode_attention": [(1, 1024), (8, 1024)],
             "cross_entropy": [(1, 128)], "linear_cross_entropy": [(1, 128)]}  # fmt: skip
CPU_QUICK: Grid = {None: [(1, 128)], "decode_attention": [(1, 1024)]}


class Case(NamedTuple):
    """One operation at one shape."""

    op: str
    model: str  # those of `MODELS` that have this shape, joined by slashes
    shape: dict[str, int]
    dtype: str

    @property
    def moved(self) -> int:
        """Bytes that must move."""
        return COSTS[self.op].moved(**self.shape, e=DTYPES[self.dtype])

    @property
    def flops(self) -> int:
        return COSTS[self.op].flops(**self.shape)

    def words(self) -> str:
        return " ".join(f"{letter}={size}" for letter, size in self.shape.items())


def cases(
    ops: Iterable[str], models: Iterable[str], dtypes: Iterable[str], grid: Grid,
    tokens: Sequence[int] = (), batches: Sequence[int] = (),
) -> list[Case]:  # fmt: skip
    """The cases to measure: the grid's, or every given batch with every given number of tokens.

    Models that share a shape share a case, which has both names. Where T is always 1, `tokens` has no effect.
    """
    found: dict[Any, Case] = {}
    for op in ops:
        for dtype in dtypes:
            for model in models:
                for B, T in _places(grid.get(op, grid[None]), tokens, batches):
                    for shape in _shapes(op, model, B, T):
                        key = (op, dtype, *shape.items())
                        names = f"{found[key].model}/{model}" if key in found else model
                        found[key] = Case(op, names, shape, dtype)
    return list(found.values())


def _places(
    default: Sequence[tuple[int, int]], tokens: Sequence[int], batches: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """The grid's pairs, with the given values replacing its own."""
    pairs = [(B, T) for b, t in default for B in batches or [b] for T in tokens or [t]]
    yield from dict.fromkeys(pairs)


def _shapes(op: str, model: str, B: int, T: int) -> Iterator[dict[str, int]]:
    sizes = {letter: MODELS[model][letter] for letter in _LETTERS[op]}
    if op == "decode_attention":
        yield {"B": B, "T": 1, "S": T, **sizes}
        yield {"B": B, "T": 1, "S": T, **sizes, "masked": 1}
        if T % PAGE == 0:
            yield {"B": B, "T": 1, "S": T, **sizes, "page": PAGE}
    elif op == "flash_attention":
        yield {"B": B, "T": T, "S": T, **sizes}
    elif not op.startswith("gemv"):
        yield {"B": B, "T": T, **sizes}
    elif B <= FEW:
        yield {"B": B, "T": 1, **sizes}
