"""Tensor metadata and memory-mapped files."""

import errno
import math
import mmap
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Python has a name for this flag from 3.13 on; its value differs on other processors.
USUAL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if USUAL else 0)


class Stored(NamedTuple):
    """The dtype and shape of a tensor in a file; bfloat16 is `ml_dtypes`' dtype of that name."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class MappedFile:
    """A memory-mapped file, as arrays that are read from disk as they are used.

    The arrays are writable, as PyTorch requires, but copy-on-write: changes stay in this process. Linux is told not to
    reserve memory for these copies; otherwise a file larger than memory could not be mapped.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            if hasattr(mmap, "MAP_PRIVATE"):
                flags, protection = mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                self._data = mmap.mmap(file.fileno(), 0, flags, protection)
            else:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self._data)

    def array(self, stored: Stored, offset: int) -> np.ndarray:
        """The tensor whose first byte is at `offset`; a copy if it is misaligned for its dtype."""
        array = np.frombuffer(self._data, stored.dtype, stored.size, offset).reshape(stored.shape)
        return array if array.flags.aligned else array.copy()  # NumPy would copy it again for every matrix product


def release(array: np.ndarray) -> None:
    """Free the physical memory of a memory-mapped array that has been used but not written to.

    The next use reads the file again. A no-op for arrays that are not mapped.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    data = owner.obj if isinstance(owner, memoryview) else None
    if not isinstance(data, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    low, high = np.lib.array_utils.byte_bounds(array)
    start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    first = -(-(low - start) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: the rest is shared with neighbours
    length = (high - start) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        data.madvise(mmap.MADV_DONTNEED, first, length)


def unreadable(path: Path, otherwise: str, error: Exception) -> OSError | ValueError:
    """The exception for a file that failed to open: the system could not read it, or it is damaged or `otherwise`.

    An invalid seek (EINVAL) or a directory (EISDIR) is the file's fault; other system errors are not.
    """
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    of_the_file = (None, errno.EINVAL, errno.EISDIR)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in of_the_file):
        return OSError(f"{path} could not be read ({reason}), though it may be intact; fix that and try again")
    return ValueError(f"{path} is damaged or {otherwise} ({reason}); download it again")


def dtype_of(tensors: Iterable[Stored]) -> np.dtype:
    """The common dtype of these tensors; if they differ, float64 if any of them is, else float32."""
    kinds = {stored.dtype for stored in tensors}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
