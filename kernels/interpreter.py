"""Triton's interpreter, made right: what TRITON_INTERPRET=1 gets wrong or does slowly, mended in place.

The interpreter runs a kernel's programs one after another in NumPy. It keeps bfloat16 as 16-bit integers, and three
things go wrong with them, without a word (triton 3.6 to 3.9): `tl.dot` multiplies the integers, rounding to bfloat16
truncates, and so half of all stores are off by one place. And on every call of one jit function from another it
patches `triton.language` anew, which takes half of its time.
"""

import types
import warnings
from typing import Any

import numpy as np
import triton
import triton.language as tl


def make_right() -> bool:
    """Mend the interpreter, once, where it runs; say whether it does."""
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
    """float32 to bfloat16: to the nearest, ties to even, NaN stays NaN."""
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
    """tl.dot of bfloat16: float32 products and sums, as the hardware does."""
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
    """`range(n)` of a loaded n: NumPy from 2.4 on takes only arrays without axes for numbers, triton 3.6 has one."""
    patch = it._patch_lang_tensor

    def mended(tensor: Any, *scope: Any) -> Any:
        done = patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return done

    it._patch_lang_tensor = mended


def _divide_in_silence(it: Any) -> None:
    """1 / 0, log 0, overflows and rows of NaN are as silent as on a GPU; masked lanes are full of them."""
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
            """Nothing: the next call wants it patched again."""

    def mended(fn: Any) -> Any:
        if not done:
            done.append(patch(everything))
        return Kept()

    it._patch_lang = mended
