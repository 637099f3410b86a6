"""Writing weights piece by piece: never more in memory than a tensor, never half a file under a finished name.

A file is planned (`OutFile`: which tensors, of which type and shape) before any weight is read, so that its header and
its size are known up front. It is written as `<name>.partial`, hashed on the way, and takes its name when it is whole
and on the disk.
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
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
PIECE = 2**20  # bytes: what is hashed and written at a time; more of it falls out of the caches in between
AHEAD = 32  # pieces that may wait for the hash
TO_DISK = 2**25  # bytes, after which the system is asked to begin bringing them onto the disk
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutFile(NamedTuple):
    """A file to be: its name, its tensors in order, where each comes from, and what lays them out."""

    name: str
    tensors: Mapping[str, Stored]
    read: Callable[[str], np.ndarray]
    layout: Callable[["Sink", Mapping[str, Stored], Callable[[str], np.ndarray]], None]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())


class Sink:
    """A file that is written from front to back, and hashed on the way by a thread of its own."""

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
        """Let what was written begin its way onto the disk, or the sync at the end waits for all of it."""
        self._file.flush()
        if hasattr(os, "posix_fadvise"):  # on Linux this starts writing what is not written yet, and waits for nothing
            length = self._written - self._on_its_way
            os.posix_fadvise(self._file.fileno(), self._on_its_way, length, os.POSIX_FADV_DONTNEED)
        self._on_its_way = self._written

    def flush(self) -> None:
        """Asked for by zipfile; `replacing` flushes once, at the end."""

    def sha256(self) -> str:
        """Of all that was written."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._hash.hexdigest()


def write_file(folder: Path, planned: OutFile, advance: Callable[[int], Any]) -> str:
    """Write a planned file into `folder`, whole and on the disk or not at all. Gives its SHA-256.

    Args:
        advance: called with the number of bytes after each piece.
    """
    with replacing(folder / planned.name) as file, Sink(file, advance) as sink:
        planned.layout(sink, planned.tensors, planned.read)
        return sink.sha256()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, `<name>.partial` beside `path`, whose place it takes when it is whole and on the disk.

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
                error.errno, f"{path} could not be written ({os.strerror(error.errno)}); make room and start again"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def safetensors(sink: Sink, tensors: Mapping[str, Stored], read: Callable[[str], np.ndarray]) -> None:
    """The layout of a safetensors file: the header's length, the header, the tensors without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers 4 refuses it
    end = 0
    # the wider types first, so that every tensor lies where its type can be read without copying
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
    """The bytes of a tensor, if it is what its header says. What came in of a mapped file for it is let go."""
    if array.dtype != stored.dtype or array.shape != stored.shape:
        found, planned = f"{array.dtype} {array.shape}", f"{stored.dtype} {stored.shape}"
        raise ValueError(f"{name} was read as {found}, and {planned} was announced; the source changed meanwhile")
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(data), PIECE):
        part = data[start : start + PIECE]
        yield part.tobytes()
        release(part)
    release(array)  # of which `data` may be a copy


def same(a: np.ndarray, b: np.ndarray, advance: Callable[[int], Any]) -> bool:
    """Whether two tensors are the same bit by bit. What came in of mapped files for it is let go."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    stored = Stored(a.dtype, a.shape)
    for left, right in zip(pieces(a, stored, ""), pieces(b, stored, ""), strict=True):
        if left != right:
            return False
        advance(len(left))
    return True


def split(tensors: Mapping[str, Any], limit: int) -> list[list[str]]:
    """The names, in order, cut where a shard would pass the limit; a tensor larger than it has one of its own."""
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
    """As transformers calls them: "model.safetensors" alone, "model-00001-of-00002.safetensors" in company."""
    stem, suffix = name.rsplit(".", 1)
    return [name] if count == 1 else [f"{stem}-{n:05}-of-{count:05}.{suffix}" for n in range(1, count + 1)]


def index(files: Mapping[str, list[str]], total_size: int, total_parameters: int) -> dict[str, Any]:
    """The contents of model.safetensors.index.json, from the tensors' names by file."""
    weight_map = {tensor: file for file, shard in files.items() for tensor in shard}
    return {"metadata": {"total_size": total_size, "total_parameters": total_parameters}, "weight_map": weight_map}


def size_in_bytes(size: int | str) -> int:
    """5_000_000_000 from "5GB"; a number stays as it is."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]+)", size.strip()) if isinstance(size, str) else None
    if match and match[2].upper() in UNITS:
        size = int(match[1]) * UNITS[match[2].upper()]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f'max_shard_size must be bytes or like "200MB" or "5GB", got {size!r}')
    return size
