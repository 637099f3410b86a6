"""Probe how Triton's interpreter handles bfloat16 and 1 / 0.

Run as a script, this probes the interpreter as Triton ships it; `test_interpreter.py` probes the patched one.
"""

import json
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def _convert_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.full((N, N), 1.0, tl.float32)
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), acc))


@triton.jit
def _top(x):
    return tl.max(x, 0)


@triton.jit
def _silent_kernel(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr, 1.0 / _top(x))
    tl.store(y_ptr + 1, tl.log(_top(x)))
    tl.store(y_ptr + 2, tl.exp(_top(x) + 1e30))
    tl.store(y_ptr + 3, _top(x / x))


@triton.jit
def _count_kernel(n_ptr, y_ptr):
    total = 0
    for i in range(tl.load(n_ptr)):
        total += i
    tl.store(y_ptr, total)


def every_bfloat16() -> torch.Tensor:
    """Return all 65,536 bfloat16 values with float32 neighbours: just above each, and around its rounding tie."""
    high = np.arange(2**16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF, 0x4000], np.uint32)
    return torch.from_numpy((high[:, None] | low).reshape(-1).view(np.float32))


def wrongly_rounded() -> int:
    """Count the float32 numbers rounded to a different bfloat16 than PyTorch's."""
    x = every_bfloat16()
    y = torch.zeros(len(x), dtype=torch.bfloat16)
    _convert_kernel[(1,)](x, y, N=len(x))
    expected = x.to(torch.bfloat16)
    right = torch.where(expected.isnan(), y.isnan(), y.view(torch.int16) == expected.view(torch.int16))
    return int((~right).sum())


def wrongly_widened() -> int:
    x = every_bfloat16()[::8].to(torch.bfloat16)
    y = torch.zeros(len(x), dtype=torch.float32)
    _convert_kernel[(1,)](x, y, N=len(x))
    return int((~((y == x.float()) | (y.isnan() & x.isnan()))).sum())


def wrong_products(dtype: torch.dtype = torch.bfloat16) -> int:
    """Count the wrong elements of a product of small integers, which is exact."""
    rng = np.random.default_rng(0)
    a, b = (torch.tensor(rng.integers(-8, 9, (32, 32))).to(dtype) for _ in range(2))
    c = torch.zeros(32, 32)
    _dot_kernel[(1,)](a, b, c, N=32)
    return int((c != a.float() @ b.float() + 1).sum())


def silent_numbers() -> list[float]:
    """Compute 1 / 0, log 0, e^∞ and the maximum of nothing but NaN."""
    y = torch.zeros(4)
    _silent_kernel[(1,)](torch.zeros(8), y, N=8)
    return y.tolist()


def counted(n: int) -> int:
    """Compute Σ_{i < n} i in a loop whose trip count is loaded from memory."""
    y = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(1,)](torch.tensor([n], dtype=torch.int32), y)
    return int(y)


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silent_numbers()
    print(json.dumps({"rounded": wrongly_rounded(), "products": wrong_products(), "warnings": len(caught)}))
