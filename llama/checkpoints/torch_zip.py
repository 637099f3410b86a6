"""torch.save's file format, written without torch: a zip of a pickled state dict and an uncompressed member per tensor.

`pickles.py` and torch.load can read it, also with `mmap=True` and `weights_only=True`.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import numpy as np

from .pickles import contiguous
from .stored import Stored
from .write import Sink, pieces

STORAGES = {"float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
            "bfloat16": "BFloat16Storage"}  # fmt: skip
ALIGNMENT = 64  # bytes: tensor data starts at multiples of it, so that it can be used memory-mapped
HEADER, ZIP64 = 30, 20  # bytes of a zip member's header before its name, and of the extra field of long members
LONG = 2**30  # bytes: the size from which 64-bit sizes are written; zip needs them from 2³², zipfile somewhat earlier


def torch_zip(sink: Sink, tensors: Mapping[str, Stored], read: Callable[[str], np.ndarray]) -> None:
    """Write a file in torch.save's layout from front to back: checksums and sizes follow each member."""
    with zipfile.ZipFile(cast(IO[bytes], sink), "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickled(tensors))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for number, (name, stored) in enumerate(tensors.items()):
            with _member(archive, f"archive/data/{number}", stored.nbytes) as member:
                for piece in pieces(read(name), stored, name):
                    member.write(piece)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _member(archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
    """Open an uncompressed member whose data starts at a multiple of ALIGNMENT, after a padding field."""
    info = zipfile.ZipInfo(name)
    long = size >= LONG
    begins = cast(Any, archive.fp).tell() + HEADER + len(name) + 4 + (ZIP64 if long else 0)
    padding = -begins % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)  # "FB" is torch.save's id for it
    return archive.open(info, "w", force_zip64=long)


def pickled(tensors: Mapping[str, Stored]) -> bytes:
    """The pickled state dict without the data: for each tensor a call of PyTorch's rebuild function on its storage.

    Written opcode by opcode, because pickling these calls in the usual way would require PyTorch.
    """
    out = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for number, (name, stored) in enumerate(tensors.items()):
        if stored.dtype.name not in STORAGES:
            raise ValueError(f"{name} is {stored.dtype}, which cannot be written; supported: {', '.join(STORAGES)}")
        out += [
            _plain(name),
            pickle.GLOBAL, b"torch._utils\n_rebuild_tensor_v2\n", pickle.MARK,
            # the storage: ("storage", its class, its number, its device, how many elements)
            pickle.MARK, _plain("storage"), pickle.GLOBAL, f"torch\n{STORAGES[stored.dtype.name]}\n".encode(),
            _plain(str(number)), _plain("cpu"), _plain(math.prod(stored.shape)), pickle.TUPLE, pickle.BINPERSID,
            # offset, shape, strides, requires_grad, hooks
            _plain(0), _plain(stored.shape), _plain(contiguous(stored.shape)), pickle.NEWFALSE,
            pickle.GLOBAL, b"collections\nOrderedDict\n", pickle.EMPTY_TUPLE, pickle.REDUCE,
            pickle.TUPLE, pickle.REDUCE,
        ]  # fmt: skip
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])


def _plain(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes of a built-in value, without the pickle's header and STOP."""
    return pickle.dumps(value, 2)[2:-1]
