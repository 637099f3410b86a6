"""Helpers for testing kernels: float64 references, all memory layouts, and guarded memory.

Used by every `test_kernels_*.py`. Tensors are generated on the CPU and moved to DEVICE, so that `pytest --gpu` runs the
same tests natively.
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
GUARD = 4096  # bytes on either side of a new tensor; a multiple of 16 to preserve alignment


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.tensor(scale * rng.normal(size=shape)).to(dtype).to(DEVICE)


def integers(values, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=dtype, device=DEVICE)


def exact(x: torch.Tensor | None) -> np.ndarray | None:
    """Convert to NumPy for the reference: floating-point tensors to float64, others unchanged."""
    if x is None:
        return None
    return (x.detach().double() if x.is_floating_point() else x.detach()).cpu().numpy()


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Copy x into the given layout, surrounded by NaN (bool: True, integers: their largest)."""
    around = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max if x.dtype != torch.bool else True
    if layout == "contiguous" or x.dim() == 0:
        return x.contiguous()
    if layout == "sliced":  # out of a larger tensor
        slab = x.new_full([size + 3 for size in x.shape], around)
        view = slab[tuple(slice(1, 1 + size) for size in x.shape)]
    elif layout == "reversed axes":
        slab = x.new_full([size + 1 for size in reversed(x.shape)], around)
        view = slab[tuple(slice(0, size) for size in reversed(x.shape))].permute(*reversed(range(x.dim())))
    elif layout == "every other":  # stride 2 along the last axis
        slab = x.new_full([*x.shape[:-1], 2 * x.shape[-1] + 1], around)
        view = slab[..., 1 : 2 * x.shape[-1] : 2]
    else:  # "shifted": contiguous, but not aligned for wide loads
        slab = x.new_full([x.numel() + 2], around)
        view = slab[1 : 1 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


layouts = st.sampled_from(LAYOUTS)


def around_powers_of_two(largest: int) -> st.SearchStrategy[int]:
    """Draw integers from 1 to `largest`, favouring powers of two and their neighbours."""
    near = {2**n + d for n in range(largest.bit_length()) for d in (-1, 0, 1)}
    return st.integers(1, largest) | st.sampled_from(sorted(n for n in near if 1 <= n <= largest))


def examples(count: int) -> settings:
    """Set the number of examples, a tenth on a GPU: nearly every shape and layout is compiled separately."""
    return settings(max_examples=count if launch.INTERPRETED else max(5, count // 10))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit are equal, except for the payloads of NaNs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


def ulps(dtype: torch.dtype, terms) -> np.ndarray:
    """Return the spacing of `dtype` at numbers of this magnitude."""
    info = torch.finfo(dtype)
    return np.maximum(info.eps * np.abs(np.asarray(terms, np.float64)), info.smallest_normal * info.eps)


def assert_no_worse(ours: torch.Tensor, plain: torch.Tensor, truth, terms=None, float32_terms=0.0, factor=2.0) -> None:
    """Assert that in each row (last axis) `ours` is almost as close to the float64 `truth` as `plain` PyTorch.

    The largest error of a row may be `factor` times that of `plain`, computed in the same dtype, plus two ulps of the
    largest summed term in `terms` (default: of the result itself), plus two float32 ulps of the intermediate
    `float32_terms`. Both kinds of terms are one number per row, or one for all rows.
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
    assert (miss <= bar).all(), f"the error is up to {np.max(miss / bar):.3g} times the bound"  # NaN fails too


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Fill new tensors with NaN (integers: -1) and surround them with guard bytes.

    An output element that a kernel does not write is then NaN, and an out-of-bounds store is detected.
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
        assert all((guard == 255).all() for guard in guards), "a kernel wrote outside a tensor"


def in_guarded_memory() -> Iterator[None]:
    with guarded_memory():
        yield


def guard_memory():
    """Return a fixture: `memory = guard_memory()` in a test file runs all its tests in guarded memory."""
    return pytest.fixture(autouse=True)(in_guarded_memory)


@contextmanager
def int32_watched() -> Iterator[None]:
    """Make the interpreter raise on 32-bit overflow, which on a GPU would silently yield a wrong address."""
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
