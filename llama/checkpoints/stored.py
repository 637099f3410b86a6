"""What is known about a tensor before it is read; and files mapped into memory."""

import errno
import math
import mmap
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Python names this flag from 3.13 on; other processors have other numbers for it.
USUAL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if USUAL else 0)


class Stored(NamedTuple):
    """A tensor as a file holds it; bfloat16 is `ml_dtypes`' dtype of that name."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class MappedFile:
    """A file's bytes as arrays that are read from disk as they are used.

    The arrays can be written to, as PyTorch demands of its memory; what is written stays in this process. Linux is told
    to set no memory aside for that: a file larger than the memory could not be mapped otherwise.
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
        """The tensor whose first byte stands at `offset`; copied where it stands at no multiple of its type's size."""
        array = np.frombuffer(self._data, stored.dtype, stored.size, offset).reshape(stored.shape)
        return array if array.flags.aligned else array.copy()  # NumPy would copy it again at every product


def release(array: np.ndarray) -> None:
    """Let go of the memory behind a mapped array that has been used and not been written to.

    The next use reads the file again. For an array that is not mapped this does nothing.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    data = owner.obj if isinstance(owner, memoryview) else None
    if not isinstance(data, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    low, high = np.lib.array_utils.byte_bounds(array)
    start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    first = -(-(low - start) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: the rest belongs to the neighbours
    length = (high - start) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        data.madvise(mmap.MADV_DONTNEED, first, length)


def unreadable(path: Path, otherwise: str, error: Exception) -> OSError | ValueError:
    """What to raise where opening a file failed: that the machine cannot, or that the file is damaged or `otherwise`.

    A seek that makes no sense (EINVAL) or a folder (EISDIR) is the file's fault, other errors of the system are not.
    """
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    of_the_file = (None, errno.EINVAL, errno.EISDIR)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in of_the_file):
        return OSError(f"{path} could not be read ({reason}), though it may be whole; mend that and try again")
    return ValueError(f"{path} is damaged or {otherwise} ({reason}); fetch it anew")


def dtype_of(tensors: Iterable[Stored]) -> np.dtype:
    """The dtype that holds all of these: theirs if they agree, else float32, or float64 where one is."""
    kinds = {stored.dtype for stored in tensors}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
