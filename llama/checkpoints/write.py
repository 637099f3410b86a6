"""Write weights piece by piece, with at most one tensor in memory and never a partial file under its final name.

A file is planned (`OutFile`: the dtype and shape of each tensor) before any weight is read, so its header and size are
known up front. It is written as `<name>.partial`, hashed on the way, and renamed once complete and synced to disk.
"""

import errno
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from .huggingface import DTYPES
from .stored import Stored, release

PARTIAL = ".partial"
UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
PIECE = 2**20  # bytes hashed and written at a time; larger pieces would drop out of the CPU's caches in between
AHEAD = 32  # pieces that may be waiting to be hashed
TO_DISK = 2**25  # bytes after which the system is asked to start writing them to disk
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutFile(NamedTuple):
    """A planned file: its name, its tensors in order, and the functions that read a tensor and write the file."""

    name: str
    tensors: Mapping[str, Stored]
    read: Callable[[str], np.ndarray]
    layout: Callable[["Sink", Mapping[str, Stored], Callable[[str], np.ndarray]], None]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())


class Sink:
    """A file that is written from front to back, and hashed by a separate thread on the way."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], Any]):
        self._file, self._advance = file, advance
        self._hash, self._waiting = hashlib.sha256(), deque[Future[None]]()
        self._thread = ThreadPoolExecutor(1)
        self._written = self._on_its_way = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def write(self, data: bytes) -> int:
        self._waiting.append(self._thread.submit(self._hash.update, data))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()
        self._file.write(data)
        self._written += len(data)
        if self._written - self._on_its_way >= TO_DISK:
            self._send()
        self._advance(len(data))
        return len(data)

    def _send(self) -> None:
        """Start writing to disk what was written so far, so that the sync at the end need not wait for all of it."""
        self._file.flush()
        if hasattr(os, "posix_fadvise"):  # on Linux this starts writing dirty pages back, without waiting
            length = self._written - self._on_its_way
            os.posix_fadvise(self._file.fileno(), self._on_its_way, length, os.POSIX_FADV_DONTNEED)
        self._on_its_way = self._written

    def flush(self) -> None:
        """A no-op required by zipfile; `replacing` flushes once, at the end."""

    def sha256(self) -> str:
        """The digest of everything written so far."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._hash.hexdigest()


def write_file(folder: Path, planned: OutFile, advance: Callable[[int], Any]) -> str:
    """Write a planned file into `folder`, complete and synced to disk or not at all. Returns its SHA-256.

    Args:
        advance: called after each piece with its number of bytes.
    """
    with replacing(folder / planned.name) as file, Sink(file, advance) as sink:
        planned.layout(sink, planned.tensors, planned.read)
        return sink.sha256()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open `<name>.partial` next to `path` for writing; once it is complete and synced to disk, rename it to `path`.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise OSError(
                error.errno, f"{path} could not be written ({os.strerror(error.errno)}); make room and try again"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, where the system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def safetensors(sink: Sink, tensors: Mapping[str, Stored], read: Callable[[str], np.ndarray]) -> None:
    """Write a file in safetensors' layout: the header's length, the header, the tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 rejects files without it
    end = 0
    # wider dtypes first, so that every tensor is aligned for its dtype and can be read without copying
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in order:
        stored = tensors[name]
        start, end = end, end + stored.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for piece in pieces(read(name), tensors[name], name):
            sink.write(piece)


def pieces(array: np.ndarray, stored: Stored, name: str) -> Iterator[bytes]:
    """Yield the bytes of a tensor, which must have the planned dtype and shape; `release` it on the way."""
    if array.dtype != stored.dtype or array.shape != stored.shape:
        found, planned = f"{array.dtype} {array.shape}", f"{stored.dtype} {stored.shape}"
        raise ValueError(f"{name} was read as {found} instead of {planned}; the source has changed in the meantime")
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(data), PIECE):
        part = data[start : start + PIECE]
        yield part.tobytes()
        release(part)
    release(array)  # `data` may be a copy of it


def same(a: np.ndarray, b: np.ndarray, advance: Callable[[int], Any]) -> bool:
    """Whether two tensors are equal bit for bit; `release` them on the way."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    stored = Stored(a.dtype, a.shape)
    for left, right in zip(pieces(a, stored, ""), pieces(b, stored, ""), strict=True):
        if left != right:
            return False
        advance(len(left))
    return True


def split(tensors: Mapping[str, Any], limit: int) -> list[list[str]]:
    """Split the names, in order, into shards of at most `limit` bytes; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def shard_names(name: str, count: int) -> list[str]:
    """transformers' names: "model.safetensors" for one file, "model-00001-of-00002.safetensors" ... for several."""
    stem, suffix = name.rsplit(".", 1)
    return [name] if count == 1 else [f"{stem}-{n:05}-of-{count:05}.{suffix}" for n in range(1, count + 1)]


def index(files: Mapping[str, list[str]], total_size: int, total_parameters: int) -> dict[str, Any]:
    """The contents of model.safetensors.index.json, from the names of the tensors in each file."""
    weight_map = {tensor: file for file, shard in files.items() for tensor in shard}
    return {"metadata": {"total_size": total_size, "total_parameters": total_parameters}, "weight_map": weight_map}


def size_in_bytes(size: int | str) -> int:
    """Parse "5GB" as 5_000_000_000 and "5000" as 5000; return an integer unchanged."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", size.strip()) if isinstance(size, str) else None
    if match and match[2].upper() in UNITS:
        size = int(match[1]) * UNITS[match[2].upper()]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f'max_shard_size must be a number of bytes, or a string like "200MB" or "5GB", got {size!r}')
    return size
