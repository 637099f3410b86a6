"""Fixes for Triton's interpreter: patches for what TRITON_INTERPRET=1 gets wrong or does slowly.

The interpreter runs a kernel's programs one after another in NumPy. It stores bfloat16 as 16-bit integers, and in
Triton 3.6 to 3.9 two operations on them are silently wrong: `tl.dot` multiplies the integers, and rounding to bfloat16
truncates, so half of all stores are off by one unit in the last place. It also patches `triton.language` again
whenever one jit function calls another, which takes half of its time.
"""

import types
import warnings
from typing import Any

import numpy as np
import triton
import triton.language as tl


def make_right() -> bool:
    """Patch the interpreter, once, if it is enabled; return whether it is."""
    if not triton.knobs.runtime.interpret:
        return False
    from triton.runtime import interpreter as it

    if not hasattr(it, "_llama_triton_mended"):
        it._llama_triton_mended = True
        _round_to_bfloat16(it)
        _multiply_bfloat16(it)
        _count_with_tensors(it)
        _divide_in_silence(it)
        _patch_the_language_once(it)
    return True


def _round_to_bfloat16(it: Any) -> None:
    """Convert float32 to bfloat16 by rounding to nearest, ties to even; NaN stays NaN."""
    convert = it._convert_float

    def mended(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(x).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(x.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return _widened(x)
        return convert(x, source, target, rounding)

    it._convert_float = mended


def _multiply_bfloat16(it: Any) -> None:
    """Compute tl.dot of bfloat16 with float32 products and sums, as the hardware does."""
    multiply = it.InterpreterBuilder.create_dot

    def as_float32(x: Any) -> Any:
        return it.TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def mended(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, as_float32(a), as_float32(b), *rest)

    it.InterpreterBuilder.create_dot = mended


def _widened(bits: np.ndarray) -> np.ndarray:
    wide = np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(bits.shape)


def _count_with_tensors(it: Any) -> None:
    """Allow `range(n)` of a loaded n: NumPy 2.4 and later convert only 0-d arrays to int; Triton 3.6's is 1-d."""
    patch = it._patch_lang_tensor

    def mended(tensor: Any, *scope: Any) -> Any:
        done = patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return done

    it._patch_lang_tensor = mended


def _divide_in_silence(it: Any) -> None:
    """Silence 1 / 0, log 0, overflows and all-NaN rows, as on a GPU; masked lanes are full of them."""
    run = it.GridExecutor.__call__

    def mended(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            return run(self, *args, **kwargs)

    it.GridExecutor.__call__ = mended


def _patch_the_language_once(it: Any) -> None:
    patch = it._patch_lang
    done: list[Any] = []
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    class Kept:
        def restore(self) -> None:
            """Do nothing: the next call needs the patches again."""

    def mended(fn: Any) -> Any:
        if not done:
            done.append(patch(everything))
        return Kept()

    it._patch_lang = mended
