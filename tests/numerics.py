"""How kernels are judged: by float64 truth, in any memory layout, in memory that shows what nobody wrote.

Used by every `test_kernels_*.py`. Tensors are drawn on the CPU and live on DEVICE, so that `pytest --gpu` runs the same
tests natively.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from llama.kernels import launch

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ("contiguous", "sliced", "reversed axes", "every other", "shifted")
GUARD = 4096  # bytes on either side of a new tensor; a multiple of 16, so that alignment stays


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.tensor(scale * rng.normal(size=shape)).to(dtype).to(DEVICE)


def integers(values, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=dtype, device=DEVICE)


def exact(x: torch.Tensor | None) -> np.ndarray | None:
    """For the reference: floating-point numbers as float64, the rest as it is."""
    if x is None:
        return None
    return (x.detach().double() if x.is_floating_point() else x.detach()).cpu().numpy()


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The numbers of x in another layout, with NaN (integers: their largest) in all the places around them."""
    around = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max if x.dtype != torch.bool else True
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "sliced":  # a corner of something larger
        slab = x.new_full([size + 3 for size in x.shape], around)
        view = slab[tuple(slice(1, 1 + size) for size in x.shape)]
    elif layout == "reversed axes":
        slab = x.new_full([size + 1 for size in reversed(x.shape)], around)
        view = slab[tuple(slice(0, size) for size in reversed(x.shape))].permute(*reversed(range(x.dim())))
    elif layout == "every other":  # no two neighbours side by side
        slab = x.new_full([*x.shape[:-1], 2 * x.shape[-1] + 1], around)
        view = slab[..., 1 : 2 * x.shape[-1] : 2]
    else:  # "shifted": contiguous, but on no border that wide loads would want
        slab = x.new_full([x.numel() + 2], around)
        view = slab[1 : 1 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


layouts = st.sampled_from(LAYOUTS)


def around_powers_of_two(largest: int) -> st.SearchStrategy[int]:
    """1 to `largest`, with a liking for powers of two and their neighbours."""
    near = {2**n + d for n in range(largest.bit_length()) for d in (-1, 0, 1)}
    return st.integers(1, largest) | st.sampled_from(sorted(n for n in near if 1 <= n <= largest))


def examples(count: int) -> settings:
    """So many examples in the interpreter. On a GPU a tenth: nearly every shape and layout is compiled for itself."""
    return settings(max_examples=count if launch.INTERPRETED else max(5, count // 10))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit, but for the bits of a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


def ulps(dtype: torch.dtype, terms) -> np.ndarray:
    """The distance between neighbours in `dtype` at numbers of this size."""
    info = torch.finfo(dtype)
    return np.maximum(info.eps * np.abs(np.asarray(terms, np.float64)), info.smallest_normal * info.eps)


def assert_no_worse(ours: torch.Tensor, plain: torch.Tensor, truth, terms=None, float32_terms=0.0, factor=2.0) -> None:
    """Row by row (over the last axis), `ours` misses the float64 `truth` by at most `factor` times what `plain`
    PyTorch misses it by in the same dtype, plus two ulps of the largest of the `terms` that were summed (default: of
    the result itself), plus two ulps in float32 of the `float32_terms` on the way there.

    Both kinds of terms are a number for each row, or one for all.
    """
    truth = np.asarray(truth, np.float64)
    assert tuple(ours.shape) == tuple(plain.shape) == truth.shape
    if not truth.size:
        return
    assert np.isfinite(truth).all()
    row = (lambda x: np.abs(x).max(axis=-1)) if truth.ndim else np.abs
    bar = factor * row(exact(plain) - truth) + 2 * ulps(ours.dtype, row(truth) if terms is None else terms)
    if np.any(float32_terms):
        bar = bar + 2 * ulps(torch.float32, float32_terms)
    miss = row(exact(ours) - truth)
    assert (miss <= bar).all(), f"missed by up to {np.max(miss / bar):.3g} times what is allowed"  # NaN is a miss too


@contextmanager
def guarded_memory() -> Iterator[None]:
    """New tensors come filled with NaN (integers: -1), between guards that nobody may write on.

    So an element of an output that a kernel forgets is NaN, and a store past the end is found.
    """
    real = torch.empty, torch.empty_like
    slabs = []

    def guarded(new: torch.Tensor) -> torch.Tensor:
        if new.is_meta or not new.numel():
            return new
        slab = real[0](new.untyped_storage().nbytes() + 2 * GUARD, dtype=torch.uint8, device=new.device).fill_(255)
        slabs.append((slab[:GUARD], slab[-GUARD:]))
        return slab[GUARD:-GUARD].view(new.dtype).as_strided(new.shape, new.stride(), GUARD // new.element_size())

    torch.empty = lambda *args, **kwargs: guarded(real[0](*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: guarded(real[1](*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = real
    for guards in slabs:
        assert all((guard == 255).all() for guard in guards), "something was written outside of a tensor"


def in_guarded_memory() -> Iterator[None]:
    with guarded_memory():
        yield


def guard_memory():
    """`memory = guard_memory()` in a test file puts all of its tests into guarded memory."""
    return pytest.fixture(autouse=True)(in_guarded_memory)


@contextmanager
def int32_watched() -> Iterator[None]:
    """The interpreter raises where 32-bit arithmetic overflows; on a GPU it would go on with a wrong address."""
    if not launch.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    try:
        yield
    finally:
        interpreter.interpreter_builder.options = options
